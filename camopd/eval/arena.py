"""Arena-Hard v2: each answer against the baseline's, in both orders, by a judge with the official words.

Those words, the prompts and the baselines' answers are read from a checkout of arena-hard-auto that the user names; none of
its code runs. Scores are those of its show_result.py: a strong verdict counts three times, and both games or none.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..files import json_lines
from .judge import Judge, Unusable
from .verdicts import Verdict, after_thinking


STRONG = 3  # times that a strong verdict counts
SETTINGS = Path("utils/judge_utils.py")  # from the folder that has `data`
WHAT = (
    "Arena-Hard v2 is read from a checkout of lmarena/arena-hard-auto with its data: name its question.jsonl with --data "
    "{}=CHECKOUT/data/arena-hard-v2.0/question.jsonl"
)
SHOWN = """\
<|User Prompt|>
{prompt}

<|The Start of Assistant A's Answer|>
{a}
<|The End of Assistant A's Answer|>

<|The Start of Assistant B's Answer|>
{b}
<|The End of Assistant B's Answer|>"""  # the layout of its configuration
_LABEL = re.compile(r"\[\[([AB<>=]+)\]\]")
_LONE = re.compile(r"\[([AB<>=]+)\]")  # the second of its configuration, where the first finds none
_SCORES = {
    "A>>B": (1.0, STRONG),
    "A>B": (1.0, 1),
    "A=B": (0.5, 1),
    "B>A": (0.0, 1),
    "B>>A": (0.0, STRONG),
}  # of A; times
_TURNED = {"A<B": "B>A", "A<<B": "B>>A", "B=A": "A=B", "B<A": "A>B", "B<<A": "A>>B"}


def rows_of(category: str) -> Callable[[Path], Callable[[dict[str, Any]], dict[str, Any] | None]]:
    """Makes rows of a question.jsonl into those of evalscope's `general_qa`; those of other categories are `None`."""

    def opened(path: Path) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
        settings = settings_in(path.resolve().parents[2] / SETTINGS, category)
        answers = path.parent / "model_answer" / f"{settings['baseline']}.jsonl"
        if not answers.is_file():
            raise ValueError(f"there is no {str(answers)!r}, the answers of the baseline of {category}")
        baseline = {}
        for number, line in enumerate(json_lines(answers.read_text(encoding="utf-8")), start=1):
            try:
                if line.strip():
                    row = json.loads(line)
                    baseline[row["uid"]] = row["messages"][-1]["content"]["answer"]
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {str(answers)!r} is not an answer of a baseline: {error!r}"
                ) from None

        def convert(row: dict[str, Any]) -> dict[str, Any] | None:
            missing = [name for name in ("uid", "category", "prompt") if name not in row]
            if missing:
                raise ValueError(f"has no column {missing[0]!r}, only {sorted(row)}")
            if row["category"] != category:
                return None
            if row["uid"] not in baseline:
                raise ValueError(
                    f"has the uid {row['uid']!r}, which the baseline {settings['baseline']} has not answered"
                )
            gold = {"baseline": baseline[row["uid"]], "system": settings["system_prompt"]}
            return {"query": row["prompt"], "response": json.dumps(gold)}

        return convert

    return opened


def settings_in(path: Path, category: str) -> dict[str, str]:
    """The judge's system prompt and the baseline's name for a category, from the file's literals. Raises `ValueError`."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }

        class Named(ast.NodeTransformer):
            def visit_Name(self, node: ast.Name) -> ast.AST:
                return known[node.id]

        found = ast.literal_eval(Named().visit(known["JUDGE_SETTINGS"]))[category]
        return {name: str(found[name]) for name in ("baseline", "system_prompt")}
    except (OSError, SyntaxError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the judge's words for {category} cannot be read from {str(path)!r} ({type(error).__name__}: {error})"
        ) from None


def compare(judge: Judge, row: Mapping[str, Any]) -> Verdict:
    """The score of an answer against the baseline's, and its weight: how many times its two verdicts count together."""
    gold = json.loads(row["gold"])
    prompt = row["prompt"].removeprefix("user: ")
    text = after_thinking(row["text"])
    if text is None or not text.strip():
        return {"score": 0.0, "weight": 2 * STRONG, "games": []}
    games, counted = [], []
    for order in ((gold["baseline"], text), (text, gold["baseline"])):
        shown = SHOWN.format(prompt=prompt, a=order[0], b=order[1])
        messages = [{"role": "system", "content": gold["system"]}, {"role": "user", "content": shown}]
        found = judge.ask(messages, 0.0, label_of)
        games.append(found)
        if "failed" in found:
            return {"failed": found["failed"], "games": games}
        counted.append(_SCORES[found["label"]])
    (of_baseline, first), (of_answer, second) = counted
    weight = first + second
    return {"score": ((1 - of_baseline) * first + of_answer * second) / weight, "weight": weight, "games": games}


def label_of(reply: str) -> Verdict:
    """The last verdict of a reply, in one spelling. Raises `Unusable` without one.

    >>> label_of("It is [[A=B]]. No: [[a<<b]]")
    {'label': 'B>>A'}
    """
    found = _LABEL.findall(reply.upper()) or _LONE.findall(reply.upper())
    label = _TURNED.get(found[-1], found[-1]) if found else None
    if label not in _SCORES:
        raise Unusable(f"no verdict in {reply[-200:]!r}")
    return {"label": label}
