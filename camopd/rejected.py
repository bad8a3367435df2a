"""The batch of an optimizer step that was refused, in `output_dir/rejected`: what to look at, or to send with a report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import CaMOPDError, TeacherError
from .rollouts import save_rollouts
from .step import Step


logger = logging.getLogger(__name__)

FOLDER = "rejected"
MOST = 20  # batches of a rank that are kept; the oldest go


@contextmanager
def keeping(step: Step | None, args: Any) -> Iterator[None]:
    """Where a `CaMOPDError` is raised inside, keep the step's samples of this rank, and let the error name step and file.

    Not of a `TeacherError`, whose rollouts are kept with a checkpoint, and nothing is wrong with them.
    """
    try:
        yield
    except TeacherError:
        raise
    except CaMOPDError as error:
        if step is not None and step.samples:
            error.args = (f"{said(step)}: {error}{keep(step, args, str(error))}",)
        raise


def saving_rejected(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the trainer with `keeping` around it."""

    @wraps(method)
    def inside(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(trainer, *args, **kwargs)
        except CaMOPDError:
            step = trainer.step
            mine = step is not None and step.number == trainer.state.global_step  # else it is the one before
            with keeping(step if mine else None, trainer.args):
                raise

    return inside


def keep(step: Step, args: Any, why: str) -> str:
    """Write the samples of this rank, with what scoring has found of them, and a .json that says why. Returns a line that
    says where, or that it could not be done."""
    folder = Path(args.output_dir) / FOLDER
    path = folder / f"step-{step.number + 1}-rank-{args.process_index}.safetensors"
    record = {
        "step": step.number + 1, "branch": step.label, "rank": args.process_index, "world_size": args.world_size,
        "positions": [sample.position for sample in step.samples], "why": why,
    }  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_rollouts(step.samples, step.prompts_cut, path, scored=True)
        path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        mine = sorted(
            folder.glob(f"step-*-rank-{args.process_index}.safetensors"), key=lambda old: old.stat().st_mtime
        )
        for old in mine[:-MOST]:
            old.unlink()
            old.with_suffix(".json").unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:  # what went wrong first is what has to be told
        return f"\nThe batch could not be kept in {str(path)!r}: {error}."
    return f"\nThe batch is in {str(path)!r}."


def said(step: Step) -> str:
    """The step in a sentence, counted from 1 as in metrics.jsonl."""
    return f"step {step.number + 1} ({step.label})"
