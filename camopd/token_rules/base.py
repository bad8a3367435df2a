"""What a baseline may change of CaMOPD: which of a completion's tokens the loss counts, and how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..forward import Forward
from ..samples import Sample, SampleSummary
from ..teachers.base import TokenScores


Gather = Callable[[list[Any]], list[Any]]


class TokenRule:
    """CaMOPD itself: all sampled tokens count alike.

    A baseline overrides what it changes. The methods are called in this order, once per optimizer step, on every rank;
    those without a `Gather` see this rank's samples only.
    """

    teacher_top_k = 0  # likeliest tokens of the teacher that `read_teacher` gets
    needs_entropy = False  # of the student, also where its log-probs come from the rollout engine

    def __init__(self, args: Any):
        """`args` is the [`CaMOPDConfig`]; a rule's settings are fields of it."""

    def read_student(self, forward: Forward, samples: Sequence[Sample], token_ids: Any, prompt_lens: Any) -> None:
        """Ask the student for more than the log-probs of its tokens, and keep it in `sample.seen`.

        Within scoring, branch by branch. `token_ids` and `prompt_lens` are of the samples, with dummies behind them where
        another rank has more: forward all of them, as sharded models need the same number of forwards of every rank.
        """

    def read_teacher(self, sample: Sample, scores: TokenScores, teacher: str) -> None:
        """Take more from a teacher's answer than the log-probs. `teacher` is its name."""

    def weigh(self, samples: Sequence[Sample], step: int, gather: Gather) -> dict[str, float]:
        """Set `token_weights` (T,) of the scored samples, of which 1 is a whole token. Returns metrics of the step."""
        return {}

    def count(self, sample: Sample) -> dict[str, int]:
        """Tokens of a sample that the metrics, or the loss's denominator, need to know of on every rank."""
        return {}

    def metrics(self, branch: str, summaries: Sequence[SampleSummary]) -> dict[str, float]:
        """Metrics of a branch, from its samples over all ranks."""
        return {}

    def tokens_in_loss(self, summary: SampleSummary) -> int:
        """Tokens of a kept sample that `loss_normalization="token"` divides by."""
        return summary.num_tokens

    def advantages(self, gaps: Tensor, mask: Tensor) -> Tensor:
        """What the loss has in place of A_t, from A_t; both (B, T) in nats, 0 outside the mask."""
        return gaps


def share(summaries: Sequence[SampleSummary], counted: str) -> float:
    """What a rule has `counted`, as a share of all sampled tokens; NaN without any."""
    total = sum(summary.num_tokens for summary in summaries)
    return sum(summary.rule[counted] for summary in summaries) / total if total else float("nan")
