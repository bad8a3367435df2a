"""LiveBench: the judgments of its own scripts as items of a task, with the weights of its own mean.

The scripts are run by livebench_scripts.py, but for models that somebody has judged in the checkout before.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import json_lines
from .scores import Item
from .tasks import Task


NAME = "livebench"
JUDGMENTS = "data/**/model_judgment/ground_truth_judgment.jsonl"
BY_OTHERS = "as it was judged in the checkout before, at a commit that is not known"


def judged(checkout: Path | None, model: str) -> list[dict[str, Any]]:
    """The judgments that a checkout has of a model, by the display name that it has in LiveBench.

    Raises `DataError` for a line that is not a judgment.
    """
    folder = data_of(checkout) if checkout is not None else None
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(JUDGMENTS)) if folder is not None else ():
        for number, line in enumerate(json_lines(path.read_text(encoding="utf-8")), start=1):
            try:
                row = json.loads(line)
                if row["model"].lower() == model.lower():
                    score = score_of(row)
                    if score is not None or row["question_id"] not in found:  # the last one that is judged counts
                        found[row["question_id"]] = {**row, "score": score, "how": BY_OTHERS}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"line {number} of {str(path)!r} is not a judgment of LiveBench: {error!r}.") from None
    return list(found.values())


def data_of(checkout: Path) -> Path:
    """The folder of a checkout that has its data; a folder with the data in it may be named as the checkout."""
    return checkout / NAME if (checkout / NAME).is_dir() else checkout


def score_of(row: Mapping[str, Any]) -> float | None:
    """The score of a judgment, 0 to 1; `None` for -1, which says that it was not judged. Raises `ValueError` for others."""
    score = float(row["score"])
    if score == -1:
        return None
    if not 0 <= score <= 1:
        raise ValueError(f"a score of {score}, which is not between 0 and 1")
    return score


def items(rows: Iterable[Mapping[str, Any]]) -> list[Item]:
    """The items of judged questions, those of `judged` or of `judge`, sorted by their ids.

    Their weights give each category the same share of the pooled mean, and each task the same share of its category, as
    show_livebench_result.py does.
    """
    found = sorted(rows, key=lambda row: str(row["question_id"]))
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in (row for row in found if row["score"] is not None):
        counts[row["category"]][row["task"]] += 1
    made = []
    for row in found:
        tasks = counts[row["category"]]
        shares = len(counts) * len(tasks) * tasks[row["task"]]
        weight = 1 / shares if row["score"] is not None else 0.0
        name = str(row["question_id"])
        prompt = f"{row['category']}, {row['task']}: {name}"
        text, harm = row.get("text") or "", row.get("harm", "")
        made.append(Item(name, prompt, row["score"], 1, None, None, text, weight, how=row["how"], harm=harm))
    return made


def settle(tasks: Sequence[Task], checkout: Path | None, models: Iterable[str]) -> list[Task]:
    """The tasks, with LiveBench as one whose scripts are run unless the checkout has judgments of all models."""
    read = all(judged(checkout, model) for model in models) if any(task.name == NAME for task in tasks) else True
    return [task if read or task.name != NAME else replace(task, answer="scripted") for task in tasks]


def notes(found: Mapping[str, Sequence[Item]]) -> list[str]:
    """What is to be said of the items of each model: by which commit, what has no score, and which answers did harm."""
    hows = {items[0].how for items in found.values()}
    lines = [f"livebench: {hows.pop()}."] if len(hows) == 1 else []
    for model, of_model in found.items():
        missing = [item for item in of_model if item.score is None]
        failed = sum(not item.text and not item.how.startswith(BY_OTHERS) for item in missing)
        for count, why in (
            (failed, "its server failed. They count as nothing, and the same command asks them again."),
            (
                len(missing) - failed,
                "LiveBench has not judged them (-1). They count as nothing, and are not judged again.",
            ),
        ):
            if count:
                lines.append(f"livebench: {count} of {len(of_model)} questions have no score of {model}, as {why}")
        lines += [
            f"livebench: the answer of {model} to {item.key} has ended the judging of its category, and counts as wrong: "
            f"{item.harm}"
            for item in of_model
            if item.harm
        ]
    return lines
