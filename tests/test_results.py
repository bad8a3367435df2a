"""Scores of tasks in a run's folder (camopd/results.py)."""

import json
import os
from pathlib import Path

import pytest
from eval_items import items
from runs import GAP, make_run

from camopd.eval.compare import compare
from camopd.eval.page import write
from camopd.eval.tasks import TASKS
from camopd.output_dir import RUN_FILE, RUN_ID
from camopd.results import EVAL, benchmarks_of, table, tasks_of


ABOUT = {"models": {"start": "a", "general": "b", "result": "run"}, "limit": 100, "max_tokens": 128}
IFEVAL, MEDQA = TASKS["ifeval"], TASKS["medqa"]
MODELS = {
    "result": {"ifeval": items([1, 1, 0, 0] * 20), "medqa": items([1] * 30 + [0] * 10)},
    "start": {"ifeval": items([0, 0, 0, 1] * 20), "medqa": items([1] * 40)},
    "general": {"ifeval": items([1, 1, 1, 0] * 20), "medqa": items([None] * 39 + [0])},
}


def evaluated(folder, models=MODELS, about=ABOUT):
    """What `camopd eval` writes of these models."""
    write(compare([IFEVAL, MEDQA], models), [], about, folder)
    return folder / EVAL


def test_benchmarks_of_a_run_have_scores_before_and_after_and_what_came_back_and_broke(tmp_path):
    make_run(tmp_path / "run", 2, **GAP)
    evaluated(tmp_path / "run" / "eval")
    (found,) = benchmarks_of(tmp_path / "run")
    assert found.path == tmp_path / "run" / "eval" / EVAL and found.problem == ""
    assert found.about == "Measured on at most 100 rows of each task, with answers of at most 128 tokens."
    head, ifeval, medqa = found.rows
    assert head == ["task", "before ± 95 %", "general teacher ± 95 %", "after ± 95 %", "items", "change (95 %)",
                    "came back", "broke"]  # fmt: skip
    # 20 of 80: standard error sqrt(0.25 * 0.75 / 79) = 0.0487, times t of 79 degrees of freedom, 1.990
    assert ifeval[:5] == ["ifeval", "25.0 ± 9.7", "75.0 ± 9.7", "50.0 ± 11.2", "80"]
    assert ifeval[5].startswith("+25.0 (+") and ifeval[6:] == ["40 of 80", "20 of 80"]
    # All of 40 right: 0.025 ** (1/40) = 0.912. Of one item no interval is given.
    assert medqa[1:3] == ["100.0 (from 91.2)", "0.0"]
    assert medqa[4] == "1 to 40" and medqa[6:] == ["0 of 40", "10 of 40"]


def test_benchmarks_say_which_answers_were_cut_off_and_which_held_none(tmp_path):
    found = {
        "other": {"ifeval": items([1] * 20), "medqa": items([1] * 40)},
        "result": {"ifeval": items([1] * 19 + [0]), "medqa": items([0] * 40, unparsed=0.11)},
        "start": {"ifeval": items([1, 0] * 10, truncated=0.62), "medqa": items([1, 0] * 20, truncated=0.09)},
    }
    evaluated(tmp_path / "eval", found)
    (shown,) = benchmarks_of(tmp_path)
    assert shown.lost == {  # below a tenth is not told
        "ifeval": "62% (before), 0% (after), 0% (other) of the answers were cut off at the token limit",
        "medqa": "0% (before), 11% (after), 0% (other) of the answers hold none that could be read",
    }
    ifeval, medqa = shown.lines
    assert ifeval.startswith(
        "ifeval, percent ± 95 %: before 50.0 ± 24.0, after 95.0 ± 10.5, other 100.0 (from 83.2); change +45.0 (+"
    )
    assert ifeval.endswith(f"), 9 of 20 came back, 0 of 20 broke; {shown.lost['ifeval']}.")
    assert medqa.endswith(f"broke; {shown.lost['medqa']}.")
    # What nobody has counted is not told, as of a file from before it was written.
    evaluated(tmp_path / "eval", {"one": {task: items([1, 0], truncated=None) for task in ("ifeval", "medqa")}})
    (shown,) = benchmarks_of(tmp_path)
    assert shown.lost == {}
    assert shown.lines[0] == "ifeval, percent ± 95 %: one 50.0 ± 635.3."


def test_benchmarks_of_other_models_have_their_names_and_no_change(tmp_path):
    run = tmp_path / "run"
    evaluated(run / "eval", {"one": MODELS["start"], "result": MODELS["result"]}, {})
    (found,) = benchmarks_of(run)
    assert found.rows[0] == ["task", "after ± 95 %", "one ± 95 %", "items"] and found.about == ""


def test_benchmarks_of_the_default_folder_are_those_of_the_run_that_they_are_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other"):
        make_run(tmp_path / name, 2, **GAP)
    path = evaluated(tmp_path / "eval-output")
    assert [found.path for found in benchmarks_of(Path("run"))] == [path.relative_to(tmp_path)]
    assert benchmarks_of(Path("other")) == []
    evaluated(tmp_path / "eval-output", about={"models": {"result": str(tmp_path / "other" / "checkpoint-4")}})
    assert len(benchmarks_of(Path("other"))) == 1 and benchmarks_of(Path("run")) == []
    monkeypatch.chdir(tmp_path / "other")
    (tmp_path / "eval-output").rename("eval-output")
    assert len(benchmarks_of(Path("."))) == 1  # it is both, and shown once


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"about": {}}', "KeyError: 'tasks'"),
        ('{"tasks": [{"task": "ifeval"}]}', "KeyError: 'models'"),
        ('{"tasks": [{"task": "a", "models": {"start": {"mean": 0.5}}}]}', "KeyError: 'items'"),
        ('{"tasks": [{"task": "a", "models": {}, "change": {}}]}', ""),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_benchmarks_that_cannot_be_read_are_said(tmp_path, text, why):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / EVAL).write_text(text)
    (found,) = benchmarks_of(tmp_path)
    assert found.rows == () and why in found.problem
    assert found.problem.startswith(f"`{tmp_path / 'eval' / EVAL}` is not shown: it cannot be read as results of")


