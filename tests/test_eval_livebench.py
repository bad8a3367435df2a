"""LiveBench's judgments as items (camopd/eval/livebench.py)."""

import json

import pytest

from camopd import cli
from camopd.errors import DataError
from camopd.eval.livebench import BY_OTHERS, items, judged, notes, settle
from camopd.eval.tasks import named


# Two categories; the first has two tasks, of two questions and of one.
SCORES = {
    ("math", "aime", "a"): 1,
    ("math", "aime", "b"): 0,
    ("math", "amps", "c"): 1,
    ("language", "typos", "d"): 0.25,
}


def items_of(checkout, model):
    return items(judged(checkout, model))


@pytest.fixture
def checkout(tmp_path):
    for (category, task, question), score in SCORES.items():
        folder = tmp_path / "livebench" / "data" / "live_bench" / category / task / "model_judgment"
        folder.mkdir(parents=True, exist_ok=True)
        line = {"question_id": question, "task": task, "model": "start", "turn": 1, "category": category}
        with open(folder / "ground_truth_judgment.jsonl", "a", encoding="utf-8") as file:
            for row in (
                {**line, "score": 0.5},
                {**line, "score": score},
                {**line, "score": -1},
                {**line, "model": "x", "score": 1},
            ):
                file.write(json.dumps(row) + "\n")
    return tmp_path


def test_pooled_mean_is_that_of_categories_of_tasks(checkout):
    found = items_of(checkout, "Start")
    assert [(item.key, item.score) for item in found] == [("a", 1), ("b", 0), ("c", 1), ("d", 0.25)]
    assert sum(item.weight for item in found) == pytest.approx(1)
    assert sum(item.weight * item.score for item in found) == pytest.approx(((0.5 + 1) / 2 + 0.25) / 2)


def test_question_that_was_not_judged_is_an_item_without_a_score(checkout):
    """Else models would seem to have been asked different questions."""
    path = sorted(checkout.rglob("ground_truth_judgment.jsonl"))[0]
    line = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "question_id": "z", "score": -1}) + "\n")
    found = {item.key: (item.score, item.weight) for item in items_of(checkout, "start")}
    assert found.pop("z") == (None, 0.0) and sum(weight for _, weight in found.values()) == pytest.approx(1)


def test_judgments_with_line_ends_of_unicode_are_as_many(checkout):
    path = next(checkout.rglob("ground_truth_judgment.jsonl"))
    lines = [json.loads(line) | {"said": "a\u2028b\u2029c\x85d"} for line in path.open(encoding="utf-8")]
    before = items_of(checkout, "start")
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    assert items_of(checkout, "start") == before
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"score": 1}\n')
    with pytest.raises(DataError, match=rf"line {len(lines) + 1} of .* is not a judgment of LiveBench"):
        items_of(checkout, "start")


def test_line_that_is_no_judgment_is_refused_and_so_is_a_score_that_is_none(checkout):
    path = next(checkout.rglob("ground_truth_judgment.jsonl"))
    whole = path.read_text(encoding="utf-8")
    path.write_text('{"score": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1 of .* is not a judgment of LiveBench"):
        judged(checkout, "start")
    for score in ("NaN", "2", "-0.5", '"a"', "null"):
        path.write_text(whole.replace('"score": 0.5', f'"score": {score}'), encoding="utf-8")
        with pytest.raises(DataError, match=r"line 1 of .* is not a judgment of LiveBench"):
            judged(checkout, "start")


def test_scripts_are_run_unless_the_checkout_has_judgments_of_all_models(checkout):
    tasks = named(["qasc", "livebench"])
    answers = lambda *words: [task.answer for task in settle(tasks, *words)]  # noqa: E731
    assert answers(checkout, ["start", "X"]) == ["letter", "read"]
    assert answers(checkout, ["start", "result"]) == answers(None, ["start"]) == ["letter", "scripted"]
    assert settle(tasks[:1], None, ["start"]) == tasks[:1]


def test_notes_say_by_whom_it_was_judged_and_what_has_no_score(checkout):
    rows = judged(checkout, "start")
    assert notes({"start": items(rows)}) == [f"livebench: {BY_OTHERS}."]
    (line,) = notes({"start": items(rows), "result": items([{**row, "score": None, "how": "x"} for row in rows])})
    assert line.startswith("livebench: 4 of 4 questions have no score of result, as its server failed. ")


def test_note_on_what_the_checkout_has_not_judged_promises_nothing(checkout):
    path = sorted(checkout.rglob("ground_truth_judgment.jsonl"))[0]
    line = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "question_id": "z", "score": -1}) + "\n")
    _, note = notes({"start": items_of(checkout, "start")})
    assert note == (
        "livebench: 1 of 5 questions have no score of start, as LiveBench has not judged them (-1). They count as nothing, "
        "and are not judged again."
    )


def test_command_reads_them_beside_the_paper(checkout, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(
        [
            "eval",
            "--tasks",
            "livebench",
            "--models",
            "start=org/x",
            "--data",
            f"livebench={checkout}",
            "--paper",
            "medical",
        ]
    )
    said = capsys.readouterr().out
    assert "| livebench | 56.2 ± 82.0 | 4 | - | - |" in said  # what was cut off is not known
    assert "| LiveBench 1125 | 52.10 | 34.40 | 42.80 | 49.00 | - | 50.00 | - |" in said
    assert "2024-11-25 or that of 2025-11-25" in said
