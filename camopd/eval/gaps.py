"""The task without labels: how far a run's student is from its teachers, category by category, before and after.

From `held_out.jsonl`, in which a run has written the sampled reverse KL of each held-out prompt. Nothing is generated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..measured import HELD_OUT, in_hand, lines_of
from .stats import Interval, difference, share


NAME = "gaps"  # among the tasks
ALL = "all"


@dataclass(frozen=True)
class Row:
    """One category of a branch's held-out prompts, in nats per token; values are means over prompts."""

    branch: str
    category: str
    prompts: int
    steps: tuple[int, int]  # of the two evaluations
    before: float
    after: float
    change: Interval
    gone: Interval  # share of the gap before that is gone

    def as_json(self) -> dict[str, Any]:
        """The row with intervals as [value, low, high], `None` where there is none."""
        found = asdict(self)
        for name in ("change", "gone"):
            found[name] = [end if math.isfinite(end) else None for end in found[name].values()]
        return found


def of_run(folder: Path) -> list[Row]:
    """A row for each branch, and for each of its categories where prompts have several.

    The first evaluation is that before the first step, the second the last one of the same prompts, of the model that the
    run has left: the best one, where that was loaded at the end. Raises `ValueError`
    where the run has not measured both.
    """
    lines = in_hand(lines_of(folder / HELD_OUT))
    rows = [
        row for branch in dict.fromkeys(line["branch"] for line in lines) for row in _of_branch(str(branch), lines)
    ]
    if not rows:
        raise ValueError(
            f"{str(folder / HELD_OUT)!r} has no evaluation before the first step with a later one of the same prompts. "
            "Train with eval_prompts, eval_strategy: steps and eval_on_start: true."
        )
    return rows


def _of_branch(branch: str, lines: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    own = [line for line in lines if line["branch"] == branch]
    first = next((line for line in own if line["step"] == 0), None)
    later = [line for line in own if first is not None and line["step"] > 0 and line["of"] == first["of"]]
    if first is None or not later:
        return
    last = later[-1]
    before, after = first["kl_by_prompt"], last["kl_by_prompt"]
    categories = [str(name) for name in first.get("category_by_prompt", [""] * len(before))]
    both = [place for place in range(len(before)) if before[place] is not None and after[place] is not None]
    names = sorted({categories[place] for place in both})
    for name in [None, *(names if len(names) > 1 else ())]:  # None: all of them, as a category may be called anything
        places = [place for place in both if name in (None, categories[place])]
        if len(places) < 2:  # no interval
            continue
        old, new = ([values[place] for place in places] for values in (before, after))
        yield Row(
            branch, ALL if name is None else name, len(places), (first["step"], last["step"]),
            sum(old) / len(old), sum(new) / len(new),
            difference(old, new), share(old, [0.0] * len(old), new),
        )  # fmt: skip


def table_of(rows: Sequence[Row]) -> list[list[str]]:
    """The rows as text: a head, and one for each."""
    found = [["branch", "category", "prompts", "KL before", "KL after", "change", "share of the gap that is gone"]]
    for row in rows:
        change = "{:+.3f} [{:+.3f}, {:+.3f}]".format(row.change.value, row.change.low, row.change.high)  # noqa: UP032
        told = row.gone.low > float("-inf")
        gone = f"{row.gone.value:.0%} [{row.gone.low:.0%}, {row.gone.high:.0%}]" if told else "no gap before"
        cells = [f"{row.before:.3f}", f"{row.after:.3f}", change, gone]
        found.append([row.branch, row.category, str(row.prompts), *cells])
    return found
