"""Verdicts on answers, of a cage or of a model that judges: each is written as it comes, and none is asked for twice."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import json_lines
from .runner import cut_torn_line
from .together import together


VERDICTS = "verdicts.jsonl"
Verdict = dict[str, Any]


def after_thinking(text: str) -> str | None:
    """What follows the model's reasoning; `None` where that never ends, and nothing in it is an answer.

    >>> after_thinking("<think>maybe C</think>B"), after_thinking("so</think>B"), after_thinking("<think>maybe ANSWER: C")
    ('B', 'B', None)
    """
    _, end, after = text.rpartition("</think>")
    rest = after if end else text
    return None if "<think>" in rest else rest


def collect(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    by: str,
    ask: Callable[[Mapping[str, Any]], Verdict],
    workers: int,
    tick: Callable[..., None] = lambda steps=1: None,
    end: Callable[[], None] = lambda: None,
) -> list[Verdict]:
    """A verdict for each answer, in order: the one that `folder` has of the same answer by the same judge, or a new one.

    A verdict with the key `failed` is none: it is kept, and asked for again by the next call. `tick` is called after each,
    and with 0 in between; what it or `ask` raises ends the call, and finished verdicts are kept. `end`: see `together`.
    """
    path = folder / VERDICTS
    kept: dict[str, Verdict] = {}
    if path.exists():
        cut_torn_line(path)
        lines = json_lines(path.read_text(encoding="utf-8"))
        for line in map(json.loads, lines):
            if "failed" not in line or "failed" in kept.get(line["answer"], line):
                kept[line["answer"]] = line
    seen: Counter[tuple[str, ...]] = Counter()
    numbered = []  # repeats may have one text, and each has a verdict of its own
    for row in rows:
        told = (by, row["prompt"], row["gold"], row["text"])
        numbered.append((row, [*told, *([seen[told]] if seen[told] else [])]))
        seen[told] += 1
    lock = threading.Lock()

    def one(asked: tuple[Mapping[str, Any], list[Any]]) -> Verdict:
        row, told = asked
        answer = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]
        found = kept.get(answer)
        if found is None or "failed" in found:
            found = {"answer": answer, "by": by, **ask(row)}
            with lock, open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
        tick()
        return found

    return together(one, numbered, workers, lambda: tick(0), end)
