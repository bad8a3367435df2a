"""Held-out prompts: what an evaluation has measured of them, each counted once."""

from __future__ import annotations

import json
import logging
import math
import zlib
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset

from . import metrics
from .errors import CaMOPDError
from .hub import public_name
from .messages import COLUMNS, read_row
from .prompts import held_out, what_the_model_sees
from .samples import Sample, SampleSummary
from .teachers.address import OWN_TEACHERS
from .teachers.base import Teacher


logger = logging.getLogger(__name__)


class HeldOutResults:
    """Summaries of one evaluation's samples over all ranks, by position; `max_tokens` are those of the longest completion
    that may be written, and `teachers` those of the branches."""

    def __init__(self, max_tokens: int | None = None, teachers: Mapping[str, Teacher] | None = None) -> None:
        self._max_tokens, self._teachers = max_tokens, teachers or {}
        self._found: dict[int, SampleSummary] = {}
        self._prompts: dict[int, int] = {}  # checksum of each prompt's token ids
        self._metrics: dict[str, float] = {}
        self._length = math.nan  # mean, of the completions

    def __len__(self) -> int:
        """Prompts that are measured so far."""
        return len(self._found)

    def add(self, samples: Sequence[Sample], rank: int, gather: Callable[[list[Any]], list[Any]]) -> torch.Tensor:
        """Take in one scored batch of every rank. Returns this rank's sampled reverse KL, the mean over its rows, nats."""
        mine = [metrics.summary(sample, score=0.0, rank=rank, gap_samples=False) for sample in samples]
        sums = [zlib.crc32(array("q", sample.token_ids[: sample.prompt_len]).tobytes()) for sample in samples]
        for summary, prompt in gather(list(zip(mine, sums, strict=True))):
            # Data loaders fill up the last batches of the ranks with rows that were there before.
            self._found.setdefault(summary.position, summary)
            self._prompts.setdefault(summary.position, prompt)
        return torch.tensor([-summary.gap / max(1, summary.num_tokens) for summary in mine]).mean()

    @property
    def rows(self) -> list[SampleSummary]:
        """What is measured so far, by position."""
        return [self._found[position] for position in sorted(self._found)]

    def fill(self, output: Any, prefix: str, expected: int, logged: dict[str, list[float]]) -> Any:
        """The parent's `output` with the gaps of all prompts as `<prefix>_*`, and in place of what TRL has `logged` of the
        completions, over batches and under one name for all branches, the same over prompts.

        Raises `CaMOPDError` unless as many prompts were measured as `expected`.
        """
        if len(self._found) != expected:
            raise CaMOPDError(
                f"{len(self._found)} of {expected} held-out prompts were measured. The data loader leaves the others out: "
                "set dataloader_drop_last=False."
            )
        rows = self.rows
        of_completions = metrics.of_completions(rows)
        self._length = of_completions["completions/mean_length"]
        for name in of_completions:
            logged.pop(name, None)
        found = self._metrics = metrics.of_evaluation(rows)
        output = output._replace(num_samples=len(rows))
        output.metrics[f"{prefix}_loss"] = found["kl"]  # without the empty completions the batches count
        output.metrics.update({f"{prefix}_{name}": value for name, value in {**found, **of_completions}.items()})
        return output

    def record(self) -> dict[str, Any]:
        """The line of `held_out.jsonl`, after `fill`.

        That is the branch, its gaps, the mean `length` of the completions in tokens, their ends included, the most that one
        may have (`max_tokens`), the public name of the `teacher`, `None` where that is the student, and the sampled reverse
        KL of each prompt in nats per token, by which two evaluations of the same prompts (`of`) can be compared pair by
        pair; `None` for an empty completion. Where prompts have categories, they are there, too.
        """
        rows = self.rows
        found: dict[str, Any] = {
            name: value if math.isfinite(value) else None for name, value in self._metrics.items()
        }
        if any(row.category is not None for row in rows):
            found["category_by_prompt"] = [row.category for row in rows]
        branch = rows[0].branch if rows else ""
        return {
            "branch": branch,
            **found,
            "length": self._length,
            "max_tokens": self._max_tokens,
            "teacher": _model_of(self._teachers[branch].name) if branch in self._teachers else None,
            "kl_by_prompt": [0.0 - row.gap / row.num_tokens if row.num_tokens else None for row in rows],
            "of": f"{zlib.crc32(array('q', [self._prompts[row.position] for row in rows]).tobytes()):08x}",
        }


def _model_of(teacher: str) -> str | None:
    """The public name of the model that a teacher is; `None` of one that is the student itself, as it is or was."""
    kind, _, model = teacher.partition(":")
    if kind in OWN_TEACHERS:
        return public_name(model) if kind == "adapter_off" else None
    return public_name(teacher)


def check_name(name: str | None, known: Collection[str]) -> None:
    """Raise `ValueError` where `evaluate` is given the name of held-out prompts that there are none of."""
    if name is not None and name not in known:
        raise ValueError(
            f"eval_dataset={name!r} names none of the held-out prompts of this trainer, {list(known)}. Name one of them, "
            "or pass prompts."
        )


def of_each(trainer: Any, datasets: Any, argument: str, prefix: str, measure: Callable[..., Any]) -> dict[str, float]:
    """The metrics of held-out prompts that a user passes, of all branches together.

    Args:
        argument: the name of `datasets`, for messages.
        measure: `evaluate` or `predict` of transformers' trainer.
    """
    found: dict[str, float] = {}
    for name, prompts in _by_prefix(trainer, datasets, argument, prefix).items():
        measured = measure(prompts, metric_key_prefix=name)
        found.update(measured if isinstance(measured, dict) else measured.metrics)
    return found


def _by_prefix(trainer: Any, datasets: Any, argument: str, prefix: str) -> dict[str, Any]:
    """Held-out prompts that a user passes, by the prefix of their metrics: `<prefix>_<branch>`, or `prefix` where they are
    of one branch and not in a mapping."""
    by_branch = held_out(datasets, trainer.schedule, argument, trainer.args.prefill)
    for reader in (trainer.reader, trainer.teacher_prompts):
        reader.check(by_branch)
    if not isinstance(datasets, dict) and len(by_branch) == 1:
        return {prefix: next(iter(by_branch.values()))}
    return {f"{prefix}_{branch}": prompts for branch, prompts in by_branch.items()}


def warn_of_overlap(prompts: Mapping[str, Dataset], held: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Say where held-out prompts of a branch are among those that it is trained on, in whichever form."""
    for branch in prompts.keys() & held.keys():
        keys = [_key(row) for row in held[branch]]
        left = set(keys)
        for row in what_the_model_sees(prompts[branch]):
            left.discard(_key(row))
        shared = sum(key not in left for key in keys)
        if shared:
            logger.warning(
                "%d of %d held-out prompts of branch %r are among its training prompts: the result on them does not show "
                "how the student does on new ones. Remove them from the held-out prompts, or from the others.",
                shared, len(keys), branch,
            )  # fmt: skip


def _key(row: Mapping[str, Any]) -> str:
    """One text for all forms of a prompt; what only the teacher sees is not in it."""
    read = read_row({name: row[name] for name in COLUMNS if name in row and name != "teacher_prompt"})
    return json.dumps(read, sort_keys=True, default=str)  # of what only a template of the user's own can write
