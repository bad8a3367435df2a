"""The page of an evaluation (camopd/eval/page.py)."""

import json

import pytest
from eval_items import items

from camopd.eval import page
from camopd.eval.compare import compare
from camopd.eval.tasks import TASKS
from camopd.results import benchmarks_of


IFEVAL, MEDQA = TASKS["ifeval"], TASKS["medqa"]
MODELS = {
    "start": {"ifeval": items([0, 0, 0, 1] * 20), "medqa": items([1] * 40, truncated=0.5)},
    "general": {"ifeval": items([1, 1, 1, 0] * 20), "medqa": items([0] * 40)},
    "result": {
        "ifeval": items([1, 1, 0, 0] * 20),
        "medqa": items([1] * 30 + [0] * 10, text="<b>{}</b>| " + "x" * 400),
    },
}
ROWS = compare([IFEVAL, MEDQA], MODELS)


def test_summary_says_first_what_came_back_and_what_broke():
    (text,) = page.summary(ROWS)
    first, second = text.splitlines()
    assert first.startswith("- **ifeval** (general): better. +25.0 [")
    assert first.endswith("points; 40 of 80 items came back, 20 broke.")
    assert second.startswith("- **medqa** (domain): WORSE. -25.0 [") and second.endswith(
        "0 of 40 items came back, 10 broke."
    )


def test_change_within_chance_is_called_so():
    (text,) = page.summary(
        compare([IFEVAL], {"start": {"ifeval": items([0, 1])}, "result": {"ifeval": items([1, 0])}})
    )
    assert "no more than chance shows. +0.0 [-100.0, +100.0] points" in text


@pytest.mark.parametrize(
    ("result", "said"),
    [  # five that came back and none that broke are p = 0.06, however many stay; six are 0.03
        ([1] * 5 + [0] * 25, "no more than chance shows"),
        ([1] * 6 + [0] * 24, "better"),
        ([1], "no more than chance shows"),
        ([0.5] * 5 + [0] * 25, "no more than chance shows"),
        ([0.5] * 6 + [0] * 24, "better"),
    ],
)
def test_few_items_that_all_change_one_way_are_not_called_more_than_chance(result, said):
    (text,) = page.summary(
        compare([IFEVAL], {"start": {"ifeval": items([0] * len(result))}, "result": {"ifeval": items(result)}})
    )
    assert text.startswith(f"- **ifeval** (general): {said}. +")


def test_tables_have_a_row_per_task_and_a_column_per_model():
    head, ifeval, medqa = page.score_rows(ROWS)
    assert head == ["task", "start", "general", "result", "items", "cut off", "no answer"]
    assert ifeval[:5] == ["ifeval", "25.0 ± 9.7", "75.0 ± 9.7", "50.0 ± 11.2", "80 of 541"]
    # All of 40 wrong: 1 - 0.025 ** (1/40) = 0.088.
    assert medqa[1:3] == ["100.0 (from 91.2)", "0.0 (to 8.8)"]
    assert medqa[4:6] == ["40 of 1273", "50% / 0% / 0%"]
    _, ifeval, medqa = page.change_rows(ROWS)
    assert ifeval[2:5] == ["40", "20", "0.013"] and ifeval[5].startswith("back 50 % [")
    assert medqa[5].startswith("kept 75 % [")


def test_interval_of_a_score_is_that_of_the_report_and_the_card(tmp_path):
    text = "\n".join(page.write(ROWS, [], {}, tmp_path / "eval"))
    kept = json.loads((tmp_path / "eval" / "eval.json").read_text(encoding="utf-8"))
    # 20 of 80: sqrt(0.25 * 0.75 / 79), which eval.json keeps; the page has 1.990 of it, t of 79 degrees of freedom
    assert kept["tasks"][0]["models"]["start"]["standard_error"] == pytest.approx(0.0487, abs=5e-5)
    assert "percent ± 95 % interval over items" in text and "standard error" not in text
    (found,) = benchmarks_of(tmp_path)
    for shown, own in zip(found.rows[1:], page.score_rows(ROWS)[1:], strict=True):
        assert shown[1:4] == own[1:4]


def test_items_are_those_of_each_model_where_a_judge_had_no_verdict_for_some():
    gpqa = TASKS["gpqa"]
    found = {"start": {"gpqa": items([1, None, 0, None])}, "result": {"gpqa": items([1, 1, 0, None])}}
    _, row = page.score_rows(compare([gpqa], found))
    assert row[:4] == ["gpqa", "50.0 ± 635.3", "66.7 ± 143.4", "2 / 3 of 198"]
    found["start"] = found["result"]
    assert page.score_rows(compare([gpqa], found))[1][3] == "3 of 198"


@pytest.mark.parametrize("models", [MODELS, {"one": MODELS["start"]}])
def test_page_is_written_three_times_and_holds_every_item(tmp_path, models):
    rows = compare([IFEVAL, MEDQA], models)
    short = page.write(rows, ["a note"], {"limit": None}, tmp_path)
    text = (tmp_path / "eval.md").read_text(encoding="utf-8")
    assert all(block in text for block in short) and "- a note" in text
    kept = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert kept["tasks"] == rows and kept["notes"] == ["a note"]
    html = (tmp_path / "eval.html").read_text(encoding="utf-8")
    assert html.count("<table>") == sum(block.startswith("| ") for block in short) == (2 if len(models) > 1 else 1)
    if len(models) > 1:
        assert "## medqa: what broke, 5 of 10" in text and "(410 characters)" in text
        assert "<b>0" not in html and "&lt;b&gt;0" in html
    # The text of a model is shown as it is, which the page says before the first.
    assert html.count("as they were written, with any Markdown in them") == (len(models) > 1)
    assert text.partition("as they were written")[0].count("\n> ") == 0


def test_page_names_models_judges_and_what_was_cut_short(tmp_path):
    about = {"models": {"start": "a/b"}, "judges": {"arena_hp": "http://h#j"}, "limit": 4, "max_tokens": None}
    page.write(ROWS, [], about, tmp_path)
    for name in ("eval.md", "eval.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert all(word in text for word in ("start: a/b", "judge of arena_hp: http://h#j", "limit: 4"))
        assert "max_tokens" not in text


def test_tasks_of_an_earlier_call_that_the_tables_lose_are_named_with_the_way_to_have_them(tmp_path):
    ifeval = compare([IFEVAL], MODELS)
    assert not [text for text in page.write(ifeval, [], {}, tmp_path) if "too, and have only" in text]
    (tmp_path / "eval.md").unlink()
    said = page.write(compare([MEDQA], MODELS), [], {}, tmp_path)[-1]
    assert "had ifeval, too, and have only the tasks of this call" in said and "--tasks ifeval,medqa" in said
    assert "too, and have only" not in page.write(ROWS, [], {}, tmp_path)[-1]
    (tmp_path / "eval.json").write_text(json.dumps({"tasks": [], "gaps": [{}]}))
    said = page.write(ROWS, [], {}, tmp_path)[-1]
    assert "had gaps, too" in said and "--tasks gaps,ifeval,medqa" in said
    (tmp_path / "eval.json").write_text("[")
    page.write(ROWS, [], {}, tmp_path)
    assert benchmarks_of(tmp_path.parent)
