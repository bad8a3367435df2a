"""Models side by side on the same items: scores, what came back, what broke, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import mul
from typing import Any

from ..errors import CaMOPDError
from ..verdict import unseen
from .scores import Item
from .stats import Interval, difference, exact_mcnemar, mean_and_error, share
from .tasks import Task


START, GENERAL, RESULT = "start", "general", "result"  # names of models that the comparison is about
Found = Mapping[str, Mapping[str, Sequence[Item]]]  # items by model and task


def compare(tasks: Sequence[Task], found: Found) -> list[dict[str, Any]]:
    """What is said of each task, in a form that JSON takes.

    `models` has the numbers of each model. With models named `start` and `result` there is `change`, from one to the other;
    with `general` too, `share`: on a task of the general side how much of what the start had lost is back, on one of the
    domain's how much of what the start is ahead by is kept.

    Raises `CaMOPDError` where models were not asked the same items.
    """
    rows = []
    for task in tasks:
        of_task = {model: items[task.name] for model, items in found.items()}
        check_same_items(task, of_task)
        row: dict[str, Any] = {"task": task.name, "side": task.side, "size": task.size}
        row["models"] = {model: numbers(task, items) for model, items in of_task.items()}
        if pairs := scored(of_task, START, RESULT):
            row["change"] = change(*pairs)
            first, last = (START, GENERAL) if task.side == "general" else (GENERAL, START)
            if three := scored(of_task, first, last, RESULT):
                row["share"] = share_of_way(*map(scores, three))
        rows.append(row)
    return rows


def share_of_way(zero: list[float], one: list[float], found: list[float]) -> dict[str, Any]:
    """`stats.share`, without an interval where `found` is `zero` or `one` on every item (`alike`): that no item shows a
    difference does not show that there is none. No share of a way that leads down (`ahead`): `zero` is better than `one`,
    and what is worse than both would be a large one."""
    result = as_json(share(zero, one, found))
    if result["low"] is None:  # the two ends are not told apart
        return result
    if sum(one) < sum(zero):
        return {"value": None, "low": None, "high": None, "ahead": True}
    return result | {"low": None, "high": None, "alike": True} if found in (zero, one) else result


def scored(of_task: Mapping[str, Sequence[Item]], *names: str) -> list[list[Item]]:
    """The items of these models, those that have a score by all of them; none where a model or every item is missing."""
    if not all(name in of_task for name in names):
        return []
    together = [items for items in zip(*(of_task[name] for name in names), strict=True) if None not in scores(items)]
    return [list(items) for items in zip(*together, strict=True)]


def scores(items: Sequence[Item]) -> list[Any]:
    return [item.score for item in items]


def check_same_items(task: Task, of_task: Mapping[str, Sequence[Item]]) -> None:
    """Raise `CaMOPDError` unless all models have the same items in the same order."""
    first, *others = of_task
    wanted = [item.key for item in of_task[first]]
    for other in others:
        keys = [item.key for item in of_task[other]]
        if keys != wanted:
            missing = len(set(wanted) - set(keys))
            raise CaMOPDError(
                f"{first!r} and {other!r} were not asked the same items of {task.name}: {len(wanted)} and {len(keys)} "
                f"items, {missing} of the first not among the second's. Scores of different items are not compared: "
                "evaluate both anew with the same rows, --limit and --out."
            )


def asked_otherwise(tasks: Sequence[Task], found: Found) -> list[str]:
    """A line for each task that was not asked of all models in the same way."""
    lines = []
    for task in tasks:
        hows = {model: items[task.name][0].how for model, items in found.items()}
        if len(set(hows.values())) > 1:
            of_each = "; ".join(f"{model} {how}" for model, how in hows.items())
            lines.append(
                f"{task.name} was asked of {of_each}. Scores differ by that, too, and not by the models alone."
            )
    return lines


def numbers(task: Task, items: Sequence[Item]) -> dict[str, Any]:
    """The numbers of a model on a task; shares are over items."""
    having = [score for score in scores(items) if score is not None]
    mean, error = mean_and_error(having)
    weights = [item.weight for item in items if item.score is not None]
    parts = [item.parts for item in items if item.parts is not None]
    pooled = sum(map(mul, having, weights)) / sum(weights) if set(weights) - {1.0} else None
    return {
        "mean": None if math.isnan(mean) else mean,
        "standard_error": None if math.isnan(error) else error,
        "items": len(having),
        "repeats": items[0].repeats,
        "truncated": share_of([item.truncated for item in items]),
        "unparsed": share_of([item.unparsed for item in items]),
        **({} if pooled is None else {"pooled": pooled}),
        **(of_parts(parts) if parts else {}),
        **({"unjudged": sum(item.unjudged for item in items) / len(items)} if task.judged else {}),
    }


def of_parts(parts: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The mean of each part of a score over items, and its standard error."""
    found = {name: mean_and_error([part[name] for part in parts]) for name in parts[0]}
    return {
        "parts": {name: mean for name, (mean, _) in found.items()},
        "parts_standard_error": {name: None if math.isnan(error) else error for name, (_, error) in found.items()},
    }


def share_of(shares: Sequence[float | None]) -> float | None:
    """The mean of the items' shares; `None` where they have none."""
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def change(before: Sequence[Item], after: Sequence[Item]) -> dict[str, Any]:
    """Mean change with its paired interval, the items that changed, and for scores of 0 and 1 the exact test."""
    old, new = scores(before), scores(after)
    # Resamples of items of which none has changed show no change either.
    interval = difference(old, new) if old != new else Interval(0.0, -unseen(len(old)), unseen(len(old)))
    found: dict[str, Any] = {"items": len(old), **as_json(interval)}
    pairs = list(zip(before, after, strict=True))
    found["came_back"] = [brief(*pair) for pair, a, b in zip(pairs, old, new, strict=True) if b > a]
    found["broke"] = [brief(*pair) for pair, a, b in zip(pairs, old, new, strict=True) if b < a]
    if set(old) | set(new) <= {0.0, 1.0}:
        found["p"] = exact_mcnemar(old, new)[2]
    return found


def brief(before: Item, after: Item) -> dict[str, Any]:
    """An item that changed, for the list of them."""
    return {"key": after.key, "prompt": after.prompt, "scores": [before.score, after.score], "before": before.text,
            "after": after.text}  # fmt: skip


def as_json(interval: Interval) -> dict[str, Any]:
    """An interval with `None` for ends that there are not."""
    ends = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: end if math.isfinite(end) else None for name, end in ends.items()}
