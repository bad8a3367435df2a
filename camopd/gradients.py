"""What the gradients of a step say: do the branches work against each other, and do the kept samples agree?

    conflict    dot product and cosine of two branches' gradients                      (the paper's Figure 1)
    coherence   Coh(A) = ||sum_A g_i|| / sum_A ||g_i||, and what selection gains        (the paper's Figure 3)

Gradients are looked at, never changed: nothing here writes a parameter, a `.grad`, or a random number that training draws.
Conflict reads the gradient that the optimizer has just used. Coherence takes gradients of its own, and only as far down as
the last transformer block, from what goes into its linear layers and what comes back to them: for a linear layer, a
sample's gradient is the sum over its tokens of (gradient of the output) x (input). So a batch of samples shares a forward,
dropped samples are measured like kept ones, and sharded weights (FSDP2, ZeRO) are never asked for a gradient.

Suffixes:  n samples of a branch   R subsets   L tokens of a row, padded
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn


logger = logging.getLogger(__name__)

# Numbers that are kept of a step's gradient and of a sample's. Odd, see `Sketch`.
STEP_WIDTH = 2**20 - 1
SAMPLE_WIDTH = 2**15 - 1
CONTROL_DRAWS = 200  # random subsets that the control is a mean over


class Sketch:
    """A seeded random projection of a long vector to `width` numbers, taken in piece by piece.

    The vector is cut into rows of `width`; each gets a random sign per number (the same for all rows) and one for itself,
    is rotated by a random number of places, and added to the others. So there is no projection matrix, only `width` signs,
    and a vector costs one pass over its numbers.

    Linear in the vector. Over seeds, the dot product of two sketches has the mean <u, v>. Its standard deviation is about
    ||u|| ||v|| sqrt((1 + cos^2) / width) and never more than 2 ||u|| ||v|| / sqrt(width): an even width would weaken that
    bound, because two rows that lie half a turn apart share each pair of signs twice. Vectors of at most `width` numbers
    are kept exactly.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", seed: int = 0):
        """`seed`: sketches of the same seed, width and order of pieces can be compared."""
        self.values = torch.zeros(width, device=device)
        self._draws = torch.Generator().manual_seed(seed)  # of its own: training's random numbers stay as they are
        self._signs = self._random(2, width).mul_(2).sub_(1).to(self.values)
        self._seen = 0
        self._shift, self._sign = 0, 1

    def add(self, piece: Tensor) -> None:
        """Take in the next numbers of the vector, of any shape."""
        width = len(self.values)
        flat = piece.detach().reshape(-1)
        while len(flat):
            column = self._seen % width
            if column == 0:
                self._shift, self._sign = int(self._random(width, 1)), 2 * int(self._random(2, 1)) - 1
            part, flat = flat[: width - column], flat[width - column :]
            part, signs = part.to(self.values), self._signs[column : column + len(part)]
            start = (column + self._shift) % width
            head = min(len(part), width - start)
            self.values[start : start + head].addcmul_(part[:head], signs[:head], value=self._sign)
            self.values[: len(part) - head].addcmul_(part[head:], signs[head:], value=self._sign)
            self._seen += len(part)

    def _random(self, below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), generator=self._draws)


# --------------------------------------------------------------------------------------------------- gradients of samples


