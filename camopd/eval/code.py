"""Tasks whose answers are code: the program of an answer, and what became of it in the cage."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import cage, live_code, verdicts


def program_of(row: Mapping[str, Any]) -> str | None:
    """The program that tests an answer of HumanEval or LiveCodeBench; `None` for an answer without any code.

    HumanEval: the code is the first block of the answer, or all of it. It goes behind the function's head, as a model may
    give the body alone; one that writes the whole function writes over the head.
    """
    gold = json.loads(row["gold"])
    text = verdicts.after_thinking(row["text"])
    if text is None:
        return None
    if "evaluation_sample" in gold:
        source = live_code.code_in(text)
        return live_code.program_of(source, gold) if source and source.strip() else None
    block = re.search(r"```[ \t]*(?:[Pp]ython3?|py)[ \t]*\n(.*?)(```|\Z)", text, re.DOTALL)
    block = block or re.search(r"```[ \t]*\w*[ \t]*\n(.*?)(```|\Z)", text, re.DOTALL)
    code = block.group(1) if block else text
    if not code.strip():
        return None
    return f"{gold['prompt']}{code}\n{gold['test']}\ncheck({gold['entry_point']})\n"


def judge(
    folder: Path, rows: Sequence[Mapping[str, Any]], tick: Callable[..., None] = lambda steps=1: None
) -> list[verdicts.Verdict]:
    """For each answer whether it `passed` and `how` it ended, from an earlier call or by running it; kept in `folder`.

    Raises `CaMOPDError` where there is no cage.
    """
    found = cage.find()

    def ask(row: Mapping[str, Any]) -> verdicts.Verdict:
        program = program_of(row)
        if program is None:
            return {"passed": False, "how": "no code"}
        gold = json.loads(row["gold"])
        seconds = live_code.seconds_of(gold) if "evaluation_sample" in gold else cage.SECONDS
        passed, how = cage.run(program, found, seconds, lambda: tick(0))
        return {"passed": passed, "how": how}

    return verdicts.collect(folder, rows, f"cage: {cage.about(found)}", ask, max(1, (os.cpu_count() or 1) // 2), tick)
