"""metrics.jsonl: no line is lost, cut in half or made up, whatever stops a run or a disk."""

import errno
import json
import logging
import os
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainers import lines, make_trainer
from transformers import TrainerCallback

from camopd.callbacks.metrics_file import MetricsFile
from camopd.errors import CaMOPDError
from camopd.measured import of_run
from camopd.step import Step


def file_of(folder, step=0, gather=lambda mine: mine, is_first=True):
    """The callback of a run that begins or goes on at a step."""
    callback = MetricsFile(gather)
    state = SimpleNamespace(is_world_process_zero=is_first, global_step=step)
    callback.on_train_begin(SimpleNamespace(output_dir=str(folder)), state, None)
    return callback


def write(callback, step, **metrics):
    closed = Step(step, ("general",))
    closed.metrics.update({"branch": "general", "loss": 0.5, **metrics})
    callback.on_step_closed(closed)
    callback.on_step_end(None, None, None)


def line(step, **more):
    return json.dumps({"step": step, "loss": 0.5, **more})


def test_metrics_file_has_a_line_per_step_and_null_for_what_is_not_finite(tmp_path):
    callback = file_of(tmp_path)
    for step in range(2):
        write(callback, step, grad_norm=float("inf"))
    assert [(each["step"], each["grad_norm"]) for each in lines(tmp_path)] == [(1, None), (2, None)]


def test_new_run_renames_the_file_of_the_one_before(tmp_path):
    for name in ("metrics.jsonl", "metrics-1.jsonl"):
        (tmp_path / name).write_text(name)
    write(file_of(tmp_path), 0)
    assert (tmp_path / "metrics-2.jsonl").read_text() == "metrics.jsonl"
    assert (tmp_path / "metrics-1.jsonl").read_text() == "metrics-1.jsonl"
    assert len(lines(tmp_path)) == 1


