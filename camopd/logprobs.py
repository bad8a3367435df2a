"""Token ids -> log-probabilities of the completion tokens, without ever building (B, T, V) logits.

One code path for the student's training forward, the student's forward for the gaps, and in-process teachers: equal
weights in the same batches then give gaps of exactly 0, not of rounding noise, which Adam would turn into full-sized
updates.

Sequences are right-padded as a whole, so every architecture sees its usual position ids and a row costs
prompt + completion tokens, not the longest prompt + the longest completion of its batch. Padding-free, they stand one after
the other in a single row, and position ids that start over tell them apart.

Shape suffixes:  B rows   L padded prompt + completion   T padded completion   M completion tokens of all rows
                 N tokens of all rows   H hidden
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PretrainedConfig
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx


logger = logging.getLogger(__name__)

VOCAB_CHUNK = 32768  # width of the (tokens, vocabulary) tiles the lm_head is applied in, as in TRL's fused head
# Without Triton each tile has some eight temporary copies; narrow ones cost no time on a CPU.
CPU_VOCAB_CHUNK = 4096
TOP_K_TOKENS = 512  # tokens per (tokens, V) tile where top-k is asked for, which needs whole rows of the vocabulary


def completion_logps(
    model: Any,
    token_ids: Sequence[Sequence[int]],
    prompt_lens: Sequence[int],
    pad_token_id: int,
    with_entropy: bool = False,
    padding_free: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of each row's completion tokens, and the entropy of the distribution each was drawn from.

    Args:
        model: causal language model, or its PEFT wrapper (adapter active or disabled, as it stands), unwrapped from
            DDP/FSDP/DeepSpeed. Call it inside the wrapper's forward (TRL's forward redirection) so that sharded
            weights are there.
        token_ids: prompt + completion of each row, without padding.
        prompt_lens: prompt tokens of each row, at least 1: the first completion token needs a predecessor.
        pad_token_id: fills the padding; its value never matters.
        padding_free: forward all rows as one, without padding. The same numbers, for models that `supports_packing`.

    Returns:
        logps (B, T) float32, right-padded with 0, with gradient; entropy (B, T) in nats, detached, or `None`.
    """
    hidden_MH, targets_M, mask_BT, causal_lm = completion_hidden_states(
        model, token_ids, prompt_lens, pad_token_id, padding_free
    )
    weight, bias = head_weights(causal_lm)
    with gathered(weight, bias):
        logps_M, entropy_M = sampled_logps(
            hidden_MH.to(weight.device), weight, bias, *logit_transform(causal_lm.config.get_text_config()), targets_M,
            with_entropy,
        )  # fmt: skip
    mask_BT = mask_BT.to(logps_M.device)
    logps_BT = logps_M.new_zeros(mask_BT.shape).masked_scatter(mask_BT, logps_M)
    if entropy_M is None:
        return logps_BT, None
    return logps_BT, entropy_M.detach().new_zeros(mask_BT.shape).masked_scatter(mask_BT, entropy_M.detach())


