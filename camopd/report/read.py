"""Runs as they are on disk: which file, what is in it, and the lines of it that signs and charts are about."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path

import pandas as pd

from ..files import json_lines
from ..output_dir import RUN_RECORD


NAME_LENGTH = 40  # characters of a run's name in a legend


def metrics_file(run: str) -> Path:
    """The metrics.jsonl of an output_dir, or the file itself. Raises `ValueError` when there is none."""
    path = Path(run)
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"there is no run at {run!r}. Give the output_dir of a run, or its metrics.jsonl.")
    if (path / "metrics.jsonl").is_file():
        return path / "metrics.jsonl"
    below = sorted(
        {str(found.parent) for depth in ("*", "*/*", "*/*/*") for found in path.glob(f"{depth}/metrics.jsonl")
         if not (found.parent / RUN_RECORD).is_file()}
    )  # fmt: skip
    there = f" Below it there are runs: {', '.join(below[:8])}." if below else ""
    raise ValueError(
        f"{run!r} is not the folder of a run: it has no metrics.jsonl, which training writes into its output_dir.{there}"
    )


_OLD_TIMES = re.compile(r"^time/teacher_([^/]+?)(_hidden|_idle)?$")


def new_name(metric: str) -> str:
    """What a metric is called now; older runs wrote `time/teacher_general_hidden` for `time/general/teacher_hidden`."""
    return _OLD_TIMES.sub(r"time/\1/teacher\2", metric)


def read_run(path: Path) -> tuple[pd.DataFrame, str]:
    """A metrics.jsonl as a frame indexed by optimizer step, with NaN where a value does not exist, and a note or "".

    Per branch it has columns more, made of the others: `selection/BRANCH/length_ratio` of kept over dropped samples, and
    `jaccard_chance`, the overlap that chance gives; of an older run also `tokens` that are kept.

    A last line that was cut short by a crash is left out, and the note says so. Raises `ValueError` for a file without
    steps, for any other broken line, and for lines that are not steps of a run.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [(number, line) for number, line in enumerate(json_lines(text), start=1) if line.strip()]
    records, note = [], ""
    for number, line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == lines[-1][0] and len(lines) > 1:
                note = (
                    f"the last line of {path.name} is cut short and left out; the run was stopped while it wrote it."
                )
                break
            raise ValueError(
                f"line {number} of {str(path)!r} is not JSON: {line[:60]!r}. Delete the line, or give another file."
            ) from None
        if not isinstance(record, dict) or not {"step", "branch"} <= set(record):
            raise ValueError(
                f"line {number} of {str(path)!r} is not a step of a run: it needs `step` and `branch`, got {line[:60]!r}. "
                "Give the metrics.jsonl that camopd has written."
            )
        records.append({new_name(name): value for name, value in record.items()})
    if not records:
        raise ValueError(
            f"{str(path)!r} has no steps. Training writes a line after each optimizer step; wait for the first one."
        )
    frame = pd.DataFrame(records).set_index("step")
    values = frame.drop(columns="branch").apply(pd.to_numeric, errors="coerce").astype(float)
    for branch in branches_of([frame]):
        kept, share, length, dropped, overlap = (
            values.get(f"selection/{branch}/{name}", pd.Series(math.nan, values.index))
            for name in ("kept", "kept_fraction", "length_kept", "length_dropped", "jaccard_length")
        )
        values[f"selection/{branch}/length_ratio"] = length / dropped.replace(0, math.nan)
        tokens = f"selection/{branch}/tokens"
        values[tokens] = values.get(tokens, kept * length)  # of a run from before they were written
        # Of two independent sets that each keep a share p: p^2 / (2p - p^2), up to rounding of set sizes.
        values[f"selection/{branch}/jaccard_chance"] = (share / (2 - share)).where(overlap.notna())
    values.insert(0, "branch", frame["branch"])
    return values, note


def names_of(paths: Sequence[Path]) -> list[str]:
    """Names for runs that tell them apart: what differs in their folders, shortened in the middle."""
    folders = [path.resolve().parent.parts if path.name == "metrics.jsonl" else path.resolve().parts for path in paths]
    head = _in_common(folders)
    tail = _in_common([folder[head:][::-1] for folder in folders])
    names = ["/".join(folder[head : len(folder) - tail]) or folder[-1] for folder in folders]
    half = (NAME_LENGTH - 1) // 2
    names = [name if len(name) <= NAME_LENGTH else f"{name[:half]}…{name[-half:]}" for name in names]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _in_common(folders: Sequence[Sequence[str]]) -> int:
    """How many first parts all folders share."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False)))


def branches_of(frames: Iterable[pd.DataFrame]) -> list[str]:
    """Branches of all runs, in order of appearance."""
    return list(
        dict.fromkeys(name for frame in frames for value in frame["branch"].unique() for name in value.split("+"))
    )


def step_kinds(frames: Sequence[pd.DataFrame]) -> list[str]:
    """What a step takes, over all runs: branches, and then mixes such as `general+domain`."""
    order = branches_of(frames)
    found = {value for frame in frames for value in frame["branch"]}
    return sorted(found, key=lambda kind: ("+" in kind, order.index(kind.split("+")[0]), kind))


def lines_of(frame: pd.DataFrame, metric: str, split: str = "branch") -> dict[str, pd.Series]:
    """The values of a metric by optimizer step, in one line or several, where there are any.

    `split` is "branch" for a metric with `{branch}` in its name, "step" for a line per kind of step, or "stale" for
    conflicts with the other branch's gradient at the "same parameters" and at earlier ones.
    """
    if split == "branch":
        found = {branch: frame.get(metric.format(branch=branch)) for branch in branches_of([frame])}
    elif metric not in frame:
        return {}
    elif split == "step":
        found = {kind: frame[metric][frame["branch"] == kind] for kind in frame["branch"].unique()}
    else:
        stale = frame.get("conflict/stale", pd.Series(0.0, frame.index)) == 1
        found = {"same parameters": frame[metric][~stale], "stale": frame[metric][stale]}
    lines = {name: values.dropna() for name, values in found.items() if values is not None}
    return {name: values for name, values in lines.items() if len(values)}


def teacher_seconds(frame: pd.DataFrame, branch: str) -> dict[str, float]:
    """Mean seconds of a teacher in the steps that ask it: waited for, hidden behind other work, idle."""
    name = f"time/{branch}/teacher"
    steps = frame.reindex(columns=[name, f"{name}_hidden", f"{name}_idle"]).dropna(subset=name)
    if steps.empty:
        return {}
    busy, hidden, idle = steps.mean().fillna(0)
    return {"waited for": max(0.0, busy - hidden), "hidden": hidden, "idle": idle}
