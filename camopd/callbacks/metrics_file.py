"""`metrics.jsonl` in `output_dir`: a line per optimizer step; and `held_out.jsonl`: one per branch of each evaluation."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import atomic
from ..errors import CaMOPDError, on_all_ranks
from ..evaluation import HeldOutResults
from ..measured import HELD_OUT
from ..output_dir import METRICS
from ..run_folder import set_aside
from ..step import Step, StepCallback


logger = logging.getLogger(__name__)


class MetricsFile(StepCallback):
    """Appends one line per optimizer step to `output_dir/metrics.jsonl`, and since training has begun one per evaluation of
    a branch to `held_out.jsonl`, on the first process.

    A resumed run drops the lines after its checkpoint, which it is about to write again. A new run in a folder that has
    such a file renames it to `metrics-1.jsonl`, `metrics-2.jsonl`, ... first. Where the file cannot be written, all ranks
    raise `CaMOPDError`, and what was in it is as it was.
    """

    def __init__(
        self, gather: Callable[[list[Any]], list[Any]], held_out: Callable[[], HeldOutResults] | None = None
    ) -> None:
        """`gather`: of a list over all ranks. `held_out` gives the results of the latest evaluation."""
        self._gather, self._held_out = gather, held_out
        self._path: Path | None = None  # of the first process
        self._step: Step | None = None  # that is closed and not written
        self._begun = False
        self._loaded: int | None = None  # step of the best model, once it was loaded at the end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make room for the run's own lines."""
        self._path = Path(args.output_dir) / METRICS if state.is_world_process_zero else None
        self._begun, self._loaded = True, None
        for name in (METRICS, HELD_OUT):
            self._on_first(lambda path: _make_room(path, state.global_step), name)

    def on_step_closed(self, step: Step) -> None:
        """Wait until all callbacks have been told, those that come after this one, too."""
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the line of the step; what is not finite is null."""
        step, self._step = self._step, None
        if step is None:
            return
        record = {"step": step.number + 1, **step.metrics}
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        line = f"{json.dumps(finite, default=str)}\n"  # of a user's callback, anything
        self._on_first(lambda path: _append(path, line.encode()))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the line of a branch; of an evaluation before training none, when the folder is not yet the run's."""
        if self._held_out is None or not self._begun:
            return
        step = state.global_step if self._loaded is None else self._loaded
        self._write_evaluation({"step": step, **self._held_out().record()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the best model was loaded, say that what was measured after it is of another one."""
        if not args.load_best_model_at_end:
            return
        if state.best_model_checkpoint is not None:  # which another rank may not see
            self._loaded = int(state.best_global_step)
        self._write_evaluation({} if self._loaded is None else {"step": self._loaded, "loaded": True})

    def _write_evaluation(self, record: dict[str, Any]) -> None:
        """Add a line, if any. Called by all ranks."""
        if not record:
            self._on_first(lambda path: None, HELD_OUT)
            return
        self._on_first(lambda path: _append(path, f"{json.dumps(record)}\n".encode(), flush=True), HELD_OUT)

    def _on_first(self, work: Callable[[Path], None], name: str = METRICS) -> None:
        """`work` on the first process; where it fails, all raise, so that none waits for the others."""
        with on_all_ranks(self._gather):
            if self._path is None:
                return
            path = self._path.with_name(name)
            try:
                work(path)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                way = f"The disk or quota of {str(path.parent)!r} is full: free some" if full else "Repair it"
                raise CaMOPDError(
                    f"{str(path)!r} cannot be written: {error.strerror or error}. {way}, and go on from the last "
                    "checkpoint by `--resume auto` (resume_from_checkpoint='auto'). The lines before are as they were."
                ) from error


def _make_room(path: Path, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    if step == 0:
        set_aside(path)
        return
    kept, strange = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        found = _step_of(line)
        if found is None and line.strip() and number < len(lines):  # the last one was cut short; its step comes again
            strange.append(f"line {number} ({line[:60]!r})")
        elif found is not None and found <= step:
            kept.append(line + b"\n")
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        logger.warning(
            "%s: %s%s, not a JSON object with a number `step`, left out", path, ", ".join(strange[:3]), more
        )
    atomic.write(path, b"".join(kept))


def _step_of(line: bytes) -> float | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: also of UTF-8
        return None
    if isinstance(found, dict) and found.keys() == {"step", "loaded"}:
        return math.inf  # which holds no more: training goes on from the last step, and not from that model
    step = found.get("step") if isinstance(found, dict) else None
    if not isinstance(step, (int, float)) or isinstance(step, bool) or step != step or abs(step) == math.inf:
        return None
    return step


def _append(path: Path, line: bytes, flush: bool = False) -> None:
    """Add a whole line, or nothing: half of one would be read as a step; `flush` waits for the disk. Raises `OSError`."""
    with open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            while line:  # of a full disk the first write may take a part, and the second says why
                line = line[file.write(line) :]
            if flush:
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise
