"""SelecTKD (https://arxiv.org/abs/2510.24021): a small weight where the teacher does not accept the student's proposal.

Shape suffixes:  T completion tokens   K likeliest tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CaMOPDError
from ..forward import Forward
from ..samples import Sample, SampleSummary
from ..teachers.base import TokenScores
from .base import Gather, TokenRule, share


TOP_K = 5  # the window of acceptance; a wider one accepts more


class SelecTKD(TokenRule):
    """Field of the config: `selectkd_reject_weight` (beta)."""

    teacher_top_k = TOP_K

    def __init__(self, args: Any):
        self.reject_weight = args.selectkd_reject_weight

    def read_student(self, forward: Forward, samples: Sequence[Sample], token_ids: Any, prompt_lens: Any) -> None:
        """The token that the student would propose at each position."""
        tops = forward.top_k(token_ids, prompt_lens, TOP_K)
        for sample, top in zip(samples, tops[: len(samples)], strict=True):
            sample.seen["proposals"] = proposals(*top)

    def read_teacher(self, sample: Sample, scores: TokenScores, teacher: str) -> None:
        """The teacher's likeliest tokens (T, K). Raises `CaMOPDError` where it gave others or none."""
        wanted = (len(scores.logps), TOP_K)
        if scores.top_ids is None or tuple(scores.top_ids.shape) != wanted:
            found = None if scores.top_ids is None else tuple(scores.top_ids.shape)
            raise CaMOPDError(
                f"teacher {teacher!r} gave top_ids of shape {found} where token_rule='selectkd' needs {wanted}. Its "
                "`score` must return the top_k likeliest tokens at each position, see camopd.Teacher."
            )
        sample.seen["teacher_top_ids"] = scores.top_ids

    def weigh(self, samples: Sequence[Sample], step: int, gather: Gather) -> dict[str, float]:
        """1 where the teacher accepts, and the small weight elsewhere."""
        for sample in samples:
            accepts = accepted(sample.seen["proposals"], sample.seen["teacher_top_ids"])
            sample.token_weights = acceptance_weights(accepts, self.reject_weight)
        return {}

    def count(self, sample: Sample) -> dict[str, int]:
        """Its accepted tokens."""
        assert sample.token_weights is not None
        return {"accepted": int((sample.token_weights[sample.mask] == 1).sum())}

    def metrics(self, branch: str, summaries: Sequence[SampleSummary]) -> dict[str, float]:
        """Share of accepted tokens."""
        return {f"token_rule/{branch}/accepted": share(summaries, "accepted")}


def proposals(top_ids_TK: Tensor, top_logps_TK: Tensor) -> Tensor:
    """SelecTKD: the student's likeliest token at each position, (T,); of equals the lowest id."""
    largest_TK = top_logps_TK == top_logps_TK.amax(dim=-1, keepdim=True)
    return top_ids_TK.masked_fill(~largest_TK, torch.iinfo(top_ids_TK.dtype).max).amin(dim=-1)


def accepted(proposals_T: Tensor, teacher_top_ids_TK: Tensor) -> Tensor:
    """SelecTKD, greedy: whether the student's proposal is one of the teacher's K likeliest tokens, bool (T,).

    About the proposal at a position, not about the token that was sampled there.
    """
    return (proposals_T[:, None] == teacher_top_ids_TK).any(dim=-1)


def acceptance_weights(accepted_T: Tensor, reject_weight: float) -> Tensor:
    """SelecTKD: V_t, 1 where accepted and `reject_weight` (its beta; 0 masks) elsewhere, float32 (T,)."""
    return torch.where(accepted_T, 1.0, reject_weight)
