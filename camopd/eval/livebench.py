"""LiveBench: the judgments that its own scripts have written into a checkout, as items of a task.

They are not run from here: they run code that models have written where they are, without a cage. What is missing is said
with the commands that make it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import json_lines
from .scores import Item


JUDGMENTS = "data/**/model_judgment/ground_truth_judgment.jsonl"
RELEASE = "2024-11-25"


def items_of(checkout: Path | None, model: str) -> list[Item]:
    """The questions of a model, by the display name that it has in LiveBench, with its scores.

    Their weights give each category the same share of the pooled mean, and each task the same share of its category, as
    show_livebench_result.py does. Raises `DataError` where there are none.
    """
    folder = checkout / "livebench" if checkout is not None and (checkout / "livebench").is_dir() else checkout
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(JUDGMENTS)) if folder is not None else ():
        for number, line in enumerate(json_lines(path.read_text(encoding="utf-8")), start=1):
            try:
                row = json.loads(line)
                if row["model"].lower() == model.lower():
                    score = None if row["score"] == -1 else float(row["score"])  # -1: not judged
                    if score is not None or row["question_id"] not in found:  # the last one that is judged counts
                        found[row["question_id"]] = {**row, "score": score}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"line {number} of {str(path)!r} is not a judgment of LiveBench: {error!r}.") from None
    if not found:
        options = f"--model-display-name {model} --livebench-release-option {RELEASE} --bench-name live_bench"
        what = "no checkout of LiveBench is named" if folder is None else f"{str(folder)!r} has no judgments"
        raise DataError(
            f"{what} for the model {model!r}. Run there, in its own environment and where code of models may run, `python "
            f"gen_api_answer.py --model SERVED_NAME --api-base URL/v1 --force-temperature 0 --max-tokens 32768 {options}` "
            f"and `python gen_ground_truth_judgment.py --model SERVED_NAME {options}`, and add "
            "--data livebench=CHECKOUT."
        )
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in (row for row in found.values() if row["score"] is not None):
        counts[row["category"]][row["task"]] += 1
    items = []
    for name, row in sorted(found.items()):
        tasks = counts[row["category"]]
        shares = len(counts) * len(tasks) * tasks[row["task"]]
        weight = 1 / shares if row["score"] is not None else 0.0
        prompt = f"{row['category']}, {row['task']}: {name}"
        items.append(Item(name, prompt, row["score"], 1, None, None, "", weight))
    return items
