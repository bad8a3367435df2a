"""`metrics.jsonl` in `output_dir`: a line per optimizer step; and `held_out.jsonl`: one per branch of each evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import on_all_ranks
from ..evaluation import HeldOutResults
from ..measured import HELD_OUT
from ..output_dir import METRICS
from ..run_folder import append, best_step, make_room, named_if_unwritten
from ..step import Step, StepCallback


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
            self._on_first(lambda path: make_room(path, state.global_step), name)

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
        self._on_first(lambda path: append(path, line))

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
        self._loaded = best_step(args, state)
        self._write_evaluation({} if self._loaded is None else {"step": self._loaded, "loaded": True})

    def _write_evaluation(self, record: dict[str, Any]) -> None:
        """Add a line, if any. Called by all ranks."""
        if not record:
            self._on_first(lambda path: None, HELD_OUT)
            return
        self._on_first(lambda path: append(path, f"{json.dumps(record)}\n", flush=True), HELD_OUT)

    def _on_first(self, work: Callable[[Path], None], name: str = METRICS) -> None:
        """`work` on the first process; where it fails, all raise, so that none waits for the others."""
        with on_all_ranks(self._gather):
            if self._path is None:
                return
            path = self._path.with_name(name)
            with named_if_unwritten(path):
                work(path)