def test_resumed_run_keeps_the_lines_up_to_its_checkpoint_as_they_are(tmp_path):
    kept = f'{line(1)}\n{{"step":2,   "loss": 1e-3}}\n'
    (tmp_path / "metrics.jsonl").write_text(f'{kept}{line(3)}\n{line(4)}\n{{"step": 5, "lo')
    file_of(tmp_path, step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == kept


STRANGE = [
    "null", "[1]", "3", '"text"', "{}", '{"step": "4"}', '{"step": null}', '{"step": true}', '{"step": NaN}',
    '{"step": Infinity}', '{"loss": 1}', "{", "nonsense", "[" * 100_000, "\x00", '{"step": [1]}', "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("strange", STRANGE, ids=lambda text: text[:12])
def test_strange_line_is_left_out_and_named_once(strange, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("camopd"), "propagate", True)
    (tmp_path / "metrics.jsonl").write_text(f"{line(1)}\n{strange}\n{line(2)}\n")
    file_of(tmp_path, step=2)
    assert [each["step"] for each in lines(tmp_path)] == [1, 2]
    (said,) = [record.message for record in caplog.records]
    assert "line 2" in said and "left out" in said and len(said) < 500


def test_lines_that_are_not_utf_8_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\xfe{"step": 1}\n' + line(2).encode() + b"\n")
    file_of(tmp_path, step=2)
    assert [each["step"] for each in lines(tmp_path)] == [2]


def test_last_line_that_was_cut_short_is_left_out_without_a_word(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text(f'{line(1)}\n{{"step": 2, "lo')
    write(file_of(tmp_path, step=1), 1)
    assert [each["step"] for each in lines(tmp_path)] == [1, 2]
    assert not caplog.records


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.one_of(st.binary(max_size=12), st.integers(-3, 9).map(lambda step: line(step).encode()))),
    st.integers(1, 9),
)
def test_metrics_file_keeps_whole_lines_up_to_the_checkpoint_in_order(tmp_path, content, step):
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(content))
    file_of(tmp_path, step=step)
    found = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    ours = [each for each in content if each.startswith(b'{"step": ') and json.loads(each)["step"] <= step]
    assert [each for each in found if each in ours] == ours
    assert all(json.loads(each)["step"] <= step for each in found)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_resume_that_cannot_rewrite_the_file_leaves_it_as_it_was(call, tmp_path, monkeypatch):
    before = f"{line(1)}\n{line(2)}\n{line(3)}\n"
    (tmp_path / "metrics.jsonl").write_text(before)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(
        CaMOPDError, match=r"metrics.jsonl' cannot be written: No space left on device.* is full: free some"
    ):
        file_of(tmp_path, step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


class Disk:
    """A file of a disk that takes so many bytes, at most `at_once` in a write, and then has no space left."""

    def __init__(self, path, takes, at_once=10**9):
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115
        self.takes, self.at_once = takes, at_once

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if not self.takes:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(data[: min(self.takes, self.at_once)])
        self.takes -= taken
        return taken


def use_disk(monkeypatch, *how):
    opened = "camopd.run_folder.open"
    monkeypatch.setattr(opened, lambda path, *_, **__: Disk(path, *how), raising=False)


@pytest.mark.parametrize("takes", [0, 1, 10])
def test_full_disk_leaves_no_half_line_and_an_error_that_says_what_to_do(takes, tmp_path, monkeypatch):
    callback = file_of(tmp_path)
    write(callback, 0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    use_disk(monkeypatch, takes)
    with pytest.raises(
        CaMOPDError,
        match=r"metrics.jsonl' cannot be written: No space left on device. The disk or quota of '.*' is full: free some, "
        r"and go on from the last checkpoint by `--resume auto`",
    ):
        write(callback, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    monkeypatch.undo()
    write(callback, 1)
    assert [each["step"] for each in lines(tmp_path)] == [1, 2]


def test_write_that_takes_a_part_is_gone_on_with(tmp_path, monkeypatch):
    callback = file_of(tmp_path)
    use_disk(monkeypatch, 10**6, 7)
    write(callback, 0)
    assert lines(tmp_path)[0]["step"] == 1


def test_error_of_the_first_rank_is_one_on_all(tmp_path):
    said = []
    callback = file_of(tmp_path, is_first=False, gather=lambda mine: [*said, *mine])
    write(callback, 0)
    said.append((CaMOPDError, "the file cannot be written"))
    with pytest.raises(CaMOPDError, match="the file cannot be written"):
        write(callback, 1)
    assert os.listdir(tmp_path) == []


def test_run_whose_disk_is_full_stops_with_the_lines_before(tmp_path, tokenizer, monkeypatch):
    class FullAfterStep1(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                use_disk(monkeypatch, 10)

    with pytest.raises(CaMOPDError, match="No space left on device"):
        make_trainer(tmp_path, tokenizer, max_steps=3, callbacks=[FullAfterStep1()]).train()
    assert [each["step"] for each in lines(tmp_path)] == [1]


def test_new_run_keeps_the_metrics_of_the_one_before(tmp_path, tokenizer):
    for _ in range(3):
        make_trainer(tmp_path, tokenizer, max_steps=1, overwrite_output_dir=True).train()
    assert sorted(path.name for path in tmp_path.glob("metrics*.jsonl")) == [
        "metrics-1.jsonl",
        "metrics-2.jsonl",
        "metrics.jsonl",
    ]


class Measured:
    """The results of an evaluation."""

    def record(self):
        return {"branch": "general", "kl": 0.5}


def test_held_out_lines_are_those_of_the_run_and_of_its_checkpoint(tmp_path):
    def evaluate(step, begun=True, loaded=None):
        callback = MetricsFile(lambda mine: mine, Measured)
        args = SimpleNamespace(output_dir=str(tmp_path), load_best_model_at_end=loaded is not None)
        state = SimpleNamespace(is_world_process_zero=True, global_step=step, best_global_step=loaded,
                                best_model_checkpoint=loaded and "there")  # fmt: skip
        if begun:
            callback.on_train_begin(args, state, None)
        for state.global_step in (step, step + 4):
            callback.on_evaluate(args, state, None)
        callback.on_train_end(args, state, None)
        callback.on_evaluate(args, state, None)

    def steps(name="held_out.jsonl"):
        return [json.loads(text)["step"] for text in (tmp_path / name).read_text().splitlines()]

    evaluate(0, begun=False)  # before training the folder is nobody's
    assert os.listdir(tmp_path) == []
    evaluate(0)
    assert steps() == [0, 4, 4]
    evaluate(4)  # goes on from a checkpoint of step 4
    assert steps() == [0, 4, 4, 4, 8, 8]
    evaluate(5, loaded=2)
    assert steps() == [0, 4, 4, 4, 5, 9, 2, 2]  # the model of step 2 was loaded, and measured once more
    evaluate(0)
    assert (steps(), steps("held_out-1.jsonl")[-1]) == ([0, 4, 4], 2)


def test_resumed_run_is_not_that_of_the_best_model_that_was_loaded_before(tmp_path):
    """It goes on from its last step: the evaluations up to there are of the model in hand again."""
    each = [{"step": step, "branch": "general", "kl": step} for step in (0, 2, 4)]
    text = "".join(json.dumps(record) + "\n" for record in [*each, {"step": 2, "loaded": True}])
    (tmp_path / "held_out.jsonl").write_text(text)
    assert (len(of_run(tmp_path)[0]["general"]), of_run(tmp_path)[1]) == (2, 2)
    file_of(tmp_path, step=4)
    found, last = of_run(tmp_path)
    assert ([measured.kl for measured in found["general"]], last) == ([0, 2, 4], None)
