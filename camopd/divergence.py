"""The reverse KL of the student to a teacher at each token, in place of the sample of it that Eq. 1 is.

The gradient of -A_t log pi_theta(y_t) is that of KL(pi_theta || pi_T) at t on average over y_t. Where the teacher's whole
distribution is at hand the average need not be sampled; where its likeliest tokens are, most of it need not be.

Shape suffixes:  M completion tokens of all rows   H hidden   K likeliest tokens   B rows   T padded completion
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from .logprobs import (
    TOP_K_TOKENS,
    completion_hidden_states,
    gathered,
    head_logits,
    head_weights,
    logit_transform,
    sampled_logps,
)


SMALLEST_TAIL = 1e-6  # probability of all other tokens together, below which it counts as this


class Outputs(NamedTuple):
    """What a model predicts completion tokens from: the softmax of cap(scale * (hidden weight' + bias))."""

    hidden: Tensor  # (M, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None
    scale: float
    softcap: float | None


class Likeliest(NamedTuple):
    """A teacher's likeliest tokens at each completion token, and their log-probs."""

    ids: Tensor  # (M, K)
    logps: Tensor  # (M, K)


@torch.no_grad()
def outputs_of(
    model: Any, token_ids: Sequence[Sequence[int]], prompt_lens: Sequence[int], pad_token_id: int, padding_free: bool
) -> Outputs:
    """A teacher's, for `logps_and_kl`; arguments as those of `completion_logps`. The head's weights are the model's own,
    a copy only under ZeRO-3."""
    hidden_MH, _, _, causal_lm = completion_hidden_states(model, token_ids, prompt_lens, pad_token_id, padding_free)
    weight, bias = head_weights(causal_lm)
    if hasattr(weight, "ds_status"):  # of the student itself under ZeRO-3, whose shards are together in here alone
        with gathered(weight, bias):
            weight, bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
    # Of its data: a teacher that rests on the CPU takes its parameters away before the backward reads them.
    return Outputs(
        hidden_MH.to(weight.device), weight.detach(), None if bias is None else bias.detach(),
        *logit_transform(causal_lm.config.get_text_config()),
    )  # fmt: skip


def logps_and_kl(
    model: Any,
    token_ids: Sequence[Sequence[int]],
    prompt_lens: Sequence[int],
    pad_token_id: int,
    padding_free: bool,
    teachers: Sequence[tuple[Sequence[int], Outputs | Likeliest]],
) -> tuple[Tensor, Tensor]:
    """Log-probs of the student's completion tokens and its reverse KL at each of them, both (B, T) with gradient, in nats.

    Args:
        model, token_ids, prompt_lens, pad_token_id, padding_free: as those of `completion_logps`.
        teachers: each with the rows that are its own, in rising order. `Outputs` give the exact KL, in tiles and without
            (B, T, V) logits; `Likeliest` that of K + 1 outcomes, the teacher's K likeliest tokens and all others as one,
            which is at most the exact one. Rows of no teacher have 0.
    """
    hidden_MH, targets_M, mask_BT, causal_lm = completion_hidden_states(
        model, token_ids, prompt_lens, pad_token_id, padding_free
    )
    weight, bias = head_weights(causal_lm)
    student = Outputs(hidden_MH.to(weight.device), weight, bias, *logit_transform(causal_lm.config.get_text_config()))
    rows_M = torch.arange(len(token_ids))[:, None].expand_as(mask_BT)[mask_BT].to(weight.device)
    with gathered(weight, bias):
        logps_M, _ = sampled_logps(*student, targets_M)
        kl_M = logps_M * 0  # of rows without a teacher, with a backward like the others
        for rows, teacher in teachers:
            own_M = torch.isin(rows_M, torch.tensor(list(rows), device=rows_M.device))
            part = student._replace(hidden=student.hidden[own_M])
            kl = _exact_kl(part, teacher) if isinstance(teacher, Outputs) else _top_k_kl(part, teacher)
            kl_M = kl_M.masked_scatter(own_M, kl)
    mask_BT = mask_BT.to(logps_M.device)
    zeros_BT = logps_M.new_zeros(mask_BT.shape)
    return zeros_BT.masked_scatter(mask_BT, logps_M), zeros_BT.masked_scatter(mask_BT, kl_M)


def _exact_kl(student: Outputs, teacher: Outputs) -> Tensor:
    weight, bias = teacher.weight.to(student.weight.device), teacher.bias
    if is_deepspeed_zero3_enabled():  # the kernel asks every weight whether it is in shards
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        for whole in (weight, bias):
            if whole is not None:
                whole.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
    kl_M, _ = ChunkedDivergenceFunction.apply(
        student.hidden, student.weight, student.bias, teacher.hidden.to(student.weight.device), weight, bias,
        1.0,  # beta: the reverse KL
        1.0,  # temperature
        student.scale, student.softcap, teacher.scale, teacher.softcap,
    )  # fmt: skip
    return kl_M


def _top_k_kl(student: Outputs, teacher: Likeliest) -> Tensor:
    """In tiles of whole rows of the vocabulary, which the backward computes again."""

    def tile(hidden: Tensor, ids: Tensor, logps: Tensor) -> Tensor:
        logits = head_logits(hidden, *student[1:])
        # Rows that pad the teacher's head alone are outcomes that the student does not have.
        own = ids < logits.shape[-1]
        student_logps = logits.log_softmax(dim=-1).gather(-1, ids.where(own, 0))
        return bucket_kl(student_logps.where(own, LOG_ZERO), logps.where(own, LOG_ZERO))

    device = student.weight.device
    parts = zip(
        *(each.to(device).split(TOP_K_TOKENS) for each in (student.hidden, teacher.ids.long(), teacher.logps)),
        strict=True,
    )
    return torch.cat([checkpoint(tile, *part, use_reentrant=False) for part in parts])


LOG_ZERO = -1e4  # exp of it is 0


def bucket_kl(student_logps_MK: Tensor, teacher_logps_MK: Tensor) -> Tensor:
    """Reverse KL (M,) over K tokens, whose log-probs are given, and one more outcome, all other tokens, in nats.

    Lumping outcomes together never makes a KL larger, so this is a lower bound of the exact one.
    """
    own, other = student_logps_MK.exp(), teacher_logps_MK.exp()
    rest = (1 - own.sum(dim=-1)).clamp(min=SMALLEST_TAIL)
    others_rest = (1 - other.sum(dim=-1)).clamp(min=SMALLEST_TAIL)
    return (own * (student_logps_MK - teacher_logps_MK)).sum(dim=-1) + rest * (rest / others_rest).log()
