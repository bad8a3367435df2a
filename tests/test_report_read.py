"""What is read of a run (camopd/report/read.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import ALWAYS, GAP, MEASURED, make_run

from camopd.report.page import write_report
from camopd.report.read import branches_of, metrics_file, names_of, new_name, read_run


def test_read_run_is_by_step_with_nan_where_there_is_no_value(tmp_path):
    lines = ['{"step": 1, "branch": "a", "loss": -2, "x": null}', '{"step": 2, "branch": "a+b", "loss": 3.5, "y": 1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    frame, note = read_run(tmp_path / "metrics.jsonl")
    assert note == ""
    assert list(frame.index) == [1, 2]
    assert list(frame["branch"]) == ["a", "a+b"]
    assert list(frame["loss"]) == [-2, 3.5]
    assert frame["x"].isna().all()
    assert np.isnan(frame["y"][1]) and frame["y"][2] == 1
    assert branches_of([frame]) == ["a", "b"]


def test_read_run_makes_ratios_and_chance_from_what_is_there(tmp_path):
    # 100 / 50 tokens; two independent halves share a quarter of all out of three quarters: 1/3
    frame, _ = read_run(make_run(tmp_path, 8, **ALWAYS, **MEASURED))
    assert frame["selection/general/length_ratio"].dropna().unique() == [2.0]
    assert frame["selection/general/jaccard_chance"].dropna().unique() == pytest.approx([1 / 3])


def test_read_run_has_the_tokens_that_were_trained_and_not_those_that_were_written(tmp_path):
    """They differ with `loss_prefix_tokens`. A run of before did not write them: samples times their length."""
    old, _ = read_run(make_run(tmp_path / "old", 4, **ALWAYS))
    new, _ = read_run(make_run(tmp_path / "new", 4, **ALWAYS, **{"selection/{branch}/tokens": 64}))
    assert old["selection/general/tokens"].dropna().unique() == [800]
    assert new["selection/general/tokens"].dropna().unique() == [64]


def test_read_run_leaves_out_a_last_line_cut_short_and_says_so(tmp_path):
    path = make_run(tmp_path / "run", 8, **GAP)
    path.write_text(path.read_text()[:-20])
    frame, note = read_run(path)
    assert len(frame) == 7
    assert "the last line of metrics.jsonl is cut short and left out" in note
    write_report({"run": path}, tmp_path / "out")
    assert note in (tmp_path / "out" / "report.md").read_text()


def test_read_run_names_the_number_of_any_other_broken_line(tmp_path):
    path = make_run(tmp_path, 8, **GAP)
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:30]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"line 3 of .*metrics\.jsonl' is not JSON: .* Delete the line"):
        read_run(path)


def test_read_run_of_lines_that_another_tool_has_written_has_them_all_and_their_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [f'\n{{"step": {n}, "branch": "a", "said": "x\u2028y\x85z"}}\n' for n in (1, 2)]
    path.write_text("".join(lines), encoding="utf-8")
    assert list(read_run(path)[0].index) == [1, 2]
    path.write_text("".join([*lines, "[]\n"]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 5 of .*metrics\.jsonl' is not a step of a run"):
        read_run(path)


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_read_run_without_steps_says_when_there_will_be_one(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl' has no steps\. Training writes a line after each"):
        read_run(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("line", ["[1, 2]", '{"loss": 1.0}', '{"step": 3}'])
def test_read_run_of_something_else_is_an_error_that_shows_it(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(
        ValueError, match=r"line 1 of .*x\.jsonl' is not a step of a run: it needs `step` and `branch`, got"
    ) as e:
        read_run(tmp_path / "x.jsonl")
    assert line in str(e.value)


def test_metrics_file_that_is_not_there_is_an_error_with_its_path():
    with pytest.raises(ValueError, match=r"no run at 'no/such'\. Give the output_dir of a run, or its metrics\.jsonl"):
        metrics_file("no/such")


def test_metrics_file_of_a_folder_without_a_run_names_the_runs_below_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"is not the folder of a run: it has no metrics\.jsonl, which training writes .*dir\.$"
    ):
        metrics_file(str(tmp_path))
    path = make_run(tmp_path / "seed-0" / "recovered", 8, **GAP)
    with pytest.raises(ValueError, match=r"Below it there are runs: .*seed-0/recovered\."):
        metrics_file(str(tmp_path))
    assert metrics_file(str(path.parent)) == metrics_file(str(path)) == path


def test_names_are_what_differs(tmp_path):
    paths = [tmp_path / name / "recovered" / "metrics.jsonl" for name in ("seed-0", "seed-1")]
    assert names_of(paths) == ["seed-0", "seed-1"]
    assert names_of(paths[:1]) == ["recovered"]
    assert names_of([paths[0], paths[0]]) == ["recovered (1)", "recovered (2)"]
    long = [tmp_path / f"{'a' * 50}{middle}{'b' * 50}" / "metrics.jsonl" for middle in "xy"]
    assert names_of(long) == [f"{'a' * 19}…{'b' * 19} (1)", f"{'a' * 19}…{'b' * 19} (2)"]


@given(st.sets(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=4).map(tuple), min_size=1))
def test_names_of_different_runs_are_different_and_parts_of_their_folders(folders):
    paths = [Path("/", *folder, "metrics.jsonl") for folder in sorted(folders)]
    names = names_of(paths)
    assert len(set(names)) == len(names)
    for name, path in zip(names, paths, strict=True):
        assert f"/{name.split(' ')[0]}/" in str(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("time/teacher_general", "time/general/teacher"),
        ("time/teacher_role_play_hidden", "time/role_play/teacher_hidden"),
        ("time/teacher_general_idle", "time/general/teacher_idle"),
        ("time/general/teacher_hidden", "time/general/teacher_hidden"),
        ("gap/teacher_general/mean", "gap/teacher_general/mean"),
    ],
)
def test_metric_of_an_older_run_is_read_by_its_name_of_now(old, new, tmp_path):
    assert new_name(old) == new
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "branch": "general", old: 2.5}) + "\n")
    frame, _ = read_run(tmp_path / "metrics.jsonl")
    assert frame[new].tolist() == [2.5] and (old == new or old not in frame)
