"""The one way a model's log-probs are computed: those of the student, of teachers in the process, and of adapters.

Equal weights in the same batches give gaps of exactly 0, not of rounding noise, which Adam would turn into full-sized
updates. So whoever shares the student's weights shares its `Forward`, and all batch rows alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .balance import packing_is_less_work, score_batches, square_cost
from .divergence import Likeliest, Outputs, logps_and_kl, outputs_of
from .logprobs import architecture, check_logps, completion_logps, completion_top_k, rounding_of
from .packing import packing_fault, settle_packing, wants_packing
from .teachers.base import TokenScores


# What a forward costs beside its tokens, in tokens. It reads all weights once, in the time in which it computes so many
# tokens: of any model, since the work of a token grows with the weights as well. The CPU's is measured
# (benchmarks/scoring_batches.py); a GPU's is that of an H100 in bfloat16, 400 TFLOPS / 3.35 TB/s = 120, and as much again
# to start its kernels. Not by where the weights are: offloaded ones are elsewhere than those of the teacher.
FORWARD_COST = 256 if torch.cuda.is_available() else 32


class Forward:
    """Log-probs of a causal language model, with or without padding as suits it.

    Attributes:
        packed: whether rows stand one after the other without padding; `None`: by the batch. Settled by `probe`.
        square_cost: what decides by the batch, see `balance.square_cost`.
        probed: whether `probe` has been called.
    """

    def __init__(
        self,
        model: Any,
        run: Callable[..., Any],
        whole: Callable[..., Any],
        autocast: Callable[[], AbstractContextManager[Any]],
        batch_size: int,
        pad_token_id: int,
        padding_free: bool | None,
        whose: str,
        in_batches_of: Forward | None = None,
    ):
        """
        Args:
            model: causal language model or its PEFT wrapper, outside any wrapper of DDP, FSDP or DeepSpeed.
            run: `run(function, *args)` calls `function(model, *args)` where the model's weights are at hand.
            whole: the model's own forward in its wrapper, called with `input_ids` and `attention_mask`.
            autocast: the trainer's, so that student and teachers round alike.
            batch_size: times the longest row, tokens of a forward without gradient.
            pad_token_id: fills the padding; its value never matters.
            padding_free: as the config has it; `None` decides by the model.
            whose: the model, as errors call it.
            in_batches_of: the student's, for a teacher in the process. A student with an adapter has more weights, would
                weigh attention otherwise and cut other batches, in which equal weights have other rounding.
        """
        self.model, self.batch_size = model, batch_size
        self.square_cost: float | None = square_cost(model) if in_batches_of is None else in_batches_of.square_cost
        self.packed = wants_packing(model, padding_free)
        if self.packed is None and self.square_cost is None:
            self.packed = False
        self._in_wrapper, self._whole, self._autocast = run, whole, autocast
        self._pad_token_id, self._wanted, self._whose = pad_token_id, padding_free, whose
        self.probed = False

    def packs(self, lengths: Sequence[int]) -> bool:
        """Whether a batch of rows of these lengths is forwarded without padding."""
        if self.packed is None:
            assert self.square_cost is not None
            return packing_is_less_work(lengths, self.square_cost)
        return self.packed

    def logps(
        self, token_ids: list[list[int]], prompt_lens: list[int], with_entropy: bool = False, **run: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs (B, T) of the completion tokens of one batch, with gradient, and entropies (B, T) or `None`."""
        return self._run(
            completion_logps, token_ids, prompt_lens, self._pad_token_id, with_entropy, self._packs(token_ids), **run
        )

    def logps_and_kl(
        self,
        token_ids: list[list[int]],
        prompt_lens: list[int],
        teachers: Sequence[tuple[Sequence[int], Outputs | Likeliest]],
        **run: Any,
    ) -> tuple[Tensor, Tensor]:
        """The same, and the reverse KL to the teachers of the rows, see `divergence.logps_and_kl`."""
        packed = self._packs(token_ids)
        return self._run(logps_and_kl, token_ids, prompt_lens, self._pad_token_id, packed, teachers, **run)

    def outputs(self, token_ids: list[list[int]], prompt_lens: list[int]) -> Outputs:
        """What the model, as a teacher, predicts the completion tokens from, without gradient."""
        return self._run(outputs_of, token_ids, prompt_lens, self._pad_token_id, self._packs(token_ids))

    def rows(
        self, token_ids: list[list[int]], prompt_lens: list[int], with_entropy: bool = False
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Log-probs (T_i,) and entropies of each row, without gradient, on the CPU."""
        return in_length_sorted_batches(
            lambda ids, lens: self.logps(ids, lens, with_entropy), token_ids, prompt_lens, self.batch_size,
            self.packed, self.square_cost if self.packed is None else 0.0,
        )  # fmt: skip

    def top_k(self, token_ids: list[list[int]], prompt_lens: list[int], k: int) -> list[tuple[Tensor, Tensor]]:
        """The `k` likeliest tokens at each completion position of each row and their log-probs, both (T_i, k)."""
        return in_length_sorted_batches(
            lambda ids, lens: self._run(completion_top_k, ids, lens, self._pad_token_id, k),
            token_ids,
            prompt_lens,
            self.batch_size,
        )

    def token_scores(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int = 0) -> list[TokenScores]:
        """The same in the form of a teacher, see [`Teacher.score`]."""
        rows = [logps.float() for logps, _ in self.rows(token_ids, prompt_lens)]
        if not top_k:
            return [TokenScores(logps) for logps in rows]
        return [
            TokenScores(logps, *top)
            for logps, top in zip(rows, self.top_k(token_ids, prompt_lens, top_k), strict=True)
        ]

    def probe(self) -> None:
        """See once that these log-probs are those of the model's own logits, and that rows without padding do not see each
        other. Raises `ValueError` otherwise."""
        if self.probed:
            return
        self.probed = True

        def forward(token_ids: list[list[int]], prompt_lens: list[int], packed: bool = False) -> Tensor:
            self.packed = packed
            return self.logps(token_ids, prompt_lens)[0]

        packed = self.packed
        with evaluating(self.model), self._autocast():
            check_logps(f"{self._whose} ({architecture(self.model)})", forward, self._whole, self.model)
            if packed is not False:
                fault = packing_fault(forward, rounding_of(self.model))
                packed = settle_packing(packed, fault, self._wanted, self._whose)
        self.packed = packed

    def _packs(self, token_ids: Sequence[Sequence[int]]) -> bool:
        return self.packs([len(ids) for ids in token_ids])

    def _run(self, function: Callable[..., Any], *args: Any, **run: Any) -> Any:
        with self._autocast():
            return self._in_wrapper(function, *args, **run)


# Of mixtures of experts: factors around 1 that a router's or block's input is multiplied with in training.
ROUTER_NOISE = ("router_jitter_noise", "input_jitter_noise", "jitter_noise", "moe_jitter_eps")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in eval mode, and then in the one it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def in_length_sorted_batches(
    forward: Callable[[list[list[int]], list[int]], tuple[Any, ...]],
    token_ids: Sequence[list[int]],
    prompt_lens: Sequence[int],
    batch_size: int,
    padding_free: bool | None = False,
    square_cost: float | None = 0.0,
) -> list[tuple[Any, ...]]:
    """Run `forward` without gradient over batches of similar length, longest first, and give its rows back in order.

    `forward(token_ids, prompt_lens)` returns tensors of shape (B, T, ...), or `None` where it has nothing; each row comes
    back on the CPU, cut to its own T_i completion tokens. Longest first, so that running out of memory happens in the
    first batch and not the last. Every rank, with the same number of rows as the others, makes as many forward calls,
    which sharded models and DDP need.
    """
    lengths = [len(ids) for ids in token_ids]
    rows: list[tuple[Any, ...]] = [()] * len(lengths)
    several = dist.is_initialized() and dist.get_world_size() > 1
    for batch in score_batches(lengths, batch_size, padding_free, FORWARD_COST, several, square_cost or 0.0):
        with torch.no_grad():
            outputs = forward([token_ids[row] for row in batch], [prompt_lens[row] for row in batch])
        outputs = tuple(None if output is None else output.cpu() for output in outputs)
        for place, row in enumerate(batch):
            num_tokens = lengths[row] - prompt_lens[row]
            rows[row] = tuple(None if output is None else output[place, :num_tokens].clone() for output in outputs)
    return rows


def disable_functional_dropout(model: nn.Module) -> None:
    """Switch off the dropout that modules apply by a rate of their own, as attention does, without `torch.nn.Dropout`, and
    the noise of routers of experts.

    TRL's `disable_dropout_in_model` does the latter alone. The model's config keeps its rates. Raises `ValueError` for a
    model that draws in training whatever its rates are.
    """
    if getattr(getattr(model, "config", None), "model_type", None) == "phimoe":
        raise ValueError(
            "a model of type 'phimoe' draws its experts at random in training and not in scoring: its loss would be of "
            "other log-probs than its gaps. Train another model, or set disable_dropout=False to train with that noise."
        )
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" not in name and name not in ROUTER_NOISE:
                continue
            if isinstance(value, float):
                setattr(module, name, 0.0)
            elif isinstance(value, dict):  # of PEFT's layers, per adapter
                value.update({key: 0.0 for key, rate in value.items() if isinstance(rate, float)})
