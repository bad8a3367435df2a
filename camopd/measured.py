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
from .verdict import Measured


HELD_OUT = "held_out.jsonl"  # in output_dir: a line for each branch of each evaluation
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
            raise ValueError(f"line {number} of {str(path)!r} is no evaluation: {text[:60]!r}. Delete the line.")
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
                gap_abs=_number(entry.get(f"{head}_gap_abs")),
            )  # fmt: skip
            branch = match[1]
            found.setdefault(branch, []).append(known.get((branch, step, plain.kl), plain))
    return found


def of_run(folder: Path) -> tuple[dict[str, list[Measured]], int | None]:
    """Evaluations by branch of a run in its folder, and how many steps the model in hand has, where that is known.

    From held_out.jsonl; of an older run, from trainer_state.json, there or in the newest checkpoint.
    """
    lines = lines_of(folder / HELD_OUT)
    loaded = next((int(line["step"]) for line in reversed(lines) if "loaded" in line), None)
    state = _state_of(folder)
    last = loaded if loaded is not None else state.get("global_step")
    return of_lines(lines) or of_history(state.get("log_history", [])), last


def _state_of(folder: Path) -> dict[str, Any]:
    checkpoints = [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0]
    for path in (folder, *sorted(checkpoints, key=step_of, reverse=True)):
        try:
            found = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
