"""Models side by side (camopd/eval/compare.py)."""

import json

import pytest
from eval_items import items
from hypothesis import given
from hypothesis import strategies as st

from camopd.errors import CaMOPDError
from camopd.eval.compare import compare, share_of_way
from camopd.eval.page import of_share
from camopd.eval.tasks import TASKS


IFEVAL, MEDQA = TASKS["ifeval"], TASKS["medqa"]


def found(**models):
    return {name: {"ifeval": items(scores)} for name, scores in models.items()}


START, GENERAL, RESULT = [0, 0, 0, 1] * 20, [1, 1, 1, 0] * 20, [1, 1, 0, 0] * 20


@pytest.mark.parametrize(("count", "end"), [(1, 0.975), (10, 0.3084971), (96, 0.0376961)])
def test_items_of_which_none_has_changed_bound_the_change(count, end):
    """scipy.stats.binomtest(0, count).proportion_ci(method="exact").high, scipy 1.17.1."""
    scores = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0] * 10
    (row,) = compare([IFEVAL], found(start=scores[:count], result=scores[:count]))
    change = row["change"]
    assert (change["value"], change["p"], change["came_back"], change["broke"]) == (0, 1, [], [])
    assert change["high"] == -change["low"] == pytest.approx(end, abs=1e-6)


def test_changes_are_listed_item_by_item():
    (row,) = compare([IFEVAL], found(start=START, general=GENERAL, result=RESULT))
    change = row["change"]
    assert [item["prompt"] for item in change["came_back"]] == [f"prompt {n}" for n in range(80) if n % 4 < 2]
    assert [item["prompt"] for item in change["broke"]] == [f"prompt {n}" for n in range(80) if n % 4 == 3]
    assert change["came_back"][0] == {
        "key": "k0",
        "prompt": "prompt 0",
        "scores": [0, 1],
        "before": "text 0",
        "after": "text 1",
    }
    assert change["value"] == 0.25 and change["low"] < 0.25 < change["high"]
    assert row["share"]["value"] == pytest.approx(0.5)  # from 1/4 to 1/2 of 3/4
    assert row["models"]["general"] == {"mean": 0.75, "standard_error": pytest.approx(0.04871, abs=1e-5), "items": 80,
                                        "repeats": 1, "truncated": 0.0, "unparsed": 0.0}  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=20))
def test_every_item_came_back_or_broke_or_stayed(pairs):
    before, after = zip(*pairs, strict=True)
    (row,) = compare([IFEVAL], found(start=before, result=after))
    moved = len(row["change"]["came_back"]) - len(row["change"]["broke"])
    assert moved == sum(after) - sum(before)
    json.dumps(row, allow_nan=False)


def test_share_of_the_domain_is_what_is_kept_of_the_lead():
    models = {"start": [1] * 40, "general": [0] * 40, "result": [1] * 30 + [0] * 10}
    (row,) = compare([MEDQA], {name: {"medqa": items(scores)} for name, scores in models.items()})
    assert row["share"]["value"] == pytest.approx(0.75)


def test_scores_that_are_means_have_no_mcnemar_test():
    (row,) = compare([IFEVAL], found(start=[0.25, 0.5], result=[0.5, 0.25]))
    assert "p" not in row["change"] and len(row["change"]["broke"]) == 1


def test_share_that_cannot_be_told_has_no_ends():
    (row,) = compare([IFEVAL], found(start=[0, 1] * 4, general=[1, 0] * 4, result=[1] * 8))
    assert row["share"] == {"value": None, "low": None, "high": None}


def test_models_that_were_asked_other_items_are_not_compared():
    models = {"start": {"ifeval": items([0, 1])}, "result": {"ifeval": items([0, 1], prefix="o")}}
    with pytest.raises(
        CaMOPDError, match=r"'start' and 'result' were not asked the same items of ifeval: 2 and 2 items, 2 of"
    ):
        compare([IFEVAL], models)


def test_other_models_are_shown_and_not_compared():
    (row,) = compare([IFEVAL], found(one=[0, 1], two=[1, 1]))
    assert set(row["models"]) == {"one", "two"} and "change" not in row


def test_share_of_a_result_that_is_the_start_or_the_teacher_on_every_item_has_no_interval():
    zero, one = [0.0] * 6 + [1.0] * 4, [1.0] * 10
    for found, value in ((zero, 0), (one, 1)):
        assert share_of_way(zero, one, found) == {"value": value, "low": None, "high": None, "alike": True}
    moved = share_of_way(zero, one, [1.0, *zero[1:9], 0.0])  # one came back and one broke
    assert moved["value"] == 0 and moved["low"] < 0 < moved["high"] and "alike" not in moved


@pytest.mark.parametrize(
    ("task", "words"), [("ifeval", "nothing lost: the start is"), ("medqa", "no lead to keep: the")]
)
@pytest.mark.parametrize("right", [60, 80, 110, 120])
def test_result_is_on_no_way_where_the_start_is_not_behind_the_teacher_or_not_ahead_of_it(task, words, right):
    """A result that is worse than both would have kept 150 %, and a better one 25 %."""
    first, last = ("general", "start") if task == "medqa" else ("start", "general")
    models = {first: [1] * 120 + [0] * 80, last: [1] * 80 + [0] * 120, "result": [1] * right + [0] * (200 - right)}
    (row,) = compare([TASKS[task]], {name: {task: items(scores)} for name, scores in models.items()})
    assert row["share"]["value"] is None and of_share(row).startswith(words)


def test_share_of_ends_that_are_not_told_apart_is_none_also_where_no_item_differs():
    start, teacher = [1.0] * 50 + [0.0] * 150, [1.0] * 51 + [0.0] * 149
    found = share_of_way(start, teacher, teacher)
    assert found["low"] is None and "alike" not in found
    assert of_share({"share": found, "side": "general"}) == "start and teacher not told apart"