def head_weights(causal_lm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a model's output embeddings, whole where FSDP2 has them in shards."""
    lm_head = causal_lm.get_output_embeddings()
    # PEFT's wrappers hand out those of the active adapter; that of trainable tokens leaves the bias out, here and there.
    weight, bias = lm_head.weight, getattr(lm_head, "bias", None)
    if isinstance(weight, torch.distributed.tensor.DTensor):  # FSDP2 shards parameters: gather the head once
        weight = weight.full_tensor()
        bias = bias.full_tensor() if bias is not None else None
    return weight, bias


def gathered(weight: Tensor, bias: Tensor | None) -> AbstractContextManager[Any]:
    """In which a student's head is whole where DeepSpeed ZeRO-3 has it in shards; a teacher in the process always is."""
    return maybe_gather_lm_head_ctx(weight, bias) if hasattr(weight, "ds_status") else nullcontext()


def sampled_logps(
    hidden_MH: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, targets_M: Tensor,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-probs (M,) of tokens by the head's weights, with gradient, and entropies (M,) or `None`."""
    logps_M, entropy_M, *_ = ChunkedLogProbFunction.apply(
        hidden_MH,
        weight,
        bias,
        targets_M.to(weight.device),
        1.0,  # temperature: CaMOPD samples and scores at T = 1
        CPU_VOCAB_CHUNK if weight.device.type == "cpu" else VOCAB_CHUNK,
        softcap,
        scale,
        ("entropy",) if with_entropy else (),
    )
    return logps_M, entropy_M


def head_logits(hidden_MH: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Logits (M, V) by the head's weights, with gradient, in float32 whatever the weights' dtype and autocast are.

    What a matrix product of bfloat16 gives is rounded to three digits, a logit of 20 by up to a sixteenth of a nat: more
    than a student and its teacher may differ by. As in TRL's chunked divergence the factors are of the dtype computed in,
    and their product is float32; gradients of several calls are added up in the weights' own dtype.
    """
    logits = _Linear.apply(hidden_MH, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kind = weight.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        ctx.save_for_backward(hidden, weight)
        product = _product(hidden.to(ctx.dtype), weight.to(ctx.dtype).t())
        return product if bias is None else product.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        wanted, factor = ctx.needs_input_grad, grad.to(ctx.dtype)
        return (
            _product(factor, weight.to(ctx.dtype)).to(hidden.dtype) if wanted[0] else None,
            _product(factor.t(), hidden.to(ctx.dtype)).to(weight.dtype) if wanted[1] else None,
            grad.sum(dim=0) if wanted[2] else None,
        )


def _product(one: Tensor, other: Tensor) -> Tensor:
    if one.is_cuda and one.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(one, other, out_dtype=torch.float32)
    with torch.autocast(one.device.type, enabled=False):
        return one.float() @ other.float()


def completion_top_k(
    model: Any, token_ids: Sequence[Sequence[int]], prompt_lens: Sequence[int], pad_token_id: int, k: int
) -> tuple[Tensor, Tensor]:
    """The model's `k` likeliest tokens at each completion position and their log-probs, without gradient.

    Returns `(ids, logps)`, each (B, T, k), padded with 0. Only (512, V) logits exist at a time.
    """
    with torch.no_grad():
        hidden_MH, _, mask_BT, causal_lm = completion_hidden_states(model, token_ids, prompt_lens, pad_token_id)
        weight, bias = head_weights(causal_lm)
        transform = logit_transform(causal_lm.config.get_text_config())
        ids_MK, logps_MK = [], []
        with gathered(weight, bias):
            for hidden in hidden_MH.to(weight.device).split(TOP_K_TOKENS):
                top = head_logits(hidden, weight, bias, *transform).log_softmax(dim=-1).topk(k, dim=-1)
                ids_MK.append(top.indices)
                logps_MK.append(top.values)
        mask_BT = mask_BT.to(weight.device)
        shape = (*mask_BT.shape, k)
        ids = torch.zeros(shape, dtype=torch.long, device=mask_BT.device)
        logps = torch.zeros(shape, device=mask_BT.device)
        ids[mask_BT] = torch.cat(ids_MK)
        logps[mask_BT] = torch.cat(logps_MK)
    return ids, logps


def completion_hidden_states(
    model: Any,
    token_ids: Sequence[Sequence[int]],
    prompt_lens: Sequence[int],
    pad_token_id: int,
    padding_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Hidden states that predict the completion tokens (M, H), those tokens (M,), their mask (B, T), and the model."""
    causal_lm = causal_lm_of(model)
    _head_of(causal_lm)  # where it is not one module, the input embeddings below are not either
    lengths = torch.tensor([len(ids) for ids in token_ids])
    starts = torch.tensor(list(prompt_lens))
    if int(starts.min()) < 1:
        raise ValueError("every row needs at least one prompt token, which predicts its first completion token.")
    rows = [torch.tensor(ids) for ids in token_ids]
    columns_L = torch.arange(int(lengths.max()))
    real_BL = columns_L < lengths[:, None]
    predicted_BL = (columns_L >= starts[:, None]) & real_BL
    device = causal_lm.get_input_embeddings().weight.device
    # The hidden state at position t predicts token t + 1.
    if padding_free:
        input_ids_N, predicted_N = torch.cat(rows), predicted_BL[real_BL]
        targets_M = input_ids_N[predicted_N]
        hidden_NH = _head_input(
            causal_lm,
            input_ids=input_ids_N[None].to(device),
            position_ids=columns_L.expand_as(real_BL)[real_BL][None].to(device),
        )[0]
        hidden_MH = hidden_NH[:-1][predicted_N[1:].to(hidden_NH.device)]
    else:
        input_ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        targets_M = input_ids_BL[predicted_BL]
        hidden_BLH = _head_input(
            causal_lm, input_ids=input_ids_BL.to(device), attention_mask=real_BL.long().to(device)
        )
        hidden_MH = hidden_BLH[:, :-1][predicted_BL[:, 1:].to(hidden_BLH.device)]
    num_tokens = lengths - starts
    mask_BT = torch.arange(max(1, int(num_tokens.max()))) < num_tokens[:, None]
    return hidden_MH, targets_M, mask_BT, causal_lm


def causal_lm_of(model: Any) -> Any:
    # Of a PeftModel; accelerate's `is_peft_model` looks for the package on the disk, in each forward.
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()


class _HeadReachedError(Exception):
    """Ends a model's forward where its head would begin."""


def _head_of(causal_lm: Any) -> Any:
    """The output embeddings of a model, or `ValueError` where its log-probs cannot be computed from them."""
    head = causal_lm.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor):  # none, or several (Musicgen)
        raise ValueError(
            f"the log-probs of {type(causal_lm).__name__} cannot be computed: its output embeddings are not one module "
            f"with a weight, but {type(head).__name__}. Use a model of another architecture; a teacher can be served by "
            "vLLM instead."
        )
    if not causal_lm.config.return_dict:
        raise ValueError(
            f"the config of {type(causal_lm).__name__} has return_dict=False, with which its parts hand on tuples that "
            "transformers itself cannot read. Set return_dict to true in its config.json."
        )
    config = causal_lm.config.get_text_config()
    if getattr(config, "output_router_logits", False):  # its loss comes behind the head, and `generate` fails with it
        config.output_router_logits = False
        logger.warning(
            "%s has output_router_logits=True, which is switched off, in what is saved of it, too: the balance loss of its "
            "experts is no part of the distillation.", type(causal_lm).__name__,
        )  # fmt: skip
    return head


def _head_input(causal_lm: Any, **inputs: Tensor) -> Tensor:
    """What the model's own forward hands to its head (the output embeddings), (B, L, H): all but the last projection.

    Not the output of `base_model`: some heads begin with a layer and a norm (ModernBertDecoder, BERT), some models scale
    what they hand over (MiniCPM3), and some have no `base_model` (Llama4). The forward is stopped there, so that neither
    (B, L, V) logits nor the head's own gather of sharded weights comes about.
    """
    found: list[Tensor] = []

    def stop(_: Any, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0])
        raise _HeadReachedError

    head = _head_of(causal_lm)
    hook = head.register_forward_pre_hook(stop, prepend=True)  # before those that gather sharded weights
    try:
        # Not `causal_lm(...)`: where it is what DDP, FSDP or DeepSpeed wraps, its hooks are at work already.
        causal_lm.forward(**inputs, use_cache=False)
    except _HeadReachedError:
        pass
    finally:
        hook.remove()
    if not found or found[0].shape[:2] != inputs["input_ids"].shape:
        raise ValueError(
            f"the log-probs of {type(causal_lm).__name__} cannot be computed: its forward does not hand the hidden states "
            "of all tokens to the module that it calls its output embeddings. Use a model of another architecture; a "
            "teacher can be served by vLLM instead."
        )
    return found[0]


def architecture(model: Any) -> str:
    """Name of the class of a model, or of that inside a PEFT wrapper."""
    return type(causal_lm_of(model)).__name__


def check_logps(
    whose: str,
    logps: Callable[[list[list[int]], list[int]], Tensor],
    forward: Callable[..., Any],
    model: Any,
) -> float:
    """Compare the log-probs of `completion_logps` with those of the model's own logits, on two short padded rows.

    Not every model's logits are its head's input times the head's weights: some scale or cap them, or adapt the head, in
    a way that is not known here, and wrappers may do anything. The second row is the beginning of the first, so that a
    model that attends to later tokens, or to padding, is found out as well.

    Args:
        whose: the model, as errors call it.
        logps: `(token_ids, prompt_lens) -> (B, T)`.
        forward: the model's own, in its DDP/FSDP/DeepSpeed wrapper, called with input_ids and attention_mask.
        model: unwrapped, for its sizes and dtype.

    Returns:
        The largest difference of a token, in nats. Raises `ValueError` where the mean is more than rounding.
    """
    first = [1 + (3 * place) % 11 for place in range(9)]
    rows = [first, first[:5]]
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    real = torch.arange(len(first)) < torch.tensor([[len(row)] for row in rows])
    with torch.no_grad():
        ours = logps(rows, [1, 1]).float().cpu()
        device = model.get_input_embeddings().weight.device
        output = forward(
            input_ids=input_ids.to(device), attention_mask=real.long().to(device), use_cache=False, return_dict=True
        )
    logits = output.logits.float().cpu()
    if logits.shape[:2] != input_ids.shape:
        raise ValueError(
            f"{whose} has logits of shape {tuple(logits.shape)} for {tuple(input_ids.shape)} tokens: it puts tokens of its "
            "own before them, as prompt tuning does, or leaves some out. Its log-probs cannot be compared with another's."
        )
    own = logits[:, :-1].log_softmax(dim=-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    real = real[:, 1:]
    tolerance = logps_tolerance(model, logits[:, :-1][real], input_ids[:, 1:][real])
    differences = (ours - own).abs()[real]
    difference = differences.mean().item()
    if not difference <= tolerance:
        raise ValueError(
            f"the log-probs of {whose} that CaMOPD computes from the input of its head differ from those of its own logits "
            f"by {difference:.3g} nats per token, where {tolerance:.2g} is rounding: it does something to its logits that "
            "is not known here, and a run would be trained on numbers that are not its own. Use a model of another "
            "architecture; a teacher can be served by vLLM instead."
        )
    sees_ahead = (ours[0] - ours[1]).abs()[real[1]].mean().item()
    if not sees_ahead <= tolerance:
        raise ValueError(
            f"the log-probs of {whose} change by {sees_ahead:.3g} nats per token when other tokens follow: it attends to "
            "both sides and is not a causal language model. Models made from BERT need is_decoder: true in their config, "
            "and training with it; others cannot be used."
        )
    return differences.max().item()


def logps_tolerance(model: Any, logits_MV: Tensor, targets_M: Tensor) -> float:
    """How far two computations of one model's log-probs may lie apart on average, in nats.

    A log-prob is a logit minus the log-sum-exp of all, which follows the largest ones. Either carries the rounding of the
    head's product to the dtype computed in, of at most u times its magnitude, and that of the product's H terms and of the
    sum's V, which are added up in float32.
    """
    weight = causal_lm_of(model).get_output_embeddings().weight
    unit, unit_float32 = _unit_of(weight.device.type, weight.dtype), torch.finfo(torch.float32).eps / 2
    logits = logits_MV.gather(-1, targets_M[:, None]).abs().max(), logits_MV.max(dim=-1).values.abs().max()
    largest, size = float(max(logits)), logits_MV.size(-1)
    num_terms = getattr(weight, "ds_shape", weight.shape)[-1]  # ZeRO-3 keeps a parameter's shape elsewhere
    return 2 * (unit * largest + num_terms * unit_float32 * (largest + math.log(size)))


def rounding_of(model: Any) -> float:
    """How far the log-probs of two kernels for one model may lie apart, as a share of their size.

    Each layer rounds some 15 times on the way of the residual stream, to the dtype computed in, the rest twice; independent
    errors add up to the root of their number.
    """
    causal_lm = causal_lm_of(model)
    layers = getattr(causal_lm.config.get_text_config(), "num_hidden_layers", None) or 0
    return (
        2 * _unit_of(causal_lm.get_input_embeddings().weight.device.type, causal_lm.dtype) * math.sqrt(15 * layers + 2)
    )


def _unit_of(device: str, dtype: torch.dtype) -> float:
    """The largest relative error of rounding to the dtype that a forward of weights of `dtype` computes in."""
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    unit = torch.finfo(dtype).eps / 2
    if torch.get_float32_matmul_precision() != "highest" and device == "cuda":
        unit = max(unit, 2**-11)  # TF32
    return unit


class SampledLogps(LogitsProcessor):
    """Log-prob of each token that `generate` draws, for a call of it; changes no score.

    Pass it as the last of the processors, `finish` it with what `generate` returns, and read `rows`. Keeps the scores of
    one token at a time, (B, V), and a number for each token drawn.
    """

    def __init__(self) -> None:
        self._scores: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`input_ids` (B, t) ends with the token drawn from the scores of the call before; `scores` are (B, V)."""
        self._take(input_ids[:, -1])
        self._scores = scores
        return scores

    def finish(self, sequences: Tensor) -> None:
        """Take the very last token."""
        self._take(sequences[:, -1])
        self._scores = None

    def rows(self) -> list[list[float]]:
        """Log-probs of each row, as long as the longest; what stands behind a row's end of sequence means nothing."""
        return torch.stack(self._columns, dim=1).tolist() if self._columns else []

    def _take(self, token_ids: Tensor) -> None:
        if self._scores is not None:
            scores = self._scores.float()
            drawn = scores.gather(1, token_ids[:, None]).squeeze(1)
            self._columns.append((drawn - scores.logsumexp(dim=-1)).cpu())


def logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """Factor on the logits and their tanh soft cap, which models apply after the lm_head (Cohere, Granite, Gemma).

    What they do before it is done already, see `_head_input`. `check_logps` finds those that are not known here.
    """
    softcap = None
    for name in (
        "final_logit_softcapping",
        "logits_soft_cap",
        "output_logit_soft_cap",
    ):  # Gemma, RecurrentGemma, xLSTM
        softcap = softcap or getattr(config, name, None)
    # One meaning, four names: https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/distillation_trainer.py
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if factor is not None:
            return float(factor), softcap
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None or config.model_type == "minicpm3":  # which divides what goes into the lm_head
        return 1.0, softcap
    return (float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)), softcap
