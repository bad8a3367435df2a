"""Held-out gaps as a run has written them: `held_out.jsonl`, or the log of the Trainer's state."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import json_lines
from .manifest import step_of
from .output_dir import METRICS, RUN_ID, RUN_RECORD, run_id_of
from .verdict import Measured


HELD_OUT = "held_out.jsonl"  # in output_dir: a line for each branch of each evaluation
STATE = "trainer_state.json"  # in output_dir at the end of a run, and in every checkpoint
_KL = re.compile(r"eval_(.+)_kl")


def lines_of(path: Path, of: str = "branch") -> list[dict[str, Any]]:
    """The lines of a held_out.jsonl; none where there is no such file. `of` is what each line is of: a `branch`, or in
    eval_tasks.jsonl a `task`.

    A last line that a crash has cut short is left out. Raises `ValueError` for any other that is not one.
    """
    if not path.is_file():
        return []
    content = path.read_text(encoding="utf-8", errors="replace")
    texts = [(number, text) for number, text in enumerate(json_lines(content), start=1) if text.strip()]
    lines = []
    for number, text in texts:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
            if number == texts[-1][0]:
                break
        if not isinstance(line, dict) or "step" not in line or not line.keys() & {of, "loaded"}:
            raise ValueError(f"line {number} of {str(path)!r} is not an evaluation: {text[:60]!r}. Delete the line.")
        lines.append(line)
    return lines


def in_hand(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The evaluations that are of the model in hand or of its earlier steps: where a line says that an earlier model was
    loaded, as the best one is at the end, those after its step are left out."""
    kept: list[Mapping[str, Any]] = []
    for line in lines:
        if "loaded" in line:
            kept = [each for each in kept if each["step"] <= line["step"]]
        else:
            kept.append(line)
    return kept


def of_lines(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Measured]]:
    """Evaluations by branch, of the model in hand."""
    found: dict[str, list[Measured]] = {}
    for line in in_hand(lines):
        found.setdefault(str(line["branch"]), []).append(
            Measured(
                int(line["step"]), _number(line.get("kl")), _number(line.get("kl_se")), int(line.get("prompts", 0)),
                tuple(line.get("kl_by_prompt", ())), str(line.get("of", "")), _number(line.get("gap_abs")),
                _number(line.get("length")), line.get("max_tokens"), str(line.get("teacher") or ""),
            )
        )  # fmt: skip
    return found


def of_history(
    history: Iterable[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]] = ()
) -> dict[str, list[Measured]]:
    """Evaluations by branch from a Trainer's log, with the values of single prompts from `lines` where they are of the same
    evaluation."""
    known = {
        (branch, each.step, each.kl): each
        for branch, measured in of_lines([line for line in lines if "loaded" not in line]).items()
        for each in measured
    }
    found: dict[str, list[Measured]] = {}
    for entry in history:
        for name, value in entry.items():
            match = _KL.fullmatch(name)
            if match is None or value is None:
                continue
            head, step = name.removesuffix("_kl"), int(entry.get("step", 0))
            plain = Measured(
                step, _number(value), _number(entry.get(f"{head}_kl_se")), int(entry.get(f"{head}_prompts", 0)),
                gap_abs=_number(entry.get(f"{head}_gap_abs")), length=_number(entry.get(f"{head}_completions/mean_length")),
            )  # fmt: skip
            branch = match[1]
            found.setdefault(branch, []).append(known.get((branch, step, plain.kl), plain))
    return found


def of_run(folder: Path, mark: str = "") -> tuple[dict[str, list[Measured]], int | None]:
    """Evaluations by branch of a run in its folder, and how many steps the model in hand has, where that is known.

    From held_out.jsonl; of an older run, from trainer_state.json, there or in the newest checkpoint. `mark` is what the
    names of an earlier run's files end with, `-1` of metrics-1.jsonl.
    """
    lines = lines_of(_marked(folder / HELD_OUT, mark))
    loaded = next((int(line["step"]) for line in reversed(lines) if "loaded" in line), None)
    steps = _steps_in(_marked(folder / METRICS, mark))
    state = _state_of(folder, mark, steps)
    last = state.get("global_step") if steps is None else steps
    return of_lines(lines) or of_history(state.get("log_history", [])), last if loaded is None else loaded


def of_metrics(path: Path) -> tuple[dict[str, list[Measured]], int | None]:
    """`of_run` of the run whose metrics.jsonl this is, or metrics-1.jsonl. Of a file of another name nothing is known: what
    lies beside it is of others."""
    found = re.fullmatch(r"metrics((?:-\d+)?)\.jsonl", path.name)
    return of_run(path.parent, found[1]) if found else ({}, None)


def _marked(path: Path, mark: str) -> Path:
    return path.with_name(f"{path.stem}{mark}{path.suffix}")


def _steps_in(metrics: Path) -> int | None:
    """The step of the last whole line of a metrics.jsonl; `None` where there is none."""
    if not metrics.is_file():
        return None
    for text in reversed(json_lines(metrics.read_text(encoding="utf-8", errors="replace"))):
        try:
            step = json.loads(text)["step"]
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
        if isinstance(step, int):
            return step
    return None


def _state_of(folder: Path, mark: str, steps: int | None) -> dict[str, Any]:
    """The Trainer's state after the run's `steps`, or else that of its newest checkpoint.

    A run writes the first when it has ended. Until then one of another number of steps may lie there, and checkpoints of
    another run, or of later steps than those that it has gone back to.
    """
    found = []
    own = _json(_marked(folder / STATE, mark))
    if steps is None or own.get("global_step", steps) == steps:
        found.append(own)
    run_id = run_id_of(folder)
    for path in folder.glob("checkpoint-*") if not mark else ():
        if 0 <= step_of(path) <= (math.inf if steps is None else steps):
            named = _json(path / RUN_RECORD).get(RUN_ID)
            found += [_json(path / STATE)] if None in (named, run_id) or named == run_id else []
    return max(found, key=lambda state: state.get("global_step", -1) if state else -2, default={})


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
