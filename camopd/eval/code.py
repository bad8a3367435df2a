"""Tasks whose answers are code: the program of an answer, and what became of it in the cage."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import atomic
from . import cage


VERDICTS = "verdicts.json"


def program_of(row: Mapping[str, Any]) -> str | None:
    """The program that tests an answer of HumanEval; `None` for an answer without any code.

    The code is the first block of the answer, or all of it. It goes behind the function's head, as a model may give the
    body alone; one that writes the whole function writes over the head.
    """
    gold = json.loads(row["gold"])
    _, end, after = row["text"].rpartition("</think>")
    text = after if end else row["text"]
    if "<think>" in text:
        return None
    block = re.search(r"```\w*\n(.*?)(```|\Z)", text, re.DOTALL)
    code = block.group(1) if block else text
    if not code.strip():
        return None
    return f"{gold['prompt']}{code}\n{gold['test']}\ncheck({gold['entry_point']})\n"


def judge(folder: Path, rows: Sequence[Mapping[str, Any]], tick: Callable[[], None] = lambda: None) -> list[list[Any]]:
    """For each answer whether it passed and how it ended, from an earlier call or by running it; kept in `folder`.

    Raises `CaMOPDError` where there is no cage.
    """
    path = folder / VERDICTS
    if path.is_file():
        return list(json.loads(path.read_text(encoding="utf-8")))
    found = cage.find()

    def one(row: Mapping[str, Any]) -> list[Any]:
        program = program_of(row)
        verdict = [False, "no code"] if program is None else list(cage.run(program, found))
        tick()
        return verdict

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        verdicts = list(pool.map(one, rows))
    atomic.write(path, json.dumps(verdicts) + "\n")
    return verdicts
