"""Scores of tasks that a run's folder has: those of `camopd eval`, and those of `eval_tasks` from training.

What the report and the model card show of them, as tables of text. Scores of `camopd eval` are percent, those of
`eval_tasks` as the task's own metric has them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .measured import lines_of, of_run
from .output_dir import EVAL_TASKS, METRICS, run_id_of
from .verdict import interval, short, t_quantile, unseen


EVAL = "eval.json"  # of `camopd eval`
EVAL_OUTPUT = "eval-output"  # its folder where none was named, in the one it was called in
# Of its models; others have their own name.
COLUMNS = {"start": "before", "general": "general teacher", "result": "after"}
OFTEN = 0.1  # share of a model's answers above which it is said that they were cut off, or held none
_WITH_ERROR = " ± 95 %"  # in the head of a column


@dataclass(frozen=True)
class Benchmarks:
    """What one eval.json says of a run."""

    path: Path
    rows: tuple[list[str], ...] = ()  # a table, its head first
    about: str = ""  # how many rows and tokens, in a sentence
    lost: Mapping[str, str] = field(default_factory=dict)  # by task, where many answers were cut off or held none
    problem: str = ""  # why there is no table

    @property
    def lines(self) -> list[str]:
        """The table as a line of text for each task."""
        found = []
        for row in self.rows[1:]:
            cells = dict(zip(self.rows[0], row, strict=True))
            scores = [
                f"{name.removesuffix(_WITH_ERROR)} {cell}" for name, cell in cells.items() if _WITH_ERROR in name
            ]
            text = f"{row[0]}, percent{_WITH_ERROR}: {', '.join(scores)}"
            if cells.get("broke", "-") != "-":
                text += f"; change {cells['change (95 %)']}, {cells['came back']} came back, {cells['broke']} broke"
            found.append(f"{text}; {self.lost[row[0]]}." if row[0] in self.lost else f"{text}.")
        return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table of Markdown; the first is the head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join(['---'] * len(rows[0]))} |", *lines[1:]])


# ---------------------------------------------------------------------------------------------------------- camopd eval


def benchmarks_of(run: Path) -> list[Benchmarks]:
    """Of each eval.json in a folder of a run's `output_dir`, and of that in `EVAL_OUTPUT` where its result is of the run.

    One that cannot be read, or is older than the run's last step and so of an earlier model, has a `problem`.
    """
    paths = sorted(run.glob(f"*/{EVAL}"))
    default = Path(EVAL_OUTPUT) / EVAL
    if default.resolve() not in {path.resolve() for path in paths} and _is_of(run, default):
        paths.append(default)
    found = [_benchmarks(path, run) for path in paths]
    return [each for each in found if each.rows or each.problem]


def _is_of(run: Path, path: Path) -> bool:
    """Whether an eval.json has evaluated the model in a folder, or a checkpoint of it."""
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["about"]["models"]["result"]
        return Path(where).expanduser().resolve().is_relative_to(run.resolve())
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _other_model(where: Any, run: Path) -> str:
    """What an eval.json in a run's folder has evaluated in place of its model, or nothing; a merged copy lies anywhere."""
    model = Path(str(where)).expanduser().resolve()
    step, in_hand = re.fullmatch(r"checkpoint-(\d+)", model.name), of_run(run)[1]
    # Of a run that was killed a checkpoint is the model.
    finished = any((run / name).is_file() for name in ("config.json", "adapter_config.json"))
    if model.parent == run.resolve() and step is not None and finished and in_hand not in (None, int(step[1])):
        return f"it is of {model.name}, and the run's model is that of step {in_hand}"
    ids = [run_id_of(folder) for folder in (model, run)]
    return f"it is of the run in {model.name}" if None not in ids and ids[0] != ids[1] else ""


def _benchmarks(path: Path, run: Path) -> Benchmarks:
    metrics = run / METRICS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(_table_of(found["tasks"]))
        told = found.get("about", {})
        about, other = _about(told), _other_model(told.get("models", {}).get("result"), run)
        lost = {str(task["task"]): text for task in found["tasks"] if (text := _lost(task["models"]))}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = (
            f"`{path}` is not shown: it cannot be read as results of `camopd eval` ({type(error).__name__}: {error})."
        )
        return Benchmarks(path, problem=f"{why} Type that command again with the same --out.")
    if rows and other:
        return Benchmarks(path, problem=f"`{path}` is not shown: {other}. Keep it in a folder outside of the run's.")
    if rows and metrics.is_file() and path.stat().st_mtime < metrics.stat().st_mtime:
        return Benchmarks(
            path,
            problem=f"`{path}` is not shown: it is older than the run's last step, and so of an earlier model. Run `camopd "
            f"eval` again, with another --out; in a copy whose files have lost their times, `touch {path}`.",
        )
    return Benchmarks(path, rows, about, lost)


