"""Held-out gaps from what runs write (camopd/measured.py)."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd.measured import HELD_OUT, STATE, lines_of, of_history, of_lines, of_metrics, of_run


def line(step, branch="general", kl=0.5, **more):
    return {"step": step, "branch": branch, "kl": kl, "kl_se": 0.1, "gap_abs": 0.7, "prompts": 2,
            "kl_by_prompt": [0.4, kl], "of": "p", "length": 10.0 + step, **more}  # fmt: skip


def entry(step, branch="general", kl=0.5):
    names = {"kl": kl, "kl_se": 0.1, "gap_abs": 0.7, "prompts": 2}
    names["completions/mean_length"] = 10.0 + step
    return {"step": step, **{f"eval_{branch}_{name}": value for name, value in names.items()}}


def write(folder, *lines, name=HELD_OUT):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(f"{json.dumps(each)}\n" for each in lines))


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["general", "domain"]), st.floats(0, 3))))
def test_lines_give_every_evaluation_once_and_in_order(evaluations):
    found = of_lines([line(*each) for each in evaluations])
    assert sum(map(len, found.values())) == len(evaluations)
    for branch, measured in found.items():
        assert [(each.step, each.kl) for each in measured] == [(s, kl) for s, b, kl in evaluations if b == branch]
    assert found == of_history([entry(*each) for each in evaluations], [line(*each) for each in evaluations])


def test_lines_after_the_best_model_was_loaded_are_of_that_model():
    lines = [line(0), line(10, kl=0.3), line(20, kl=0.4), {"step": 10, "loaded": True}, line(10, kl=0.31)]
    assert [each.kl for each in of_lines(lines)["general"]] == [0.5, 0.3, 0.31]


def test_history_without_lines_has_no_values_of_prompts():
    history = [{"loss": 1.0, "step": 1}, entry(0), {**entry(5, kl=None), "eval_kl": 3.0}]
    found = of_history(history, [line(0, kl=0.49)])  # of another evaluation
    assert [(each.step, each.by_prompt, each.prompts) for each in found["general"]] == [(0, (), 2)]


def test_run_is_read_from_its_lines_then_from_its_state_then_from_its_newest_checkpoint(tmp_path):
    assert of_run(tmp_path) == ({}, None)
    for step in (9, 10):
        state = {"global_step": step, "log_history": [entry(0), entry(step)]}
        write(tmp_path / f"checkpoint-{step}", state, name="trainer_state.json")
    found, last = of_run(tmp_path)
    assert ([each.step for each in found["general"]], last) == ([0, 10], 10)
    write(tmp_path, {"global_step": 12, "log_history": [entry(12)]}, name="trainer_state.json")
    assert of_run(tmp_path)[1] == 12
    write(tmp_path, line(0), line(12))
    found, last = of_run(tmp_path)
    assert (found["general"][0].by_prompt, last) == ((0.4, 0.5), 12)
    write(tmp_path, line(0), line(12), {"step": 6, "loaded": True})
    assert of_run(tmp_path)[1] == 6


def test_run_that_goes_on_to_more_steps_is_not_measured_by_the_state_of_its_first_end(tmp_path):
    """That one is written at the end of training, and the verdict is said before."""
    write(tmp_path, {"global_step": 40, "log_history": [entry(0), entry(40)]}, name=STATE)
    write(tmp_path, *({"step": step, "branch": "general"} for step in range(1, 121)), name="metrics.jsonl")
    write(tmp_path, line(0), line(40), line(120))
    assert of_run(tmp_path)[1] == 120
    (tmp_path / HELD_OUT).unlink()
    assert of_run(tmp_path) == ({}, 120)
    write(tmp_path / "checkpoint-80", {"global_step": 80, "log_history": [entry(0), entry(80)]}, name=STATE)
    write(tmp_path / "checkpoint-160", {"global_step": 160, "log_history": [entry(160)]}, name=STATE)
    found, last = of_run(tmp_path)
    assert ([each.step for each in found["general"]], last) == ([0, 80], 120)


def test_state_in_the_checkpoint_of_another_run_is_not_this_ones(tmp_path):
    write(tmp_path, {"run_id": "two"}, name="_run.json")
    write(tmp_path, {"step": 9, "branch": "general"}, name="metrics.jsonl")
    for step, run_id in ((4, "two"), (6, "one")):
        checkpoint = tmp_path / f"checkpoint-{step}"
        write(checkpoint, {"global_step": step, "log_history": [entry(step)]}, name=STATE)
        write(checkpoint, {"run_id": run_id}, name="camopd.json")
    assert [each.step for each in of_run(tmp_path)[0]["general"]] == [4]


def test_steps_of_a_run_are_those_of_its_last_whole_line(tmp_path):
    write(tmp_path, {"step": 3, "branch": "general"}, name="metrics.jsonl")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "bra')
    assert of_run(tmp_path) == ({}, 3)


def test_metrics_of_an_earlier_run_go_with_its_evaluations(tmp_path):
    for mark, kl in (("", 0.1), ("-1", 0.7)):
        write(tmp_path, {"step": 9, "branch": "general"}, name=f"metrics{mark}.jsonl")
        write(tmp_path, line(9, kl=kl), name=f"held_out{mark}.jsonl")
        assert [each.kl for each in of_metrics(tmp_path / f"metrics{mark}.jsonl")[0]["general"]] == [kl]
    write(tmp_path, {"global_step": 5, "log_history": [entry(5)]}, name="trainer_state-2.json")
    write(tmp_path, {"step": 5, "branch": "general"}, name="metrics-2.jsonl")
    assert of_metrics(tmp_path / "metrics-2.jsonl") == (of_history([entry(5)]), 5)
    for name in ("metrics-3.jsonl", "copy.jsonl", "metrics-a.jsonl"):
        assert of_metrics(tmp_path / name) == ({}, None)


def test_line_without_a_branch_is_named(tmp_path):
    write(tmp_path, line(0), {"step": 3, "kl": 0.1})
    with pytest.raises(ValueError, match=r"line 2 of .*held_out.jsonl' is not an evaluation"):
        of_run(tmp_path)


def test_lines_that_other_tools_have_written_are_as_many_and_have_their_numbers(tmp_path):
    """As they are in the file: with blank ones between, and U+2028 in a text."""
    texts = [json.dumps(line(step, of="a\u2028b\x85"), ensure_ascii=False) for step in (0, 1)]
    (tmp_path / HELD_OUT).write_text("".join(f"\n{text}\n" for text in texts), encoding="utf-8")
    assert [each["step"] for each in lines_of(tmp_path / HELD_OUT)] == [0, 1]
    with open(tmp_path / HELD_OUT, "a", encoding="utf-8") as file:
        file.write('{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 5 of .*held_out.jsonl' is not an evaluation"):
        lines_of(tmp_path / HELD_OUT)


def test_line_that_a_crash_has_cut_is_left_out_and_no_other(tmp_path):
    write(tmp_path, line(0))
    with open(tmp_path / HELD_OUT, "a") as file:
        file.write('{"step": 1, "bra')
    assert [each["step"] for each in lines_of(tmp_path / HELD_OUT)] == [0]
    with open(tmp_path / HELD_OUT, "a") as file:
        file.write(f"\n{json.dumps(line(2))}\n")
    with pytest.raises(ValueError, match=r"line 2 of .*held_out.jsonl.* is not an evaluation: '\{\"step\": 1, \"bra'"):
        lines_of(tmp_path / HELD_OUT)
