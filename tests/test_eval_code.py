"""Answers that are code (camopd/eval/code.py)."""

import json
import time

import pytest

from camopd.eval import cage, code
from camopd.eval.scores import items_of
from camopd.eval.tasks import TASKS


GOLD = json.dumps(
    {
        "prompt": 'def add(a, b):\n    """Sum."""\n',
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        "entry_point": "add",
    }
)
ANSWERS = {
    "Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.": True,
    "    return a + b": True,
    "<think>def</think>```\ndef add(a, b):\n    return a + b": True,
    "```python\ndef add(a, b):\n    return a - b\n```": False,
    "I cannot.": False,
    "<think>```\ndef add(a, b):\n    return a + b\n```": False,
    "": False,
}


def row(text, item=0):
    return {"item": item, "repeat": 0, "prompt": "p", "gold": GOLD, "text": text, "stop": "stop", "scores": {}}


def rows():
    return [row(text, item) for item, text in enumerate(ANSWERS)]


def test_program_is_head_answer_and_tests():
    for text, right in ANSWERS.items():
        program = code.program_of(row(text))
        if program is None:
            assert not right
            continue
        space: dict = {}
        try:
            exec(program, space)
        except (AssertionError, SyntaxError):
            assert not right, text
        else:
            assert right, text


def test_verdicts_are_kept_and_make_the_scores(tmp_path, monkeypatch):
    asked = []

    def run(program, found, seconds, look):
        assert seconds == cage.SECONDS
        asked.append(program)
        return "a + b" in program, "passed"

    monkeypatch.setattr(cage, "find", lambda: ("bwrap", "python3"))
    monkeypatch.setattr(cage, "run", run)
    ticks = []
    verdicts = code.judge(tmp_path, rows(), lambda steps=1: ticks.append(steps))
    assert [verdict["passed"] for verdict in verdicts] == list(ANSWERS.values()) and sum(ticks) == len(ANSWERS)
    assert code.judge(tmp_path, rows()) == verdicts and len(asked) == 5
    scored = [one | {"verdict": verdict} for one, verdict in zip(rows(), verdicts, strict=True)]
    found = items_of(TASKS["humaneval"], scored)
    assert [item.score for item in found] == list(map(float, ANSWERS.values()))
    assert [item.unparsed for item in found] == [0, 0, 0, 0, 0, 1, 1]


def test_signal_ends_a_program_that_runs(tmp_path, monkeypatch):
    """Tests of LiveCodeBench may take minutes."""
    begun = []

    def run(program, found, seconds, look=lambda: None):
        begun.append(program)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            look()
            time.sleep(0.01)
        return True, "passed"

    def tick(steps=1):
        if begun:
            raise KeyboardInterrupt

    monkeypatch.setattr(cage, "find", lambda: ("bwrap", "python3"))
    monkeypatch.setattr(cage, "run", run)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        code.judge(tmp_path, rows(), tick)
    assert time.monotonic() - started < 15 and not (tmp_path / "verdicts.jsonl").exists()


@pytest.mark.eval
def test_answers_are_run_in_the_cage(tmp_path):
    verdicts = code.judge(tmp_path, rows())
    assert [verdict["passed"] for verdict in verdicts] == list(ANSWERS.values())


@pytest.mark.parametrize("fence", ["```python", "``` python", "```Python3", "```"])
def test_program_is_that_of_python_where_there_are_other_blocks(fence):
    install = "```bash\npip install x\n```\n" if fence != "```" else ""
    body = next(text for text, right in ANSWERS.items() if right and "```" not in text)
    assert "pip install" not in code.program_of(row(f"{install}{fence}\n{body}\n```"))
    assert body in code.program_of(row(f"{install}{fence}\n{body}\n```"))