def last_block(model: Any) -> tuple[nn.Module | None, list[nn.Linear]]:
    """The block before, and the linear layers with trainable weights, of the last transformer block that has any.

    With LoRA these are the adapter's two matrices. An empty list where the model has none that can be found: its config
    does not count its blocks (BLT), they are no `ModuleList`, or their layers no `torch.nn.Linear` (GPT-2).
    """
    causal_lm = model.base_model.model if is_peft_model(model) else model
    count = getattr(causal_lm.config.get_text_config(), "num_hidden_layers", None)
    for blocks in causal_lm.modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks) == count:
            for place in reversed(range(count)):
                layers = [m for m in blocks[place].modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
                if layers:
                    return (blocks[place - 1] if place else None), layers
    return None, []


def warn_of_no_layers(model: Any) -> None:
    """Say once that coherence is not measured."""
    logger.warning(
        "coherence/* is left out: no transformer block of %s with trainable torch.nn.Linear layers, each called with all "
        "tokens of a sample, can be found",
        type(model).__name__,
    )


def sample_sketches(
    before: nn.Module | None, layers: Sequence[nn.Module], loss: Callable[[], Tensor], lengths: Sequence[int]
) -> list[Tensor]:
    """A sketch of each sample's gradient with respect to the weights of `layers`, each (SAMPLE_WIDTH,) float32.

    Args:
        before: the module after whose forward gradients are wanted; what lies below it keeps no activations. `None`: from
            the start.
        layers: linear layers, each called once in the forward, with (B, L, inputs) or, packed, (1, tokens, inputs).
        loss: runs the forward and returns a sum over its samples in which no sample depends on another.
        lengths: tokens of each sample, prompt included, in the order of the batch.

    An empty list where none of the layers is called so: LoRA on bare parameters (`target_parameters`) uses its matrices
    without calling them, and experts see tokens of all rows in an order of their own.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if inputs[0].dim() == 3:
            seen.append((inputs[0].detach(), output))

    def start(*_: Any) -> None:
        torch.set_grad_enabled(True)  # until the context below ends

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    if before is not None:
        hooks.append(before.register_forward_hook(start))
    try:
        with torch.set_grad_enabled(before is None):
            total = loss()
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        return []
    gradients = torch.autograd.grad(total, [output for _, output in seen], allow_unused=True)
    found = [(pair, gradient) for pair, gradient in zip(seen, gradients, strict=True) if gradient is not None]
    sketches = []
    for row in range(len(lengths)):
        sketch = Sketch(SAMPLE_WIDTH, total.device)
        for (inputs, _), output_grads in found:
            sketch.add(_row(output_grads, row, lengths).float().T @ _row(inputs, row, lengths).float())
        sketches.append(sketch.values)
    return sketches


def _row(tensor: Tensor, row: int, lengths: Sequence[int]) -> Tensor:
    """A sample's tokens, (tokens, d), of padded rows or of packed ones."""
    if len(tensor) == len(lengths):
        return tensor[row, : lengths[row]]
    return tensor[0, sum(lengths[:row]) :][: lengths[row]]


# ------------------------------------------------------------------------------------------------------------ coherence


def coherence(gram_nn: Tensor, members_Rn: Tensor) -> Tensor:
    """Coh(A) of R sets of samples, (R,): 1 when their gradients all point the same way, about 1/sqrt(n) when they are
    unrelated and equally long. NaN where all gradients are 0.

    `gram_nn` holds their dot products, `members_Rn` is 1 where a sample belongs to the set and 0 elsewhere.
    """
    members_Rn = members_Rn.to(gram_nn)
    sums_R = ((members_Rn @ gram_nn) * members_Rn).sum(dim=1).clamp(min=0).sqrt()
    return sums_R / (members_Rn @ gram_nn.diagonal().clamp(min=0).sqrt())


def random_subsets(size: int, num_kept: int, draws: int = CONTROL_DRAWS, seed: int = 0) -> Tensor:
    """`draws` random subsets of `num_kept` out of `size` samples, bool (draws, size)."""
    order = torch.rand(draws, size, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return torch.zeros(draws, size, dtype=torch.bool).scatter_(1, order[:, :num_kept], True)


def of_coherence(branch: str, gram_nn: Tensor, kept_n: Tensor) -> dict[str, float]:
    """Coherence of a branch's kept samples against all of them and against random sets of the same size.

    The paper's gain, GCG = Coh(kept) / Coh(all) - 1, is above 0 for any smaller set, because fewer unrelated gradients
    cancel less: a random half of many has +41 %. `gcg_excess` is what is left of it after such a control.
    """
    full, selected = coherence(gram_nn, torch.stack([torch.ones_like(kept_n), kept_n])).tolist()
    gain = control = math.nan  # of nothing, where every sample is kept
    if not kept_n.all():
        gain = 100 * (selected / full - 1) if full > 0 else math.nan
        random = coherence(gram_nn, random_subsets(len(kept_n), int(kept_n.sum()))).nanmean().item()
        control = 100 * (random / full - 1) if full > 0 else math.nan
    return {
        f"coherence/{branch}/coh_full": full,
        f"coherence/{branch}/coh_selected": selected,
        f"coherence/{branch}/gcg": gain,
        f"coherence/{branch}/gcg_control": control,
        f"coherence/{branch}/gcg_excess": gain - control,
    }


# ------------------------------------------------------------------------------------------------------------- conflict


def of_conflict(names: tuple[str, str], norms: tuple[float, float], cosine: float, stale: bool) -> dict[str, float]:
    """How the gradients of two branches lie to each other; `stale` when one is of an earlier step's parameters."""
    return {
        "conflict/cosine": cosine,
        "conflict/dot": cosine * norms[0] * norms[1],
        f"conflict/{names[0]}_norm": norms[0],
        f"conflict/{names[1]}_norm": norms[1],
        "conflict/stale": float(stale),
    }


def cosine(product: float, square: float, other_square: float) -> float:
    """The cosine of two vectors from their dot product and squared norms; NaN where one of them is 0."""
    norms = math.sqrt(square * other_square)
    return product / norms if norms > 0 else math.nan
