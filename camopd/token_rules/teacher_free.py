"""A control: what is left of the gain when the teacher's view of a token does not enter the loss.

After https://arxiv.org/abs/2608.31046, where a fixed advantage on unlikely tokens does about as well as the teacher's. It
is known here from summaries, which give the -0.5 and not what counts as unlikely: the bound is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..samples import Sample, SampleSummary
from .base import Gather, TokenRule, share


ADVANTAGE = -0.5  # nats, of every token that is trained
UNLIKELY = 0.2  # the student's probability of a token, below which it is trained


class TeacherFree(TokenRule):
    """Makes tokens that the student finds unlikely less likely still, whoever the teacher is. It has no settings."""

    def weigh(self, samples: Sequence[Sample], step: int, gather: Gather) -> dict[str, float]:
        """1 for the unlikely tokens, 0 for the others."""
        for sample in samples:
            sample.token_weights = (sample.student_logps < math.log(UNLIKELY)).float()
        return {}

    def count(self, sample: Sample) -> dict[str, int]:
        """Its trained tokens."""
        assert sample.token_weights is not None
        return {"trained": int((sample.token_weights[sample.mask] == 1).sum())}

    def metrics(self, branch: str, summaries: Sequence[SampleSummary]) -> dict[str, float]:
        """Share of trained tokens."""
        return {f"token_rule/{branch}/kept_tokens": share(summaries, "trained")}

    def tokens_in_loss(self, summary: SampleSummary) -> int:
        """Those that it trains."""
        return summary.rule["trained"]

    def advantages(self, gaps: Tensor, mask: Tensor) -> Tensor:
        """The same for every token (B, T), 0 outside the mask."""
        return torch.full_like(gaps, ADVANTAGE).masked_fill(~mask, 0.0)
