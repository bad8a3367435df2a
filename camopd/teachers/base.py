"""What a teacher is: something that says how likely the student's tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
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
        """Begin to `score` and return at once. The future raises `TeacherError` where `score` would.

        With `rollout_servers` it is called for each completion as it is finished, from another thread.
        """
        ...


def read_answers(
    answers: Any, asked: int, samples: Sequence[tuple[int, int]], top_k: int, name: str, branch: str
) -> list[TokenScores]:
    """A teacher's answers to samples, float32 and without gradient. Those to dummies stand behind them and fall away.

    Args:
        answers: what its `score` has returned.
        asked: sequences that it was asked to score.
        samples: place in the step's batch and number of completion tokens of each.
        top_k: likeliest tokens that it was asked for.

    Raises `TeacherError` for anything but a `TokenScores` of the right shapes for each sequence.
    """
    who = f"teacher {name!r} of branch {branch!r}"
    wanted = "Its `score` must return one TokenScores for each sequence, in order; see camopd.Teacher."
    if not isinstance(answers, (list, tuple)):
        raise TeacherError(f"{who} returned {_what(answers)} for {asked} sequences. {wanted}")
    if len(answers) != asked:
        raise TeacherError(f"teacher {name!r} returned {len(answers)} answers for {asked} sequences. {wanted}")
    found = []
    for answer, (position, length) in zip(answers, samples, strict=False):
        if not isinstance(answer, TokenScores):
            raise TeacherError(f"{who} returned {_what(answer)} for sample {position}. {wanted}")
        logps = answer.logps
        usable = isinstance(logps, Tensor) and logps.is_floating_point() and logps.device.type == "cpu"
        if not usable or logps.dim() != 1:
            raise TeacherError(
                f"{who} returned {_what(logps)} as `logps` of sample {position}. They must be a float32 tensor of shape "
                f"({length},) on the CPU, the log-prob of each token after the prompt."
            )
        if len(logps) != length:
            raise TeacherError(
                f"{who} scored {len(logps)} of the {length} completion tokens of sample {position}. A teacher must return "
                "one log-prob for each token after the prompt."
            )
        _check_top(answer, (length, top_k), f"teacher {name!r}", position)
        found.append(TokenScores(logps.detach().float(), answer.top_ids, answer.top_logps))
    return found


def _check_top(answer: TokenScores, wanted: tuple[int, int], who: str, position: int) -> None:
    """Raise `TeacherError` unless the likeliest tokens that were asked for are there."""
    top = answer.top_ids
    whole = isinstance(top, Tensor) and top.dtype in (torch.int64, torch.int32)
    if wanted[1] and not (isinstance(top, Tensor) and whole and tuple(top.shape) == wanted):
        shape = tuple(top.shape) if isinstance(top, Tensor) and whole else _what(top)
        raise TeacherError(
            f"{who} gave top_ids of shape {shape} where sample {position} needs {wanted}, int64. Its `score` must return "
            "the top_k likeliest tokens at each position, see camopd.Teacher."
        )


def _what(value: Any) -> str:
    """What a teacher has returned, as an error says it."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}, on {value.device}"
    return f"{type(value).__name__} {repr(value)[:80]}"
