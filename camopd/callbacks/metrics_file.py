"""`metrics.jsonl` in `output_dir`: a line per optimizer step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..step import Step, StepCallback


class MetricsFile(StepCallback):
    """Appends one line per optimizer step to `output_dir/metrics.jsonl`, on the first process.

    A resumed run drops the lines after its checkpoint, which it is about to write again. A new run in a folder that has
    such a file renames it to `metrics-1.jsonl`, `metrics-2.jsonl`, ... first.
    """

    def __init__(self) -> None:
        self._path: Path | None = None  # of the first process
        self._step: Step | None = None  # that is closed and not written

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make room for the run's own lines."""
        if not state.is_world_process_zero:
            return
        path = self._path = Path(args.output_dir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        if state.global_step == 0:
            number = 1
            while path.with_name(f"metrics-{number}.jsonl").exists():
                number += 1
            path.rename(path.with_name(f"metrics-{number}.jsonl"))
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= state.global_step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_step_closed(self, step: Step) -> None:
        """Wait until all callbacks have been told, those that come after this one, too."""
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the line of the step; what is not finite is null."""
        step, self._step = self._step, None
        if self._path is None or step is None:
            return
        record = {"step": step.number + 1, **step.metrics}
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf  # a line cut short by a crash; its step will be written again
