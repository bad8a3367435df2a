"""What is there of earlier runs, said before torch is imported."""

import json
import subprocess
import sys

import pytest
from conftest import make_model
from fake_vllm import other_tokenizer
from trainers import make_trainer

from camopd.errors import CaMOPDError, ResumeError
from camopd.output_dir import need_checkpoint, need_same_run, need_same_run_as, need_unused


RECORD = {
    "schedule": "general:3,domain:1", "prompts_per_step": 8, "seed": 42, "learning_rate": 4e-05,
    "max_completion_length": 64,
    "teachers": {"general": "org/base", "domain": "start"}, "student": {"name": "org/start"}, "loss_prefix_tokens": None,
}  # fmt: skip
SAME = {
    "schedule": "general:3,domain:1", "prompts_per_step": 8, "learning_rate": "4e-5",
    "max_completion_length": {0: 32, 5: 64},
    "teachers": {"general": "org/base", "domain": "./models/start"}, "output_dir": "elsewhere", "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """The folder of a run with two checkpoints, of which the one with fewer steps was saved last, and a broken one."""
    for step, saved in ((4, 2.0), (8, 1.0)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "camopd.json").write_text(json.dumps(RECORD))
        (folder / "manifest.json").write_text(json.dumps({"files": {}, "saved": saved}))
    (tmp_path / "run" / "checkpoint-12").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 7}\n{"step": 8}\n')
    return tmp_path / "run"


@pytest.mark.parametrize("there", ["", "runs", "runs/mine", "runs/mine/notes"])
def test_trainer_that_refuses_a_teacher_leaves_the_folders_as_they_were(there, tmp_path, tokenizer):
    make_model(2).save_pretrained(tmp_path / "other")
    other_tokenizer().save_pretrained(tmp_path / "other")
    (tmp_path / "place" / there).mkdir(parents=True)
    before = sorted((tmp_path / "place").rglob("*"))
    with pytest.raises(ValueError, match="another tokenizer than the student"):
        make_trainer(
            tmp_path / "place" / "runs" / "mine", tokenizer,
            teachers={"general": str(tmp_path / "other"), "domain": make_model(1)},
        )  # fmt: skip
    assert sorted((tmp_path / "place").rglob("*")) == before


def test_used_folder_says_whose_it_is(run):
    with pytest.raises(CaMOPDError, match=r"That run: of the student 'org/start', 8 steps, last written 20\d\d-"):
        need_unused(run, overwrite=False)
    need_unused(run, overwrite=True)
    need_unused(run.parent, overwrite=False)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1', "\xff"])
def test_folder_that_cannot_say_whose_it_is_is_refused_all_the_same(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(CaMOPDError, match=r"has the files of another run: metrics\.jsonl\. Go on"):
        need_unused(tmp_path, overwrite=False)


def test_folder_of_a_run_is_no_checkpoint_and_the_newest_is_named(run):
    with pytest.raises(
        ResumeError, match=r"is the folder of a run, not a checkpoint.*newest one is '.*/checkpoint-4'"
    ):
        need_checkpoint(str(run))
    need_checkpoint(str(run / "checkpoint-8"))


def test_checkpoint_that_is_not_there_is_not_looked_for_on_the_hub(run, monkeypatch):
    with pytest.raises(
        ResumeError, match=r"checkpoint-5' is not a folder on this machine\. The newest one .*checkpoint-4"
    ):
        need_checkpoint(str(run / "checkpoint-5"))
    monkeypatch.chdir(run.parent)
    for path in ("run/gone", "./gone", "gone/checkpoint-5", "~/no/such"):
        with pytest.raises(ResumeError, match=rf"{path}' is not a folder on this machine\."):
            need_checkpoint(path)
    with pytest.raises(ResumeError, match=r"'nowhere' is neither a folder here nor owner/name on the Hub"):
        need_checkpoint("nowhere")


@pytest.mark.parametrize("given", [None, True, False, "auto", "True", "owner/model"])
def test_what_may_be_a_checkpoint_is_left_to_the_trainer(given):
    need_checkpoint(given)


def test_run_with_the_settings_of_the_checkpoint_may_be_the_same(run):
    need_same_run(run / "checkpoint-4", SAME)
    need_same_run(run / "checkpoint-4", {})
    need_same_run(run / "checkpoint-12", SAME)  # of which the trainer says more
    served = {"general": {"urls": "http://x", "model": "m"}, "domain": "adapter_off"}
    need_same_run(run / "checkpoint-4", {**SAME, "teachers": served})  # its name is known when it answers


def test_newest_checkpoint_of_the_run_itself_is_compared(run):
    other = {**SAME, "seed": 7}
    for given in (True, "auto", "true"):
        need_same_run_as(given, run, SAME)
        with pytest.raises(ResumeError, match=r"checkpoint-4' belongs to another run:\n  seed: 42 then, 7 now"):
            need_same_run_as(given, run, other)
    (run / "_run.json").write_text('{"run_id": "mine"}')
    need_same_run_as("auto", run, {**other, "seed": 42})
    (run / "checkpoint-4" / "camopd.json").write_text(json.dumps({**RECORD, "run_id": "another"}))
    need_same_run_as("auto", run, other)  # it goes on from an older one, or says what else is wrong
    need_same_run_as("auto", run.parent, other)
    with pytest.raises(ResumeError, match=r"there is no checkpoint in .* to go on from"):
        need_same_run_as(True, run.parent, other)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"schedule": "general:1+domain:1"}, "schedule: 'general:3,domain:1' then, 'general:1[+]domain:1' now"),
        ({"learning_rate": 1e-5}, "learning_rate: 4e-05 then, 1e-05 now"),
        ({"max_completion_length": 32}, "max_completion_length: 64 then, 32 now"),
        ({"teachers": {"general": "org/other"}}, "teacher of general: 'org/base' then, 'org/other' now"),
    ],
)
def test_other_settings_are_those_of_another_run(run, change, line):
    with pytest.raises(ResumeError, match=rf"belongs to another run:\n  {line}\nRestore these settings"):
        need_same_run(run / "checkpoint-4", {**SAME, **change})


def test_nothing_heavy_is_imported():
    code = (
        "import sys, camopd.output_dir, camopd.surroundings; print(sorted({'torch', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