def _table_of(tasks: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each task; none without tasks. Raises what a file of another form makes it raise."""
    if not tasks:
        return []
    models = _in_order(name for task in tasks for name in task["models"])
    changed = any("change" in task for task in tasks)
    head = ["task", *(f"{COLUMNS.get(name, name)}{_WITH_ERROR}" for name in models), "items"]
    rows = [[*head, *(("change (95 %)", "came back", "broke") if changed else ())]]
    for task in tasks:
        numbers = [task["models"].get(name) for name in models]
        counts = sorted({int(each["items"]) for each in numbers if each})
        row = [str(task["task"]), *map(score, numbers), " to ".join(map(str, (counts[0], counts[-1])[: len(counts)]))]
        rows.append([*row, *(_change(task.get("change")) if changed else ())])
    return rows


def _in_order(names: Iterable[str]) -> list[str]:
    """Models in the order of `COLUMNS`, others behind."""
    known = list(dict.fromkeys(names))
    return sorted(known, key=lambda name: [*COLUMNS, *known].index(name))


def _lost(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Which shares of the models' answers to a task were cut off, and held none, where one is above `OFTEN`."""
    said = []
    for kind, words in (
        ("truncated", "were cut off at the token limit"),
        ("unparsed", "hold none that could be read"),
    ):
        shares = {name: models[name].get(kind) for name in _in_order(models)}
        if any(share is not None and share > OFTEN for share in shares.values()):
            each = [f"{share:.0%} ({COLUMNS.get(name, name)})" for name, share in shares.items() if share is not None]
            said.append(f"{', '.join(each)} of the answers {words}")
    return "; ".join(said)


def score(numbers: Mapping[str, Any] | None) -> str:
    """`41.2 ± 4.1` of the numbers that eval.json has of a model on a task: percent and half the 95 % interval over items
    (Student's t). Where all are wrong, or all right, `0.0 (to 30.8)`, with the interval's exact other end.
    """
    if not numbers or numbers["mean"] is None:
        return "-"
    error, items = numbers["standard_error"], int(numbers["items"])
    if error == 0 and numbers["mean"] in (0, 1):
        end = 100 * unseen(items)
        return f"100.0 (from {100 - end:.1f})" if numbers["mean"] else f"0.0 (to {end:.1f})"
    half = f" ± {100 * t_quantile(items - 1) * error:.1f}" if error is not None and items > 1 else ""
    return f"{100 * numbers['mean']:.1f}{half}"


def _change(change: Mapping[str, Any] | None) -> list[str]:
    if change is None:
        return ["-", "-", "-"]
    ends = [change["low"], change["high"]]
    between = "" if None in ends else f" ({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f})"
    moved = [f"{len(change[name])} of {change['items']}" for name in ("came_back", "broke")]
    return [f"{100 * change['value']:+.1f}{between}", *moved]


def _about(about: Mapping[str, Any]) -> str:
    limit, tokens = about.get("limit"), about.get("max_tokens")
    said = [f"at most {limit} rows of each task"] if limit else []
    said += [f"answers of at most {tokens} tokens"] if tokens else []
    return f"Measured on {', with '.join(said)}." if limit else f"Measured with {said[0]}." if said else ""


# ----------------------------------------------------------------------------------------------------------- eval_tasks


def tasks_of(metrics: Path, last_step: int | None = None) -> list[list[str]]:
    """First, best and last score of each of a run's `eval_tasks`, as a table; nothing where there are none.

    `metrics` is the run's metrics.jsonl, or metrics-1.jsonl of an earlier run; of a file of another name nothing is known.
    `last_step` is that of the model in hand, after which nothing counts. Raises `ValueError` for a broken line.
    """
    named = re.fullmatch(r"metrics((?:-\d+)?)\.jsonl", metrics.name)
    if named is None:
        return []
    stem, dot, kind = EVAL_TASKS.rpartition(".")
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines_of(metrics.with_name(f"{stem}{named[1]}{dot}{kind}"), "task"):
        if _is_evaluation(line) and (last_step is None or line["step"] <= last_step):
            found.setdefault(line["task"], []).append(line)
    rows = [["task", "rows", "first ± 95 %", "best", "last ± 95 %", "rows that broke"]] if found else []
    return rows + [_task(name, lines) for name, lines in found.items()]


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether it has what live_tasks.py writes: one that was written by hand is passed over."""
    scores = line.get("scores")
    numbers = isinstance(scores, list) and bool(scores) and all(type(score) in (int, float) for score in scores)
    return numbers and isinstance(line.get("task"), str) and type(line["step"]) is int


def _task(name: str, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row of the table, of the evaluations that have asked the same rows as the last one."""
    last = lines[-1]
    same = [
        line for line in lines if line.get("rows") == last.get("rows") and len(line["scores"]) == len(last["scores"])
    ]
    first, best = same[0], max(same, key=lambda line: fmean(line["scores"]))
    broke = sum(a > b for a, b in zip(first["scores"], last["scores"], strict=True))
    top = f"{short(fmean(best['scores']))} (step {best['step']}, of {len(same)})"
    return [name, str(len(last["scores"])), _mean(first), top, _mean(last), str(broke)]


def _mean(line: Mapping[str, Any]) -> str:
    scores, step = line["scores"], f"(step {line['step']})"
    mean, count = fmean(scores), len(scores)
    spread = stdev(scores) if count > 1 else math.nan
    if spread == 0 and mean in (0, 1):
        end = unseen(count)
        return f"1.000 (from {1 - end:.3f}) {step}" if mean else f"0.000 (to {end:.3f}) {step}"
    half = t_quantile(count - 1) * spread / math.sqrt(count) if count > 1 else math.nan
    return f"{interval(mean, half)} {step}"
