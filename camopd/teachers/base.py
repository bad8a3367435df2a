"""What a teacher is: something that says how likely the student's tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..errors import TeacherError


@dataclass(frozen=True)
class TokenScores:
    """A teacher's view of one completion of T_i tokens.

    `logps` are the log-probs of the completion's own tokens, float32 (T_i,), on the CPU. `top_ids` and `top_logps`
    (T_i, k) are the teacher's likeliest tokens at each position where top-k was asked for, else `None`.
    """

    logps: Tensor
    top_ids: Tensor | None = None
    top_logps: Tensor | None = None


@runtime_checkable
class Teacher(Protocol):
    """Any object with a `name` and a `score` can teach a branch.

    `name` says which model it is, in logs and in the checkpoint's record: two teachers with the same name are the same
    teacher to a resumed run. Every rank holds its own `Teacher` and scores its own rows.
    """

    name: str

    def score(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int = 0) -> list[TokenScores]:
        """Score completions at temperature 1.

        Args:
            token_ids: prompt + completion of each row, without padding.
            prompt_lens: number of prompt tokens of each row, at least 1; all tokens after them are scored.
            top_k: also return the `top_k` likeliest tokens at each position.

        Returns one `TokenScores` per row, in order; an empty completion gives an empty one.
        """
        ...


@runtime_checkable
class RemoteTeacher(Teacher, Protocol):
    """A teacher that works outside this process: the trainer goes on with the student while it scores."""

    def submit(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int = 0) -> Future[list[TokenScores]]:
        """Begin to `score` and return at once. The future raises `TeacherError` where `score` would."""
        ...


def by_row(rows: Sequence[int], answers: Sequence[TokenScores], asked: int, name: str) -> dict[int, TokenScores]:
    """A teacher's answers by the row they are for. Those for dummies stand behind them and fall away.

    Raises `TeacherError` unless there are as many answers as sequences the teacher was asked to score.
    """
    if len(answers) != asked:
        raise TeacherError(
            f"teacher {name!r} returned {len(answers)} answers for {asked} sequences. Its `score` must return one "
            "TokenScores for each, in order; see camopd.Teacher."
        )
    return dict(zip(rows, answers[: len(rows)], strict=True))
