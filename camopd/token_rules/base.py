"""What a baseline may change of CaMOPD: which of a completion's tokens the loss counts, and how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import CaMOPDError
from ..forward import Forward
from ..samples import Sample, SampleSummary
from ..teachers.base import TokenScores


# Concatenates the lists of all ranks: `gather([x])` has one x per rank. A collective, so every rank calls it equally often.
# A rank always has samples.
Gather = Callable[[list[Any]], list[Any]]


class TokenRule:
    """CaMOPD itself: all sampled tokens count alike.

    A baseline overrides what it changes, and gives `sample.token_weights`. In an optimizer step the methods are called in
    this order, with these fields of a sample filled in:

        read_student     once per branch       what the rollout made
        read_teacher     per sample            teacher_logps and entropy, too
        weigh            once                  everything of scoring: student_logps and gaps, too
        count            per sample            token_weights, too
        metrics          per branch            summaries of all ranks' samples
        tokens_in_loss   per kept sample       its summary; with loss_normalization="token" alone
        advantages       per micro-batch
    """

    teacher_top_k = 0  # likeliest tokens of the teacher that `read_teacher` gets
    # Set it to read `sample.entropy`, which else is NaN where the student's log-probs come from the rollout engine.
    needs_entropy = False

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
        """Set `token_weights` of the scored samples, float32 (T,) on the CPU: 1 is a whole token, 0 leaves it out.

        Of all samples of all ranks, or of none. Outside the mask they are not read, but have to be finite. T_i and |S_b|
        count tokens and samples of weight 0 as any other, see `distillation_loss`. Returns metrics of the step.
        """
        return {}

    def count(self, sample: Sample) -> dict[str, int]:
        """Tokens of a sample that the metrics, or the loss's denominator, need to know of on every rank, by any names."""
        return {}

    def metrics(self, branch: str, summaries: Sequence[SampleSummary]) -> dict[str, float]:
        """Metrics of a branch, from its samples over all ranks."""
        return {}

    def tokens_in_loss(self, summary: SampleSummary) -> int:
        """Tokens of a kept sample that the loss is divided by with `loss_normalization="token"`."""
        return summary.num_tokens

    def advantages(self, gaps: Tensor, mask: Tensor) -> Tensor:
        """What the loss has in place of A_t, from A_t; both (B, T) in nats, 0 outside the mask."""
        return gaps


def share(summaries: Sequence[SampleSummary], counted: str) -> float:
    """What a rule has `counted`, as a share of all sampled tokens; NaN without any."""
    total = sum(summary.num_tokens for summary in summaries)
    return sum(summary.rule[counted] for summary in summaries) / total if total else float("nan")


def weigh(rule: TokenRule, samples: Sequence[Sample], step: int, gather: Gather) -> dict[str, float]:
    """`rule.weigh`, and a look at what it gave: a weight of another shape would be broadcast in silence.

    Raises `CaMOPDError` unless all samples have finite weights of the shape of their completions, or none has any.
    """
    found = rule.weigh(samples, step, gather)
    given = [sample.token_weights for sample in samples]
    if not any(gather([any(weights is not None for weights in given)])):
        return found
    for sample, weights in zip(samples, given, strict=True):
        if weights is None or weights.shape != sample.mask.shape or not weights.isfinite().all():
            shape = None if weights is None else tuple(weights.shape)
            raise CaMOPDError(
                f"{type(rule).__name__} gave sample {sample.position} token weights of shape {shape}; "
                f"{tuple(sample.mask.shape)} are needed, finite, and of every sample or of none. Its `weigh` must set "
                "token_weights of all samples."
            )
    return found
