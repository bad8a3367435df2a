"""Rows of tasks: read, drawn and written as evalscope wants them (camopd/eval/rows.py)."""

import json

import pytest

from camopd.errors import DataError
from camopd.eval import distraction, rows
from camopd.eval.tasks import TASKS
from camopd.files import json_lines


MEDQA, IFEVAL, DISTRACTION = TASKS["medqa"], TASKS["ifeval"], TASKS["distraction"]


def save(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def question(number):
    return {"question": f"{number}?", "options": {"A": "x", "B": "y"}, "answer": "A", "more": 1}


def test_limit_draws_the_same_rows_from_all_of_the_file_in_its_order(tmp_path):
    path = save(tmp_path / "m.jsonl", [question(number) for number in range(100)])
    found = [int(row["question"][:-1]) for row in rows.read(MEDQA, path, 10)]
    assert len(found) == 10 and found == sorted(found) and max(found) > 50
    assert found == [int(row["question"][:-1]) for row in rows.read(MEDQA, path, 10)]
    assert len(rows.read(MEDQA, path, None)) == len(rows.read(MEDQA, path, 1000)) == 100


def test_written_rows_lie_where_evalscope_looks_and_come_back(tmp_path):
    odd = "1?\u2028\u2029\x85."
    found = rows.read(MEDQA, save(tmp_path / "m.jsonl", [question(1) | {"question": odd}]), None)
    rows.write(MEDQA, found, tmp_path / "rows")
    text = (tmp_path / "rows" / "default_val.jsonl").read_text(encoding="utf-8")
    assert (
        [json.loads(line) for line in json_lines(text)]
        == found
        == [{"question": odd, "A": "x", "B": "y", "answer": "A"}]
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question": "1?", "options": ["x", "y"]}\n', r"line 1 of .* of the task medqa: has no column 'answer_idx'"),
        ('\n{"question"', r"line 2 of .*: Expecting ':' delimiter"),
        ("[1]\n", "line 1 of .*: is not a JSON object"),
        ("\n", "has no rows for the task medqa"),
    ],
)
def test_rows_that_are_none_are_refused_with_their_line(tmp_path, text, said):
    path = tmp_path / "m.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        rows.read(MEDQA, path, None)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"distractors": ["ack", "emojy", "bold"]},
            r"has the distractors .*'emojy'.* three different ones of .*'emoji'",
        ),
        ({"distractors": ["ack", "ack", "bold"]}, "must be three different ones of"),
        ({"distractors": ["ack", ["ack"], "bold"]}, "must be three different ones of"),
        ({"distractors": ["ack", "bold"]}, r"\['ack', 'bold'\] in its gold, which must be a list of three names"),
        ({"distractors": None}, "has the distractors None in its gold, which must be a list of three names"),
        ({"format": "lines"}, r"has the format 'lines' in its gold; .* \(2\) one of \['lines 2', .*'json'\] is right"),
        ({"format": "lines 3"}, "has the format 'lines 3'"),
        ({"format": ["json"]}, r"has the format \['json'\]"),
        ({"format": "words 1"}, "has the format 'words 1'"),
        ({"items": ["19"], "format": "json"}, r"one of \[.*'words 1', 'words 3'\] is right"),
        ({"items": None}, "has the items None in its gold, which must be a list of 1 or more texts"),
        ({"items": []}, r"has the items \[\]"),
        ({"items": ["Mira", 7]}, r"has the items \['Mira', 7\]"),
        ({"others": None}, "has the others None in its gold, which must be a list of 0 or more texts"),
    ],
)
def test_rows_of_distraction_that_nothing_can_be_scored_by_are_refused_with_their_line(tmp_path, changed, said):
    good = {
        "messages": [{"role": "user", "content": "?"}],
        "gold": {
            "items": ["Boris", "Mira"],
            "others": [],
            "format": "lines 2",
            "distractors": ["ack", "emoji", "bold"],
        },
    }
    path = save(tmp_path / "d.jsonl", [good, {**good, "gold": good["gold"] | changed}])
    with pytest.raises(DataError, match=rf"^line 2 of '.*d\.jsonl', rows of the task distraction: .*{said}"):
        rows.read(DISTRACTION, path, 1)
    assert len(rows.read(DISTRACTION, save(path, [good, *distraction.rows(48)]), None)) == 49
    with pytest.raises(DataError, match=r"line 1 of .*: has the gold 'Boris', which is not an object as"):
        rows.read(DISTRACTION, save(path, [{**good, "gold": "Boris"}]), None)


def test_missing_file_without_the_hub_says_which_to_put_where(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        DataError, match=r"google/IFEval, split train, as JSON Lines into '.*ifeval\.jsonl', or name a file with"
    ):
        rows.find(IFEVAL, tmp_path, {})
    with pytest.raises(
        DataError, match=r"no file '.*x\.jsonl' for the task ifeval\. Its rows are those of google/IFEval"
    ):
        rows.find(IFEVAL, tmp_path, {"ifeval": tmp_path / "x.jsonl"})


def test_rows_of_the_hub_are_kept(tmp_path, monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return [question(1)]

    monkeypatch.setattr("datasets.load_dataset", load)
    path = rows.find(MEDQA, tmp_path / "data", {})
    assert rows.find(MEDQA, tmp_path / "data", {}) == path
    assert asked == [(("GBaker/MedQA-USMLE-4-options", None), {"split": "test"})]
    assert len(rows.read(MEDQA, path, None)) == 1
