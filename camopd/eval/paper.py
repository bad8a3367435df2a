"""The paper's Tables 1 and 2 beside one's own numbers, and what keeps the two apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .compare import GENERAL, RESULT, START
from .gca import DIMENSIONS
from .tasks import TASKS


COLUMNS = ("General", "Domain", "Vanilla", "CaMOPD")  # teachers and methods; short, so that the page holds the table
_GENERAL = (
    "GPQA Diamond",
    "Zebra Logic",
    "HMMT 25",
    "LCB v5",
    "LCB v6",
    "IF Eval",
    "Arena HP",
    "Arena CW",
    "LiveBench 1125",
)
_ROLEPLAY = ("Story Cons.", "Anthro.", "Char. Fid.", "Story Qual.", "Avg.")
_PARTS = dict(zip(_ROLEPLAY, DIMENSIONS, strict=False))  # the average has none
_MEDICAL = ("MedQA USMLE", "MedXpertQA Text", "Med. Avg.")
# Percent, in the order of COLUMNS and of the names. The start of a run is its domain teacher.
TABLES: dict[str, tuple[tuple[str, ...], tuple[tuple[float, ...], ...]]] = {
    "roleplay": (  # Table 1
        _GENERAL + _ROLEPLAY,
        (
            (61.49, 79.50, 33.12, 34.76, 20.57, 83.18, 36.50, 65.80, 65.60, 34.74, 23.09, 23.89, 41.98, 30.92),
            (54.29, 31.50, 26.67, 25.09, 16.00, 67.65, 9.70, 4.20, 42.80, 42.27, 33.42, 38.75, 49.89, 41.08),
            (61.99, 71.30, 29.17, 31.54, 22.29, 79.67, 25.50, 13.70, 58.90, 43.57, 34.91, 41.45, 51.50, 42.86),
            (62.63, 76.30, 31.04, 37.28, 24.00, 80.41, 33.20, 33.30, 63.50, 47.81, 33.96, 44.65, 53.47, 45.00),
        ),
    ),
    "medical": (  # Table 2
        _GENERAL + _MEDICAL,
        (
            (62.50, 84.80, 45.00, 58.42, 31.43, 84.66, 24.80, 36.50, 52.10, 79.03, 17.22, 48.13),
            (62.37, 71.60, 28.33, 48.75, 27.43, 48.98, 10.90, 36.40, 34.40, 86.17, 22.90, 54.54),
            (60.10, 72.60, 33.96, 51.25, 24.00, 48.06, 14.80, 33.00, 42.80, 86.02, 23.55, 54.79),
            (61.99, 72.60, 34.58, 56.63, 29.71, 59.89, 16.40, 31.80, 49.00, 85.78, 23.63, 54.71),
        ),
    ),
}
# What the paper does not say of a benchmark, or means by a name, by the name's column.
UNKNOWN = {
    "IF Eval": "the paper does not say whether its IF-Eval is strict or loose; here it is strict",
    "MedQA USMLE": "the paper gives neither the prompt's words nor the sampling; here it is greedy",
    "MedXpertQA Text": "the paper gives neither the prompt's words nor the sampling; here it is greedy",
    "GPQA Diamond": "the paper does not give its verifier's words; the prompt is evalscope's",
    "HMMT 25": "the paper does not give its verifier's words; the prompt is evalscope's",
    "Zebra Logic": "the prompt is evalscope's",
    "LCB v5": "run on one computer's own clock, with the official limit of 6 seconds a test",
    "LCB v6": "run on one computer's own clock, with the official limit of 6 seconds a test",
    "Arena HP": "without style control, which the paper does not mention",
    "Arena CW": "without style control, which the paper does not mention",
    "Avg.": "CoSER's prompts, with the example of an output for every model; severities given as text count here",
    "LiveBench 1125": "the paper's name may be the release of 2024-11-25 or that of 2025-11-25",
}


def beside(
    table: str, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any] | None = None
) -> tuple[list[list[str]], list[str]]:
    """The columns of a table of the paper with one's own scores beside them, percent, and a line for each difference.

    `rows` are those of `compare`, `about` the settings of eval.json. A mark * is on what was run on a part of the items.
    """
    about = about or {}
    names, values = TABLES[table]
    own = {TASKS[row["task"]].paper: row for row in rows if TASKS[row["task"]].paper in names}
    own |= {name: own["Avg."] for name in _PARTS if "Avg." in own}  # of one task
    medical = [own[name] for name in _MEDICAL[:2] if name in own]
    if len(medical) == 2:
        own["Med. Avg."] = _average(*medical)
    found, notes = (
        [["benchmark", *(f"paper: {column}" for column in COLUMNS), *(f"here: {name}" for name in _HERE)]],
        [],
    )
    for place, name in enumerate(names):
        numbers = own.get(name, {}).get("models", {})
        size = own.get(name, {}).get("size", 0)
        cells = [_score(numbers.get(model), size, _PARTS.get(name)) for model in _HERE]
        found.append([name, *(f"{column[place]:.2f}" for column in values), *cells])
        if name in own and name in UNKNOWN:
            notes.append(f"{name}: {UNKNOWN[name]}.")
        task = own.get(name, {}).get("task")
        used, theirs = about.get("judges", {}).get(task, "").rpartition("#")[2], TASKS[task].judge if task else None
        same = theirs and re.fullmatch(rf"(.*/)?{re.escape(theirs)}(-\d{{4}}-\d\d-\d\d)?", used, re.IGNORECASE)
        if used and theirs and not same:
            notes.append(f"{name}: judged by {used} here, and by {theirs} in the paper.")
    missing = [name for name in names if name not in own and not name.endswith("Avg.")]
    if missing:
        notes.append(f"Not run here: {', '.join(missing)}.")
    if about.get("max_tokens"):
        notes.append(f"Answers are cut at {about['max_tokens']:,} tokens here, whatever the paper gives them.")
    if any(cell.endswith("*") for row in found for cell in row):
        notes.append("Scores with * are of a part of the items.")
    return found, notes


def _average(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Of two benchmarks, each of the same weight; of models that have both."""
    pairs = {name: (one["models"][name], other["models"][name]) for name in one["models"]}
    models = {
        name: {"mean": sum(each["mean"] for each in pair) / 2, "items": sum(each["items"] for each in pair)}
        for name, pair in pairs.items()
    }
    return {"models": models, "size": one["size"] + other["size"]}


_HERE = (GENERAL, START, RESULT)


def _score(numbers: Mapping[str, Any] | None, size: int, part: str | None) -> str:
    if numbers is None or numbers["mean"] is None:
        return "-"
    score = 100 * numbers.get("pooled", numbers["mean"]) if part is None else numbers["parts"][part]
    return f"{score:.2f}" + ("*" if numbers["items"] < size else "")
