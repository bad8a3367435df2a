"""The records of an optimizer step: a sample, what every rank knows of it, and a micro-batch of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


def _not_yet() -> Tensor:
    return torch.zeros(0)


@dataclass
class Sample:
    """One prompt and the student's answer to it, from the rollout to the loss.

    The same record goes all the way; what a stage finds is added to it. T counts the tokens of the completion, tool results
    included. Of the prompt "2+2?" and the answer "4" with an end-of-sequence token, for example:

        rollout      token_ids      [17, 10, 17, 30, 19, 2]   prompt, then completion
                     prompt_len     4
                     mask           [True, True]              False on tokens that the student did not sample
                     rollout_logps  [-0.31, -0.02]            log mu, of the engine that drew them
                     server         http://gpu7:8000          that has drawn them; "" by another engine, or unknown
        scoring      teacher_logps  [-0.11, -0.02]            log pi_T, of the teacher of its branch
                     student_logps  [-0.31, -0.02]            log pi_theta, of the weights that it was drawn with
                     gaps           [ 0.20,  0.00]            Eq. 1, nats; what selection and the loss read
        token rule   token_weights  [ 1.00,  0.00]            of a method that weighs tokens; `None` in CaMOPD
    """

    branch: str
    position: int  # place in the step's global batch
    token_ids: list[int]  # prompt + completion
    prompt_len: int
    mask: Tensor  # (T,) bool
    length: int  # sampled tokens, those that `keep_prefix` takes away included
    truncated: bool  # stopped at max_completion_length, without an end of sequence
    category: str | None = None  # of the prompt, for metrics
    rollout_logps: Tensor | None = None  # (T,) float32, NaN on tokens that the engine did not sample
    server: str = ""  # URL of the rollout server that has drawn them; "" with another engine, or after resume
    teacher_logps: Tensor = field(default_factory=_not_yet)  # (T,) float32
    student_logps: Tensor = field(default_factory=_not_yet)  # (T,) float32
    entropy: Tensor = field(default_factory=_not_yet)  # (T,) nats, of the student; NaN where it was not computed
    gaps: Tensor = field(default_factory=_not_yet)  # (T,) float32, 0 outside the mask
    token_weights: Tensor | None = None  # (T,) float32
    teacher_prompt: list[int] | None = None  # token ids that the teacher sees in place of the prompt; `None`: the same
    seen: dict[str, Tensor] = field(default_factory=dict)  # (T, ...), what a token rule has asked models for
    lag: int = 0  # updates between the weights that wrote it and those that are trained
    student_is_read: bool = False  # has `student_logps` before all samples of the step are there
    asked: Any = None  # `scoring.Asked`, where the teacher was asked before all samples of the step were there

    @property
    def num_tokens(self) -> int:
        """T_i that Eq. 6-9 divide by: sampled tokens."""
        return int(self.mask.sum())

    @property
    def for_teacher(self) -> tuple[list[int], int]:
        """Token ids as the teacher sees them, prompt + completion, and how many of them are the prompt."""
        if self.teacher_prompt is None:
            return self.token_ids, self.prompt_len
        return self.teacher_prompt + self.token_ids[self.prompt_len :], len(self.teacher_prompt)

    def keep_prefix(self, num_tokens: int | None) -> None:
        """Keep only the first `num_tokens` tokens of the completion, to score and train; `None` keeps all. To be called
        before scoring."""
        if num_tokens is None:
            return
        self.token_ids = self.token_ids[: self.prompt_len + num_tokens]
        self.mask = self.mask[:num_tokens]
        if self.rollout_logps is not None:
            self.rollout_logps = self.rollout_logps[:num_tokens]


@dataclass(frozen=True)
class SampleSummary:
    """What every rank knows of a sample. Sums are over its sampled tokens, in nats."""

    position: int
    branch: str
    owner: int  # the rank that rolled it out
    prompt_len: int
    num_ids: int  # prompt + completion
    num_tokens: int
    length: int
    truncated: bool
    category: str | None
    score: float  # Eq. 6 or 7
    gap: float
    gap_abs: float
    gap_positive: float
    gap_square: float
    teacher_logp: float
    entropy: float
    gap_samples: tuple[float, ...] = ()  # evenly spaced over its tokens
    rule: dict[str, int] = field(default_factory=dict)  # what a token rule counts of it
    repeats: bool = False  # one token, and no other, up to the end of sequence
    log_ratio: float = 0.0  # sum of |student's log-prob at scoring - engine's|, over `num_ratios` of its tokens
    num_ratios: int = 0  # for which the engine gave one
    server: str = ""  # as in `Sample`
    gap_largest: float = 0.0  # |gap| of a token
    logp_largest: float = 0.0  # magnitude of the teacher's log-prob of a token


class LossTerms(NamedTuple):
    """What all micro-batches of an optimizer step share in the loss."""

    num_kept: int  # samples
    num_tokens: int | None  # of all kept samples; `None`, with loss_normalization="sample", divides by those of each
    scale: dict[str, float]  # r_b, per branch


@dataclass
class MicroBatch:
    """Kept samples that share a forward and backward of the loss. Either `gaps` or `teacher_logps` is set."""

    positions: list[int]  # empty in a dummy, which has one row outside the mask
    token_ids: list[list[int]]
    prompt_lens: list[int]
    mask: Tensor  # (B, T) bool, right-padded like all (B, T)
    gaps: Tensor | None  # (B, T), as scoring found them
    teacher_logps: Tensor | None  # (B, T), for gaps to the log-probs of the loss's own forward
    rollout_logps: Tensor | None  # (B, T)
    token_weights: Tensor | None  # (B, T)
    scale: Tensor  # (B,)
    num_kept: int  # as in `LossTerms`
    num_tokens: int | None
    branches: list[str] = field(default_factory=list)  # of the rows; none in a dummy
    # Of the rows, as in `Sample`; not of samples that have come from other ranks.
    for_teacher: list[tuple[list[int], int]] = field(default_factory=list)
    seen: list[dict[str, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, samples: Sequence[Sample], columns: Sequence[str], terms: LossTerms) -> MicroBatch:
        """A micro-batch of samples, with those of their `columns` that the loss reads."""
        found: dict[str, Any] = dict.fromkeys(("gaps", "teacher_logps", "rollout_logps", "token_weights"))
        for name in columns:
            found[name] = _pad([getattr(sample, name) for sample in samples])
        return cls(
            positions=[sample.position for sample in samples],
            token_ids=[sample.token_ids for sample in samples],
            prompt_lens=[sample.prompt_len for sample in samples],
            mask=_pad([sample.mask for sample in samples]),
            scale=torch.tensor([terms.scale[sample.branch] for sample in samples]),
            num_kept=terms.num_kept,
            num_tokens=terms.num_tokens,
            branches=[sample.branch for sample in samples],
            for_teacher=[sample.for_teacher for sample in samples],
            seen=[sample.seen for sample in samples],
            **found,
        )

    def to(self, device: torch.device) -> MicroBatch:
        """The same with its tensors on a device."""
        names = ("mask", "gaps", "teacher_logps", "rollout_logps", "token_weights", "scale")
        columns = {name: getattr(self, name) for name in names}
        return replace(self, **{name: column.to(device) for name, column in columns.items() if column is not None})

    @classmethod
    def dummy(cls, token: int, terms: LossTerms) -> MicroBatch:
        """Two tokens outside the mask: a forward and backward of weight 0, where sharded models need one of every rank."""
        nothing = torch.zeros(1, 1)
        return cls(
            positions=[], token_ids=[[token] * 2], prompt_lens=[1], mask=nothing.bool(), gaps=nothing, teacher_logps=None,
            rollout_logps=None, token_weights=None, scale=nothing[:, 0], num_kept=max(1, terms.num_kept),
            num_tokens=terms.num_tokens,
        )  # fmt: skip


def _pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
