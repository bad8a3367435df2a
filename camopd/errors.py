"""Errors that are not the value of one argument. Each message names the value, the reason and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class CaMOPDError(RuntimeError):
    """Something outside the configuration went wrong: a teacher, a checkpoint, a file."""


class TeacherError(CaMOPDError):
    """A teacher cannot be reached, or what it answers cannot be used."""


class RolloutError(CaMOPDError):
    """A rollout server cannot be reached, or what it answers cannot be used."""


class ResumeError(CaMOPDError):
    """A checkpoint belongs to another run than the one that wants to go on from it."""


class DataError(CaMOPDError):
    """A dataset cannot be fetched or read, or does not hold what a builder needs."""


class GuardError(CaMOPDError):
    """A number of an optimizer step is beyond the threshold of its guard."""


class OtherRankError(CaMOPDError):
    """What another rank has met, of a kind that is not made from its text alone."""


@contextmanager
def on_all_ranks(
    gather: Callable[[list[Any]], list[Any]], kinds: tuple[type[BaseException], ...] = (Exception,)
) -> Iterator[None]:
    """What is raised inside on one rank is raised on all of them: the others would wait for it in the next collective.

    Nothing inside may wait for another rank.

    Args:
        gather: of a list over all ranks.
        kinds: of errors.
    """
    error: BaseException | None = None
    try:
        yield
    except kinds as raised:
        error = raised
    found = gather([None if error is None else (type(error), str(error))])
    if error is not None:
        raise error
    for kind, text in filter(None, found):
        raise (kind if issubclass(kind, CaMOPDError) or kind in (TypeError, ValueError) else OtherRankError)(text)
