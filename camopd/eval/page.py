"""The table of an evaluation, as Markdown blocks: first what came back and what broke, then the scores, then the items."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import atomic
from ..report import page
from ..results import EVAL, score
from .compare import RESULT, START
from .gaps import Row, table_of
from .paper import beside


SHOWN = 5  # items of a list; eval.json has all
LENGTH = 300  # characters of a text on the page
LISTS = {"broke": "broke", "came back": "came_back"}  # of items that changed: what the page calls them, and eval.json
ITEMS = f"Prompts and answers are shown as they were written, with any Markdown in them, up to {LENGTH} characters of each."


def write(
    rows: Sequence[dict[str, Any]],
    notes: Sequence[str],
    about: Mapping[str, Any],
    out: Path,
    paper: str | None = None,
    gaps: Sequence[Row] = (),
) -> list[str]:
    """Write eval.json, eval.md and eval.html, and return the blocks that say it in short, for the terminal.

    `rows` are those of `compare`, `notes` what a reader must know of the protocol, `about` models and settings, and
    `paper` the table of the paper that one's own numbers are to stand beside, `gaps` the rows of the task without labels.
    """
    out.mkdir(parents=True, exist_ok=True)
    short = [*summary(rows), *([SCORES, page.table(score_rows(rows))] if rows else [])]
    if any("change" in row for row in rows):
        short += [CHANGES, page.table(change_rows(rows))]
    if gaps:
        first, last = gaps[0].steps
        short += [
            "**Gaps to the teachers**",
            page.table(table_of(gaps)),
            f"Held-out KL to the teachers, nats per token, steps {first} and {last}. {ABOUT_GAPS}",
        ]
    if paper is not None:
        table, differences = beside(paper, rows, about)
        short += ["**Beside the paper**", page.table(table), "\n".join(f"- {line}" for line in differences)]
    blocks = [
        "# camopd eval",
        *short,
        *([READING] if rows else []),
        *(f"- {note}" for note in notes),
        settings_of(about),
    ]
    blocks += [ITEMS] if any(row["change"][name] for row in rows if "change" in row for name in LISTS.values()) else []
    for row in rows:
        for title, name in LISTS.items():
            listed = row.get("change", {}).get(name, [])
            if listed:
                blocks.append(f"## {row['task']}: what {title}, {min(SHOWN, len(listed))} of {len(listed)}")
            for item in listed[:SHOWN]:
                blocks.append(page.quote(shortened(item["prompt"])))
                blocks.append(f"**{START}**, score {item['scores'][0]:.2g}")
                blocks.append(page.quote(shortened(item["before"])))
                blocks.append(f"**{RESULT}**, score {item['scores'][1]:.2g}")
                blocks.append(page.quote(shortened(item["after"])))
    short += _left_out(out / EVAL, {row["task"] for row in rows} | ({"gaps"} if gaps else set()))
    found = {"tasks": rows, "gaps": [row.as_json() for row in gaps], "about": about, "notes": notes}
    atomic.write(out / EVAL, json.dumps(found, indent=2, allow_nan=False) + "\n")
    atomic.write(out / "eval.md", "\n\n".join(blocks) + "\n")
    atomic.write(out / "eval.html", page.to_html("camopd eval", blocks, {}))
    return short


def _left_out(before: Path, tasks: Collection[str]) -> list[str]:
    """What is to be said of the tasks that an earlier call had in the eval.json that is to be written over."""
    try:
        found = json.loads(before.read_text(encoding="utf-8"))
        had = dict.fromkeys([*(str(row["task"]) for row in found["tasks"]), *(["gaps"] if found.get("gaps") else [])])
    except (OSError, ValueError, LookupError, TypeError):  # none, or not of ours
        return []
    gone = [task for task in had if task not in tasks]
    if not gone:
        return []
    return [
        f"The tables of {before.parent} had {', '.join(gone)}, too, and have only the tasks of this call now. The answers "
        f"are kept: with --tasks {','.join([*gone, *sorted(tasks)])} all are in one table, and no model is asked again."
    ]


def settings_of(about: Mapping[str, Any]) -> str:
    """Which models these are, who has judged, and what was cut short, as a list."""
    lines = [f"- {name}: {where}" for name, where in about.get("models", {}).items()]
    lines += [f"- judge of {task}: {by}" for task, by in about.get("judges", {}).items()]
    lines += [f"- {name}: {about[name]}" for name in ("limit", "max_tokens") if about.get(name)]
    return "\n".join(lines)


SCORES = "**Scores**, percent ± 95 % interval over items"
CHANGES = f"**From {START} to {RESULT}**, points and shares [95 % interval]"
READING = (
    "Scores are percent ± 95 % interval over items (Student's t); where all are wrong, or all right, its exact other end "
    "stands in brackets. A change has its paired 95 % interval over the same items; p is "
    "the exact McNemar test: how often as uneven a split of the items that changed comes by chance. A task is called "
    "better or worse where 0 is outside the interval and p below 0.05. *Back* is the share of the way from the start to "
    "the general teacher that the result has gone, *kept* the share of the start's lead over the general teacher that the "
    "result still has. Where the items cannot tell start and teacher apart there is no share."
)


ABOUT_GAPS = (
    "Intervals are 95 %, by the paired bootstrap over prompts. On the general branch the gap is to go; on the domain's, "
    "which begins at its teacher, it is to stay small."
)


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence per task, as a list."""
    lines = []
    for row in rows:
        if "change" not in row:
            continue
        change = row["change"]
        verdict = "better" if change["value"] > 0 else "WORSE"
        if not is_sure(change):
            verdict = "no more than chance shows"
        lines.append(
            f"- **{row['task']}** ({row['side']}): {verdict}. {signed(change)} points; {len(change['came_back'])} of "
            f"{change['items']} items came back, {len(change['broke'])} broke."
        )
    return ["\n".join(lines)] if lines else []


