"""Answers into scores of items: what counts as an answer, what was cut off, and which item is which."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import json_lines
from . import distraction
from .code import program_of
from .tasks import LETTERS, Task
from .verdicts import after_thinking


# The last one counts. Whatever follows the letter must not make a word of it, as in "Final answer: A cat".
_SIGNS = r"[\s*_$`\"'\u201c\u201d\u2018\u2019]*+"
_OPEN = r"(?:[\s*_$`\"'\u201c\u201d\u2018\u2019\[(]|\\[(\[]|\\(?:boxed|text|math)[a-z]*\s*\{)*+"  # \(\textbf{C}\)
_CLOSE = r"(?:[\s*_$`\"'\u201c\u201d\u2018\u2019\])}.:]|\\[)\]])*+"
_SAID = rf"(?:(?i:is)?{_SIGNS}:?|(?:(?i:is){_SIGNS}:?|:){_SIGNS}(?i:option|choice)[ \t])"
_LETTER = r"(?:[AI](?![ \t]+(?!because\b|since\b)[a-z])|[B-HJ])(?![_'\u2019]*[^\W_]|-[a-z])"
_FINAL = re.compile(rf"(?i:(final[ \t]+)?answer){_SIGNS}{_SAID}{_OPEN}({_LETTER})")
_BEHIND = re.compile(r"[*_`)\]]*[ \t]+[a-z]")  # a sentence goes on behind the letter
_SAYS = re.compile(r"(?i:answer\W*is\b)|[:\n]")  # what stands between the word and the letter that it gives
_NAME = re.compile(r"\.[ \t]+[a-z]")  # behind a letter, as in "E. coli"
# "A, B", "A/B", "A or B", "A B": no answer, since each of them would count as right.
_SECOND = re.compile(
    rf"{_CLOSE}(?:(?<=[ \t])(?:(?i:and|or)[ \t]+)|[,/&+][ \t]*(?:(?i:and|or)[ \t]+)?)"
    rf"{_OPEN}(?i:option[ \t]+)?(?:[AI](?![ \t]+[a-z])|[B-HJ])(?![\w'\u2019])|(?:[ \t]+[A-J])+[ \t.]*$",
    re.MULTILINE,
)
_ALONE = re.compile(rf"{_OPEN}([A-J])(?:{_CLOSE}|\)[^\n]*)")  # the whole text: "C", "(C).", "C) an option"
CUT = "max_tokens"  # evalscope's word for an answer that the limit has ended


@dataclass(frozen=True)
class Item:
    """One row of a task for one model, its repeats together."""

    key: str  # the same for all models: of prompt and gold
    prompt: str
    score: float | None  # mean over the repeats that have one, 0 to 1; `None` where none of them has
    repeats: int
    truncated: float | None  # share of the repeats; `None` where nobody has said
    unparsed: float | None  # share of the repeats that hold no answer, which count as wrong; `None` where any is one
    text: str  # of the first repeat
    weight: float = 1.0  # in the pooled mean of a benchmark that has one
    parts: Mapping[str, float] | None = None  # of the score, in percent, where a benchmark has several
    unjudged: float = 0.0  # share of the repeats for which the judge gave no verdict, which count as nothing
    how: str = ""  # it was asked, where that may differ between models
    harm: str = ""  # that the answer has done to its judge, and for which it counts as wrong


def letter_of(text: str, options: int) -> str | None:
    """The letter that a text ends on as its answer, or consists of; `None` where it names none of the `options`.

    >>> letter_of("So it is B or C. **Final answer: (C)**", 4), letter_of("B", 4), letter_of("A cat", 4)
    ('C', 'B', None)
    """
    found, asked_for = [], False
    for match in _FINAL.finditer(text):
        # Behind the form that was asked for, "the answer is E. coli" explains it, and "answer B is wrong" names another.
        named = not _SAYS.search(match[0]) and _BEHIND.match(text, match.end())
        explains = named or _NAME.match(text, match.end())
        if match[1] or not asked_for or not explains:
            found.append(None if _SECOND.match(text, match.end()) else match[2])
        asked_for |= match[1] is not None
    alone = _ALONE.fullmatch(text.strip())
    if not found and alone:
        found = [alone.group(1)]
    return found[-1] if found and found[-1] in [*LETTERS[:options]] else None


def score_of(task: Task, row: Mapping[str, Any]) -> tuple[float | None, bool]:
    """The score of an answer, 0 to 1, or `None` where its judge has failed, and whether it holds an answer at all.

    A task of letters takes the letter only where it is said to be the answer: evalscope falls back on the last capital of
    the text. What a cage or a judge says is the row's `verdict`. Elsewhere the score is evalscope's.
    """
    if task.answer == "played":
        return row["verdict"].get("score"), True
    if task.answer == "weighed":
        return row["scores"]["acc_norm"], True
    text = after_thinking(row["text"])
    if text is None or not text.strip():
        return 0.0, False
    if task.answer == "letter":
        letter = letter_of(text, options_of(row["prompt"]))
        return float(letter == row["gold"]), letter is not None
    if task.answer == "number" and not re.search(r"\d", text):
        return 0.0, False
    if task.answer == "code":
        return float(row["verdict"]["passed"]), program_of(row) is not None
    if task.answer == "rules":
        return distraction.score(json.loads(row["gold"]), text), True
    if task.answer == "verified":
        verdict = row["verdict"]
        if "failed" in verdict:
            return None, True
        answered = verdict["passed"] or verdict["extracted"].lower() not in ("", "none")
        return float(verdict["passed"]), answered
    if task.answer == "compared":
        return row["verdict"].get("score"), True
    score = row["scores"].get(task.metric)  # none where a checker could make nothing of an answer
    unparsed = score is None or bool(row["scores"].get("No answer"))  # as evalscope's ZebraLogic says
    return float(score or 0), not unparsed


def options_of(prompt: str) -> int:
    """How many letters the prompt of `LETTER_PROMPT` names."""
    return len(prompt.rpartition(" is one of ")[2].split(","))


def items_of(task: Task, rows: Sequence[Mapping[str, Any]]) -> list[Item]:
    """One `Item` per row of the task, in order, from the runner's answers."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["item"], []).append(row)
    seen: Counter[str] = Counter()
    untold = task.answer in ("played", "weighed")  # many messages and no answer, or nothing that was generated
    found = []
    for group in groups.values():
        scores = [score_of(task, row) for row in group]
        judged = [score for score, _ in scores if score is not None]
        content = json.dumps([group[0]["prompt"], group[0]["gold"]], ensure_ascii=False)
        key = hashlib.sha256(content.encode()).hexdigest()[:16]
        seen[key] += 1  # a task may have a row twice
        count = len(group)
        found.append(
            Item(
                key=f"{key}-{seen[key]}",
                prompt=group[0]["prompt"],
                score=sum(judged) / len(judged) if judged else None,
                repeats=count,
                truncated=None if untold else sum(row["stop"] == CUT for row in group) / count,
                unparsed=None if untold else sum(not answered for _, answered in scores) / count,
                text=group[0]["text"],
                weight=float(group[0].get("verdict", {}).get("weight", 1)),
                parts=_parts(task, group[0]),
                unjudged=1 - len(judged) / count,
                how=group[0].get("how", ""),
            )
        )
    return found


