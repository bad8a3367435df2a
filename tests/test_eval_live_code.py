"""LiveCodeBench (camopd/eval/live_code.py): its rows, and answers on their tests. The cage is test_eval_cage.py's."""

import base64
import json
import pickle
import subprocess
import sys
import zlib

import pytest

from camopd.eval import cage, code, live_code
from camopd.eval.live_code import between, code_in, unpacked


SUM = [{"input": "1 2\n", "output": "3\n"}, {"input": "2.50 1\n", "output": "3.5"}]
PLAIN = "a, b = input().split()\nprint(float(a) + float(b))\n"


class Bomb:
    """Unpickling it ends the process."""

    def __reduce__(self):
        return sys.exit, (3,)


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def row(public=(), private=(), name=None, date="2024-09-01T00:00:00", starter=""):
    return {"question_content": "Add.", "starter_code": starter, "contest_date": date, "question_id": "x",
            "metadata": json.dumps({} if name is None else {"func_name": name}),
            "public_test_cases": json.dumps(list(public)),
            "private_test_cases": private if isinstance(private, str) else json.dumps(list(private))}  # fmt: skip


def gold(tests, name=None):
    """As evalscope makes it of a converted row."""
    converted = between("2024", "2025")(row(public=tests, name=name))
    (shown,) = json.loads(converted["private_test_cases"])
    return {"evaluation_sample": json.dumps({"inputs": [shown["input"]], "outputs": [""], "fn_name": name})}


def test_tests_are_read_packed_or_plain_and_never_unpickled():
    assert unpacked(json.dumps(SUM)) == unpacked(packed(json.dumps(SUM))) == SUM
    for text in (packed(Bomb()), packed(7), "?", base64.b64encode(b"x").decode(), '{"a": 1}', '[{"input": ""}]'):
        with pytest.raises(ValueError, match="has tests that"):
            unpacked(text)


def test_rows_are_those_of_the_dates_and_hold_all_their_tests():
    convert = between("2024-08-01", "2025-02-01T00:00:00")
    dates = ("2024-07-31T00:00:00", "2024-08-01T00:00:00", "2025-02-01 00:00:00", "2025-02-01T12:00:00")
    assert [convert(row(SUM, date=date)) is not None for date in dates] == [False, True, True, False]
    one, two = convert(row(SUM[:1], packed(json.dumps(SUM[1:])))), convert(row(SUM))
    assert one == two and one["public_test_cases"] == "[]"
    with pytest.raises(ValueError, match="has no tests"):
        convert(row())
    with pytest.raises(ValueError, match="has no column 'question_content', only"):
        convert({"metadata": ""})


def test_code_is_the_last_whole_block():
    assert code_in("```python\na\n```\nor\n```\nb\nc\n```\n.") == "b\nc"
    assert code_in("```python\na") is None and code_in("a") is None


CALL = [{"input": "[1, 2]\n3", "output": "[[1, 2], 3]"}]
CASES = [
    (PLAIN, SUM, None, True),
    ("print(3)", SUM, None, False),
    (f"{PLAIN}exit(1)", SUM, None, True),  # the answer was given
    ("import sys\na, b = map(float, sys.stdin.readline().split())\nsys.stdout.write(str(a + b))", SUM, None, True),
    ("raise ValueError", SUM, None, False),
    ("for k in count():\n    pass", SUM[:1], None, False),
    (
        "class Solution:\n    def pair(self, a: List[int], b):\n        print('noise')\n        return (a, b)",
        CALL,
        "pair",
        True,
    ),
    ("def pair(a, b):\n    return [a, b]", CALL, "pair", True),
    ("def pair(a, b):\n    return [b, a]", CALL, "pair", False),
    ("def other(a, b):\n    return [a, b]", CALL, "pair", False),
    ("x =", CALL, "pair", False),
]


def test_program_passes_right_answers_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(live_code, "SECONDS", 1)
    for source, tests, name, right in CASES:
        words = [sys.executable, "-I", "-c", live_code.program_of(source, gold(tests, name))]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == right, (source, done.stderr)
        if not right:
            said = "out of time" if "count()" in source else ""
            assert f"of {len(tests)}: {said}" in done.stderr


def test_time_grows_with_the_tests():
    assert live_code.seconds_of(gold(SUM)) == 14


@pytest.mark.eval
def test_answers_are_run_on_their_tests_in_the_cage(tmp_path):
    cage.find()
    rows = []
    for source, tests, name, _ in CASES:
        answer = {"text": f"So:\n```python\n{source}\n```", "gold": json.dumps(gold(tests, name))}
        rows.append({"item": len(rows), "repeat": 0, "prompt": "p", **answer})
    rows.append(rows[0] | {"text": "I cannot."})
    found = code.judge(tmp_path, rows)
    assert [verdict["passed"] for verdict in found] == [*(right for *_, right in CASES), False]