def test_benchmarks_of_a_model_that_was_trained_further_are_not_shown(tmp_path):
    metrics = make_run(tmp_path / "run", 2, **GAP)
    path = evaluated(tmp_path / "run" / "eval")
    os.utime(path, (0, metrics.stat().st_mtime - 1))
    (found,) = benchmarks_of(tmp_path / "run")
    assert found.rows == () and "older than the run's last step" in found.problem and f"touch {path}" in found.problem


def test_benchmarks_of_another_model_than_the_runs_are_not_shown(tmp_path):
    run, other, merged = (tmp_path / name for name in ("run", "other", "merged"))
    for folder in (run, other):
        make_run(folder, 40, **GAP)
        (folder / "config.json").write_text("{}")
        (folder / RUN_FILE).write_text(json.dumps({RUN_ID: folder.name}))
    shown = {run: "", run / "checkpoint-40": "", merged: "", run / "checkpoint-10": "checkpoint-10, and the run's model is",
             other: "it is of the run in other"}  # fmt: skip
    for place, where in enumerate(shown):
        evaluated(run / f"eval-{place}", about={"models": {"result": str(where)}})
    found = benchmarks_of(run)
    assert [bool(each.rows) for each in found] == [True, True, True, False, False]
    assert all(problem in each.problem for each, problem in zip(found, shown.values(), strict=True))


def test_benchmarks_of_a_killed_run_are_those_of_its_newest_checkpoint(tmp_path):
    """Which is all that it has left, some steps behind its last one."""
    make_run(tmp_path / "run", 45, **GAP)
    evaluated(tmp_path / "run" / "eval", about={"models": {"result": str(tmp_path / "run" / "checkpoint-40")}})
    (found,) = benchmarks_of(tmp_path / "run")
    assert found.rows and not found.problem
    (tmp_path / "run" / "config.json").write_text("{}")
    (found,) = benchmarks_of(tmp_path / "run")
    assert "it is of checkpoint-40, and the run's model is that of step 45" in found.problem


def test_nothing_evaluated_is_nothing(tmp_path):
    metrics = make_run(tmp_path, 2, **GAP)
    write([], [], {"run": "run"}, tmp_path / "gaps")  # of `--tasks gaps` alone
    assert benchmarks_of(tmp_path) == [] and tasks_of(metrics) == []


def measured(path, *lines):
    """An eval_tasks.jsonl with (step, task, scores)."""
    path.write_text("".join(
        json.dumps({"step": step, "task": task, "rows": list(range(len(scores))), "scores": scores}) + "\n"
        for step, task, scores in lines
    ))  # fmt: skip


def test_tasks_in_training_have_their_first_best_and_last_score(tmp_path):
    measured(
        tmp_path / "eval_tasks.jsonl", (0, "ifeval", [1, 1, 0, 0]), (0, "qasc", [0.5]), (4, "ifeval", [1, 1, 1, 0]),
        (8, "ifeval", [0, 1, 1, 0]), (8, "qasc", [0.25]), (12, "ifeval", [1, 1, 1, 1]),
    )  # fmt: skip
    head, ifeval, qasc = tasks_of(tmp_path / "metrics.jsonl", 8)
    assert head == ["task", "rows", "first ± 95 %", "best", "last ± 95 %", "rows that broke"]
    # 2 of 4: standard error sqrt(1 / 3 / 4) = 0.2887, times t of 3 degrees of freedom, 3.182
    assert ifeval == ["ifeval", "4", "0.500 ± 0.919 (step 0)", "0.750 (step 4, of 3)", "0.500 ± 0.919 (step 8)", "1"]
    assert qasc == ["qasc", "1", "0.500 (step 0)", "0.500 (step 0, of 2)", "0.250 (step 8)", "1"]
    # All of 4: the exact end, 1 - 0.025^(1/4) = 0.602
    assert tasks_of(tmp_path / "metrics.jsonl")[1][4] == "1.000 (from 0.398) (step 12)"
    (tmp_path / "eval_tasks.jsonl").rename(tmp_path / "eval_tasks-1.jsonl")
    assert len(tasks_of(tmp_path / "metrics-1.jsonl")) == 3
    assert tasks_of(tmp_path / "metrics.jsonl") == tasks_of(tmp_path / "other.jsonl") == []


def test_tasks_in_training_are_compared_over_the_same_rows(tmp_path):
    measured(tmp_path / "eval_tasks.jsonl", (0, "ifeval", [1, 1]), (4, "ifeval", [0, 0, 1]), (8, "ifeval", [0, 1, 0]))
    with open(tmp_path / "eval_tasks.jsonl", "a") as file:  # by hand
        file.write('{"step": 9, "task": "ifeval", "scores": ["x"]}\n{"step": 9, "task": 3}\n')
    (_, ifeval) = tasks_of(tmp_path / "metrics.jsonl")
    assert ifeval[:3] == ["ifeval", "3", "0.333 ± 1.434 (step 4)"] and ifeval[5] == "1"
    (tmp_path / "eval_tasks.jsonl").write_text("x\n{}\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is not an evaluation: 'x'. Delete the line"):
        tasks_of(tmp_path / "metrics.jsonl")


def test_table_has_no_column_too_many():
    assert table([["h"], ["a|b"]]) == "| h |\n| --- |\n| a\\|b |"