def is_sure(change: Mapping[str, Any]) -> bool:
    """Whether a change is more than chance: 0 is outside its interval, and p is below 0.05.

    The bootstrap alone is too sure of few changes: of those it draws again, none goes the other way. Scores between 0 and 1
    have no p, but of n items that changed no test has a smaller one than 2 / 2^n, that of as many coins on one side.
    """
    changed = len(change["came_back"]) + len(change["broke"])
    p = change.get("p", 2.0 ** (1 - changed))
    return bool(p < 0.05 and (change["low"] > 0 or change["high"] < 0))


def score_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table of scores: a row per task, a column per model."""
    models = list(rows[0]["models"]) if rows else []
    judged = any("unjudged" in found for row in rows for found in row["models"].values())
    table = [["task", *models, "items", "cut off", "no answer", *(["no verdict"] if judged else [])]]
    for row in rows:
        found = row["models"]
        table.append(
            [row["task"], *(score(found[name]) for name in models), items_of(row)]
            + [" / ".join(percent(found[name][share]) for name in models) for share in ("truncated", "unparsed")]
            + ([" / ".join(f"{found[name].get('unjudged', 0):.0%}" for name in models)] if judged else [])
        )
    return table


def items_of(row: Mapping[str, Any]) -> str:
    """`198 of 198 x 4`: the items that a task's scores are of, and the repeats of each; a number for each model where they
    differ, as with a judge that had no verdict."""
    counts = [str(found["items"]) for found in row["models"].values()]
    repeats = max(found["repeats"] for found in row["models"].values())
    shown = counts[0] if len(set(counts)) == 1 else " / ".join(counts)
    return shown + (f" of {row['size']}" if row["size"] else "") + (f" x {repeats}" if repeats > 1 else "")


def change_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table of changes from start to result."""
    table = [["task", "change", "came back", "broke", "p", "back or kept"]]
    for row in rows:
        change = row.get("change")
        if change is None:
            continue
        p = f"{change['p']:.2g}" if "p" in change else "-"
        counts = [str(len(change[name])) for name in ("came_back", "broke")]
        table.append([row["task"], signed(change), *counts, p, of_share(row)])
    return table


def percent(share: float | None) -> str:
    """`41%`, or `-` for a share that nobody has counted."""
    return "-" if share is None else f"{share:.0%}"


def signed(interval: Mapping[str, float]) -> str:
    """`+3.1 [-0.2, +6.4]`, percent."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * interval[name] for name in ("value", "low", "high")))


def of_share(row: Mapping[str, Any]) -> str:
    """`back 55 % [20, 90]`, or why there is none."""
    if "share" not in row:
        return "-"
    found = row["share"]
    word = "back" if row["side"] == "general" else "kept"
    if found.get("ahead"):
        return (
            "nothing lost: the start is ahead" if row["side"] == "general" else "no lead to keep: the teacher is ahead"
        )
    if found.get("alike"):
        return f"{word} {100 * found['value']:.0f} %, as no item differs"
    if found["low"] is None:
        return "start and teacher not told apart"
    return "{} {:.0f} % [{:.0f}, {:.0f}]".format(word, *(100 * found[name] for name in ("value", "low", "high")))


def shortened(text: str) -> str:
    """At most `LENGTH` characters of a text, and how many it has."""
    return text if len(text) <= LENGTH else f"{text[:LENGTH]} ... ({len(text)} characters)"
