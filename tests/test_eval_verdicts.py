"""Verdicts, kept as they come (camopd/eval/verdicts.py)."""

import json
import time

import pytest

from camopd.eval.verdicts import VERDICTS, collect


ROWS = [{"prompt": f"p{n}", "gold": "g", "text": "t"} for n in range(6)]


def test_verdicts_are_asked_for_once_and_failed_ones_again(tmp_path):
    asked = []

    def ask(row):
        asked.append(row["prompt"])
        return {"failed": "no"} if row["prompt"] == "p3" and len(asked) <= 6 else {"passed": row["prompt"] == "p1"}

    first = collect(tmp_path, ROWS, "judge", ask, 1)
    assert [verdict.get("passed") for verdict in first] == [False, True, False, None, False, False]
    second = collect(tmp_path, ROWS, "judge", ask, 1)
    assert asked == [row["prompt"] for row in ROWS] + ["p3"] and second[3]["passed"] is False
    lines = [json.loads(line) for line in (tmp_path / VERDICTS).read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 7 and lines[3]["failed"] == "no"  # every one is kept


def test_verdicts_of_another_judge_or_another_answer_are_not_taken(tmp_path):
    collect(tmp_path, ROWS, "one", lambda row: {"passed": True}, 2)
    assert not any(v["passed"] for v in collect(tmp_path, ROWS, "other", lambda row: {"passed": False}, 2))
    changed = [{**ROWS[0], "text": "other"}, *ROWS[1:]]
    found = collect(tmp_path, changed, "one", lambda row: {"passed": False}, 2)
    assert [verdict["passed"] for verdict in found] == [False, *[True] * 5]


def test_verdicts_that_are_done_outlive_an_interrupt_and_a_torn_line(tmp_path):
    ticks = []

    def tick(steps=1):
        ticks.append(steps)
        if sum(ticks) >= 3:
            raise KeyboardInterrupt

    def slowly(row):
        time.sleep(0.05)
        return {"passed": True}

    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path, ROWS, "judge", slowly, 1, tick)
    with open(tmp_path / VERDICTS, "ab") as file:
        file.write(b'{"answer": "torn')
    done = len((tmp_path / VERDICTS).read_text(encoding="utf-8").splitlines()) - 1
    asked = []
    assert len(collect(tmp_path, ROWS, "judge", lambda row: asked.append(row) or {"passed": True}, 1)) == 6
    assert 3 <= done < 6 and len(asked) == 6 - done


def test_repeats_of_one_text_have_verdicts_of_their_own_that_stay(tmp_path):
    rows, given = [ROWS[0]] * 4, iter([{"passed": True}, {"passed": True}, {"failed": "no"}, {"passed": False}])
    first = collect(tmp_path, rows, "judge", lambda row: next(given), 1)
    asked = []
    second = collect(tmp_path, rows, "judge", lambda row: asked.append(row) or {"passed": True}, 1)
    assert len(asked) == 1 and [each for each in second if each not in first] == [second[2]]
    assert [verdict["passed"] for verdict in second] == [True, True, True, False]
    assert collect(tmp_path, rows, "judge", lambda row: pytest.fail("asked again"), 1) == second
    with open(tmp_path / VERDICTS, "a", encoding="utf-8") as file:  # as two calls at a time may leave it
        file.write(json.dumps({**second[0], "failed": "late"}) + "\n")
    assert collect(tmp_path, rows, "judge", lambda row: pytest.fail("asked again"), 1) == second