def _parts(task: Task, row: Mapping[str, Any]) -> Mapping[str, float] | None:
    if task.answer == "weighed":
        return {name: 100 * value for name, value in row["scores"].items()}
    if task.answer != "rules":
        return row.get("verdict", {}).get("parts")  # type: ignore[no-any-return]
    return distraction.parts(json.loads(row["gold"]), after_thinking(row["text"]) or "")


def read_answers(path: Path, opens: Callable[[], bool] = lambda: False) -> list[dict[str, Any]]:
    """Rows that the runner has written, those that were cut in their reasoning with its beginning.

    Where the chat template opens the reasoning, no answer has its beginning, and one that is cut off not its end: that
    shows in most of the other answers, or in the template, of which `opens` says whether it does.
    """
    rows = [json.loads(line) for line in json_lines(path.read_text(encoding="utf-8"))]
    cut = [row for row in rows if row.get("stop") == CUT and not re.search("</?think>", row["text"])]
    texts = [row["text"] or "" for row in rows if row.get("stop") != CUT or "</think>" in row["text"]]
    ended = [text.partition("</think>") for text in texts]  # of a failure there is none
    lone = sum(bool(end) and "<think>" not in thoughts for thoughts, end, _ in ended)
    if cut and (2 * lone > len(ended) or opens()):
        for row in cut:
            row["text"] = f"<think>{row['text']}"
    return rows
