"""LiveCodeBench: its rows without their pickles, and the program that runs an answer on the tests of one of them."""

from __future__ import annotations

import base64
import json
import pickletools
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any


SECONDS = 6  # per test, as in the official evaluation
# Answers may use these without an import, as on the sites that the problems are from.
_MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "builtins", "typing",
)  # fmt: skip
_PRELUDE = "\n".join([*(f"from {name} import *" for name in _MODULES), f"import {', '.join(_MODULES)}"])
# A process for each test: what one leaves behind, another does not see. `json` makes lists of tuples, as the gold has.
_PROGRAM = r"""
import base64, decimal, json, os, signal, sys, zlib

PRELUDE, SOURCE, NAME = {prelude!r}, {source!r}, {name!r}
TESTS = json.loads(zlib.decompress(base64.b64decode({packed!r})))

def lines(text):
    return [line.strip() for line in text.strip().split("\n")]

def equal(mine, gold):
    if mine == gold:
        return True
    try:
        return [decimal.Decimal(word) for word in mine.split()] == [decimal.Decimal(word) for word in gold.split()]
    except decimal.InvalidOperation:
        return False

def answer(given):
    sys.setrecursionlimit(50000)
    space = {{"__name__": "__main__" if NAME is None else "answer"}}
    exec(PRELUDE, space)
    exec(compile(SOURCE, "answer", "exec"), space)
    if NAME is not None:
        call = getattr(space["Solution"](), NAME) if "Solution" in space else space[NAME]
        found = call(*[json.loads(line) for line in given.split("\n")])
        with open("found", "w") as file:
            json.dump(found, file)

def passed(test):
    for path, text in (("given", test["input"]), ("said", ""), ("found", "null")):
        with open(path, "w") as file:
            file.write(text)
    child = os.fork()
    if child == 0:
        signal.alarm({seconds})
        os.dup2(os.open("given", os.O_RDONLY), 0)
        os.dup2(os.open("said", os.O_WRONLY), 1)
        sys.stdin, sys.stdout = open(0), open(1, "w")
        try:
            answer(test["input"])
        except SystemExit:
            pass
        sys.stdout.flush()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        return "out of time" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else "failed"
    if NAME is not None:
        with open("found") as file:
            return json.load(file) == json.loads(test["output"]) or "wrong answer"
    with open("said") as file:
        mine, gold = lines(file.read()), lines(test["output"])
    return len(mine) == len(gold) and all(map(equal, mine, gold)) or "wrong answer"

for number, test in enumerate(TESTS):
    how = passed(test)
    if how is not True:
        sys.exit(f"test {{number + 1}} of {{len(TESTS)}}: {{how}}")
"""


def between(first: str, last: str) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    """Rows of contests from `first` to `last` (ISO dates or times) as evalscope reads them; others are `None`.

    evalscope unpickles private tests that are packed; it is shown one "test", which holds all of them packed without.
    """

    def convert(row: dict[str, Any]) -> dict[str, Any] | None:
        missing = [name for name in _COLUMNS if row.get(name) is None]
        if missing:
            raise ValueError(f"has no column {missing[0]!r}, only {sorted(row)}")
        date = str(row["contest_date"]).replace(" ", "T")
        if not first <= date <= last:
            return None
        found = unpacked(row["public_test_cases"]) + unpacked(row["private_test_cases"])
        if not found:
            raise ValueError("has no tests")
        content = json.dumps([{"input": test["input"], "output": test["output"]} for test in found]).encode()
        packed = base64.b64encode(zlib.compress(content, 9)).decode()
        return {
            "question_content": row["question_content"], "starter_code": row["starter_code"],
            # With hyphens the reader of JSON makes a date of the text, which evalscope does not take.
            "contest_date": date[:10].replace("-", ""), "metadata": row["metadata"], "public_test_cases": "[]",
            "private_test_cases": json.dumps([{"input": packed, "output": ""}]),
        }  # fmt: skip

    return convert


_COLUMNS = ("question_content", "starter_code", "contest_date", "metadata", "public_test_cases", "private_test_cases")


def unpacked(text: str) -> list[dict[str, str]]:
    """The tests of a column: JSON, or that as text in a pickle, compressed, in base64. Nothing is unpickled.

    Raises `ValueError` for anything else.
    """
    try:
        found = json.loads(text)
    except ValueError:
        try:
            pickled = zlib.decompress(base64.b64decode(text))
            (content,) = [value for _, value, _ in pickletools.genops(pickled) if isinstance(value, str)]
            found = json.loads(content)
        except (ValueError, zlib.error, struct.error) as error:
            raise ValueError(f"has tests that cannot be read ({type(error).__name__}: {str(error)[:100]})") from None
    if not isinstance(found, list) or not all(
        isinstance(test, dict) and {"input", "output"} <= set(test) for test in found
    ):
        raise ValueError("has tests that are not a list of inputs and outputs")
    return found


def code_in(text: str) -> str | None:
    """The last block of code of an answer, as the official evaluation takes it; `None` without a whole one."""
    lines = text.split("\n")
    fences = [place for place, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else None


def program_of(source: str, gold: Mapping[str, Any]) -> str:
    """The program that comes to its end when `source` passes all tests of a row."""
    sample = json.loads(gold["evaluation_sample"])
    (packed,) = sample["inputs"]
    return _PROGRAM.format(prelude=_PRELUDE, source=source, name=sample["fn_name"], packed=packed, seconds=SECONDS)


def seconds_of(gold: Mapping[str, Any]) -> float:
    """How long all tests of a row may take together."""
    (packed,) = json.loads(gold["evaluation_sample"])["inputs"]
    return (SECONDS + 1.0) * len(json.loads(zlib.decompress(base64.b64decode(packed))))
