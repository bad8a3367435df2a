"""One run, one folder: what is there of another run is neither taken, mixed in nor lost."""

import json
import os
import shutil

import pytest
from conftest import make_model, make_prompts
from trainers import lines, make_trainer
from transformers import TrainerCallback

from camopd.errors import CaMOPDError, ResumeError, TeacherError
from camopd.folder_lock import LOCK_FILE
from camopd.measured import lines_of, of_run
from camopd.run_folder import RUN_FILE, RunFolder, is_own, need_unused, run_id_of


def make_checkpoint(folder, step=2, run_id=None):
    """A folder that is named like a checkpoint, with the record of a run."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "camopd.json").write_text(json.dumps({"seed": 42, **({"run_id": run_id} if run_id else {})}))
    return path


def use(folder, run_id="one"):
    """A folder as a run leaves it."""
    make_checkpoint(folder, 2, run_id)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "rejected").mkdir()
    (folder / "model.safetensors").write_text("weights")
    (folder / RUN_FILE).write_text(json.dumps({"run_id": run_id}))
    return folder


def begin(folder, checkpoint=None, given=None, overwrite=False, used=()):
    return RunFolder(folder).begin(checkpoint, given, overwrite, *used)


# ---------------------------------------------------------------------------------------------------------- the rules


def test_new_folder_is_that_of_a_new_run(tmp_path):
    (tmp_path / "notes.txt").write_text("of the user")
    ids = {begin(tmp_path / name) for name in "ab" if (tmp_path / name).mkdir() is None} | {begin(tmp_path)}
    assert len(ids) == 3 and all(len(each) == 32 for each in ids)
    assert run_id_of(tmp_path) in ids


@pytest.mark.parametrize("left", ["checkpoint-2", "metrics.jsonl"])
def test_used_folder_is_refused_with_the_choice(left, tmp_path):
    (tmp_path / left).mkdir() if left.startswith("c") else (tmp_path / left).write_text("")
    with pytest.raises(
        CaMOPDError,
        match=rf"has the files of another run: {left}. Go on with that run by `--resume auto` .*'auto'\), give this one "
        "another output_dir, or set overwrite_output_dir=True, which removes its checkpoints and model and renames",
    ):
        begin(tmp_path)
    assert (tmp_path / left).exists() and not (tmp_path / RUN_FILE).exists()


def test_used_folder_may_be_overwritten(tmp_path):
    use(tmp_path)
    assert begin(tmp_path, overwrite=True) == run_id_of(tmp_path) != "one"
    assert sorted(os.listdir(tmp_path)) == [RUN_FILE, "metrics-1.jsonl"]


def test_model_that_is_of_no_run_is_not_removed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    begin(tmp_path, overwrite=True)
    assert (tmp_path / "config.json").exists()


def test_models_that_a_run_names_are_not_overwritten(tmp_path, tokenizer):
    make_model(1).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    out = tmp_path / "out"
    make_model(2).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "metrics.jsonl").write_text("")
    trainer = make_trainer(
        out, tokenizer, model=str(tmp_path / "start"), teachers={"general": str(out), "domain": make_model(1)},
        overwrite_output_dir=True,
    )  # fmt: skip
    with pytest.raises(CaMOPDError, match=r"would remove '.*out', which the run itself needs"):
        trainer.train()
    assert (out / "config.json").exists()


def test_model_of_an_earlier_run_is_not_mixed_with_that_of_a_new_one(tmp_path):
    """An adapter that stays beside a new model would be loaded with it."""
    use(tmp_path)
    files = ["adapter_config.json", "adapter_model.safetensors", "config.json", "model-00001-of-00002.safetensors"]
    for name in [*files, "notes.txt"]:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CaMOPDError, match=r"would remove '.*', which the run itself needs. Give another output_dir"):
        begin(tmp_path, overwrite=True, used=[str(tmp_path)])
    assert set(files) < set(os.listdir(tmp_path))
    begin(tmp_path, overwrite=True, used=[str(tmp_path / "start")])
    assert sorted(os.listdir(tmp_path)) == [RUN_FILE, "metrics-1.jsonl", "notes.txt"]


@pytest.mark.parametrize("given", ["auto", None])
def test_new_run_sets_all_aside_that_an_earlier_one_has_measured_under_one_number(given, tmp_path):
    """Also the Trainer's state, from which a report would take the earlier run's evaluations for its own."""
    names = ["eval_tasks.jsonl", "held_out.jsonl", "metrics.jsonl", "trainer_state.json"]
    for name in [*names, "metrics-1.jsonl", "held_out-2.jsonl"]:
        (tmp_path / name).write_text(name)
    begin(tmp_path, given=given, overwrite=given is None)
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != RUN_FILE}
    marked = {name.replace(".", "-3."): name for name in names}
    assert found == {**marked, "metrics-1.jsonl": "metrics-1.jsonl", "held_out-2.jsonl": "held_out-2.jsonl"}


def test_run_that_goes_on_keeps_what_it_has_measured(tmp_path):
    checkpoint = use(tmp_path) / "checkpoint-2"
    (tmp_path / "trainer_state.json").write_text("{}")
    begin(tmp_path, checkpoint, True)
    assert not list(tmp_path.glob("*-1.*")) and (tmp_path / "trainer_state.json").exists()


def test_student_in_the_folder_is_not_overwritten(tmp_path):
    use(tmp_path)
    with pytest.raises(CaMOPDError, match=r"would remove '.*checkpoint-2', which the run itself needs. Give another"):
        begin(tmp_path, overwrite=True, used=["elsewhere", str(tmp_path / "checkpoint-2")])
    assert (tmp_path / "checkpoint-2").is_dir() and run_id_of(tmp_path) == "one"


@pytest.mark.parametrize("given", [True, "auto", "path"])
def test_overwriting_spares_the_run_that_is_gone_on_with(given, tmp_path):
    checkpoint = use(tmp_path) / "checkpoint-2"
    with pytest.raises(
        ResumeError, match=r"goes on with the run in .*, and overwrite_output_dir=True removes it. Leave"
    ):
        begin(tmp_path, checkpoint, str(checkpoint) if given == "path" else given, overwrite=True)
    assert checkpoint.is_dir()


def test_auto_starts_where_a_run_was_killed_before_its_first_checkpoint(tmp_path):
    use(tmp_path)
    os.remove(tmp_path / "checkpoint-2" / "camopd.json")
    os.rmdir(tmp_path / "checkpoint-2")
    assert begin(tmp_path, given="auto") == run_id_of(tmp_path) != "one"


def test_auto_does_not_start_beside_the_checkpoints_of_another_run(tmp_path):
    use(tmp_path)
    (tmp_path / RUN_FILE).write_text('{"run_id": "two"}')
    with pytest.raises(CaMOPDError, match=r"has the files of another run: checkpoint-2, metrics\.jsonl"):
        begin(tmp_path, given="auto")


def test_run_that_goes_on_keeps_its_id(tmp_path):
    checkpoint = use(tmp_path) / "checkpoint-2"
    assert begin(tmp_path, checkpoint, True) == "one"
    os.remove(tmp_path / RUN_FILE)
    assert begin(tmp_path, str(checkpoint), str(checkpoint)) == "one" == run_id_of(tmp_path)


def test_run_of_an_older_version_goes_on_with_an_id_of_the_folder(tmp_path):
    checkpoint = make_checkpoint(tmp_path)
    run_id = begin(tmp_path, checkpoint, True)
    assert begin(tmp_path, checkpoint, True) == run_id == run_id_of(tmp_path)
    assert is_own(checkpoint)


def test_checkpoint_from_elsewhere_begins_with_its_runs_id_in_an_empty_folder(tmp_path):
    checkpoint, here = use(tmp_path / "there") / "checkpoint-2", tmp_path / "here"
    here.mkdir()
    assert begin(here, checkpoint, str(checkpoint)) == "one" == run_id_of(here)
    (here / "metrics.jsonl").write_text("")
    assert begin(here, checkpoint, str(checkpoint)) == "one"  # killed, and the same command again


def test_checkpoint_from_elsewhere_brings_what_its_run_has_measured(tmp_path):
    checkpoint, here = use(tmp_path / "there") / "checkpoint-2", tmp_path / "here"
    names = ["eval_tasks.jsonl", "held_out.jsonl", "metrics.jsonl"]
    for name in names:
        (checkpoint / name).write_text(name)
    here.mkdir()
    begin(here, checkpoint, str(checkpoint))
    assert sorted(os.listdir(here)) == sorted([RUN_FILE, *names])
    assert all((here / name).read_text() == name for name in names)
    (here / "metrics.jsonl").write_text("shorter")  # of the same run, which has gone on elsewhere since then
    begin(here, checkpoint, str(checkpoint))
    assert (here / "metrics.jsonl").read_text() == "metrics.jsonl" and not (here / "metrics-1.jsonl").exists()
    (here / "metrics.jsonl").write_text("mine")
    begin(here, checkpoint, str(checkpoint), overwrite=True)
    assert [(here / f"metrics{mark}.jsonl").read_text() for mark in ("", "-1")] == ["metrics.jsonl", "mine"]
    other = tmp_path / "other"  # of a run that was killed before its first step
    other.mkdir()
    (other / "held_out.jsonl").write_text("of another run")
    begin(other, checkpoint, str(checkpoint))
    assert [(other / f"held_out{mark}.jsonl").read_text() for mark in ("", "-1")] == [
        "held_out.jsonl",
        "of another run",
    ]
    fetched = here / "last-checkpoint"  # of the Hub, into the run's own folder
    shutil.copytree(checkpoint, fetched)
    for name in names:
        (here / name).unlink()
    begin(here, fetched, str(fetched))
    assert all((here / name).read_text() == name for name in names)
    for name in names:  # in its own folder the run's files count, as they are or are not
        (checkpoint / name).write_text("of the checkpoint")
    begin(tmp_path / "there", checkpoint, True)
    assert (tmp_path / "there" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not (tmp_path / "there" / "held_out.jsonl").exists()


def test_checkpoint_from_elsewhere_is_not_mixed_with_another_run(tmp_path):
    checkpoint, here = use(tmp_path / "there") / "checkpoint-2", use(tmp_path / "here", "two")
    with pytest.raises(CaMOPDError, match="has the files of another run"):
        begin(here, checkpoint, str(checkpoint))
    assert begin(here, checkpoint, str(checkpoint), overwrite=True) == "one"
    assert sorted(os.listdir(here)) == [RUN_FILE, "metrics-1.jsonl"]


@pytest.mark.parametrize(
    ("of_checkpoint", "of_folder", "expected"),
    [("one", "one", True), ("one", "two", False), (None, "two", True), ("one", None, True), (None, None, True)],
)
def test_checkpoint_is_own_unless_it_says_otherwise(of_checkpoint, of_folder, expected, tmp_path):
    checkpoint = make_checkpoint(tmp_path, run_id=of_checkpoint)
    if of_folder:
        (tmp_path / RUN_FILE).write_text(json.dumps({"run_id": of_folder}))
    assert is_own(checkpoint) is expected


@pytest.mark.parametrize("content", ["", "null", "[]", '{"run_id": 3}', "[" * 100_000])
def test_folder_whose_id_cannot_be_read_has_none(content, tmp_path):
    (tmp_path / RUN_FILE).write_text(content)
    assert run_id_of(tmp_path) is None


def test_folder_is_looked_at_by_the_main_rank_for_all(tmp_path, monkeypatch):
    """A rank that raised alone would leave the others in the next collective."""
    of_main: list = []

    def begin(is_main):
        """The main rank is the first, and the other one gets what it has sent, in turn."""
        sent = [] if is_main else list(of_main)

        def gather(mine):
            of_main.extend(mine if is_main else [])
            return [*mine, None] if is_main else [sent.pop(0), *mine]

        monkeypatch.setattr("camopd.run_folder.gather_object", gather)
        return RunFolder(tmp_path, is_main).begin(None, None, False)

    assert [begin(True), begin(False)] == [run_id_of(tmp_path)] * 2
    (tmp_path / "metrics.jsonl").write_text("")
    of_main.clear()
    for is_main in (True, False):
        with pytest.raises(CaMOPDError, match="has the files of another run"):
            begin(is_main)


def test_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(
            CaMOPDError, match=r"the output_dir '.*file/out' cannot be used: .*Not a directory.* Give another one"
        ),
        RunFolder(tmp_path / "file" / "out").locked(),
    ):
        pass


def test_folder_is_not_used_by_files_of_no_run(tmp_path):
    for name in ("checkpoint-best", "completions", "_saving"):
        (tmp_path / name).mkdir()
    for name in ("README.md", "metrics-1.jsonl", RUN_FILE, LOCK_FILE):
        (tmp_path / name).write_text("")
    need_unused(tmp_path, overwrite=False)


# ---------------------------------------------------------------------------------------------------------- real runs


class StopAt(TrainerCallback):
    """As a kill does, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


def losses(folder):
    return [(line["step"], line["loss"]) for line in lines(folder)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, tokenizer, **SAVING).train()
    return folder


def copy_of(finished, folder):
    import shutil

    return shutil.copytree(finished, folder / "out")


def test_finished_run_is_not_taken_by_another_student(finished, tmp_path, tokenizer):
    out = copy_of(finished, tmp_path)
    with pytest.raises(
        CaMOPDError, match="has the files of another run: checkpoint-2, checkpoint-4, checkpoint-6 and 1"
    ):
        make_trainer(out, tokenizer, model=make_model(3), **SAVING).train()
    for resume in (True, "auto"):
        with pytest.raises(ResumeError, match=r"(?s)belongs to another run:\n  student: "):
            make_trainer(out, tokenizer, model=make_model(3), **SAVING).train(resume_from_checkpoint=resume)
    assert losses(out) == losses(finished)


def test_second_run_of_the_same_settings_goes_on_from_its_own_checkpoint(finished, tmp_path, tokenizer):
    """Stopped after step 3, it would have gone on from the checkpoint-6 of the first one, and so have ended."""
    out = copy_of(finished, tmp_path)
    again = make_trainer(out, tokenizer, **SAVING, overwrite_output_dir=True, callbacks=[StopAt(3)])
    with pytest.raises(KeyboardInterrupt):
        again.train()
    assert (out / LOCK_FILE).read_text() == ""
    resumed = make_trainer(out, tokenizer, **SAVING)
    resumed.train(resume_from_checkpoint="auto")
    assert losses(out) == losses(finished)
    assert losses_of(out / "metrics-1.jsonl") == losses(finished)
    assert run_id_of(out) != run_id_of(finished)
    for step in (2, 4, 6):
        record = json.loads((out / f"checkpoint-{step}" / "camopd.json").read_text())
        assert record["run_id"] == run_id_of(out)


def losses_of(path):
    return [(line["step"], line["loss"]) for line in map(json.loads, path.read_text().splitlines())]


def test_runs_at_once_are_refused_and_the_first_goes_on(tmp_path, tokenizer):
    refused = []

    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with pytest.raises(CaMOPDError, match=f"is in use: a run trains in it, process {os.getpid()} on"):
                    make_trainer(tmp_path, tokenizer, max_steps=4).train(resume_from_checkpoint="auto")
                refused.append(state.global_step)

    make_trainer(tmp_path, tokenizer, max_steps=4, callbacks=[Second()]).train()
    assert refused == [2] and [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4]


def test_new_run_without_evaluations_has_no_verdict_of_the_run_before(tmp_path, tokenizer, capsys):
    """As with `camopd train`, which leaves the Trainer's state at the end."""
    held_out = {"eval_dataset": {"general": make_prompts("general", 2)}, "eval_strategy": "steps", "eval_steps": 2,
                "eval_on_start": True}  # fmt: skip
    first = make_trainer(tmp_path, tokenizer, max_steps=2, **held_out)
    first.train()
    first.save_state()
    assert of_run(tmp_path)[0] and "Not known" not in capsys.readouterr().out
    make_trainer(tmp_path, tokenizer, max_steps=2, overwrite_output_dir=True).train()
    assert of_run(tmp_path) == ({}, 2)
    said = capsys.readouterr().out
    assert "is not known: no held-out prompts were measured" in " ".join(said.split())


def test_trainer_may_train_twice(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, save_strategy="steps", save_steps=1)
    ids = set()
    for _ in range(2):
        trainer.train()
        ids.add(json.loads((tmp_path / "checkpoint-1" / "camopd.json").read_text())["run_id"])
    assert len(ids) == 2
    assert len(lines(tmp_path)) == 1 and (tmp_path / "metrics-1.jsonl").exists()


def test_auto_starts_goes_on_and_ends_with_the_losses_of_one_run(finished, tmp_path, tokenizer):
    for stop in (1, 3, None):  # before the first checkpoint, and after it
        callbacks = [] if stop is None else [StopAt(stop)]
        trainer = make_trainer(tmp_path, tokenizer, **SAVING, callbacks=callbacks)
        try:
            trainer.train(resume_from_checkpoint="auto")
        except KeyboardInterrupt:
            assert stop is not None
    assert losses(tmp_path) == losses(finished)


def test_run_that_goes_on_in_another_folder_has_its_first_evaluation_and_all_its_steps(tmp_path, tokenizer, capsys):
    """As from the Hub: without them the verdict was not known, and the next push had lost the steps before."""
    settings = {"eval_dataset": {"general": make_prompts("general", 2)}, "eval_strategy": "steps", "eval_steps": 2,
                "eval_on_start": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}  # fmt: skip
    make_trainer(tmp_path / "one", tokenizer, **settings).train()
    capsys.readouterr()
    copied = tmp_path / "fetched" / "last-checkpoint"
    shutil.copytree(tmp_path / "one" / "checkpoint-2", copied)
    make_trainer(tmp_path / "two", tokenizer, **settings).train(resume_from_checkpoint=str(copied))
    assert "not known" not in capsys.readouterr().out
    assert [line["step"] for line in lines(tmp_path / "two")] == [1, 2, 3, 4]
    for name in ("held_out.jsonl", "metrics.jsonl"):
        alone, moved = (
            [{key: value for key, value in json.loads(line).items() if not key.startswith("time/")} for line in
             (tmp_path / folder / name).read_text().splitlines()] for folder in ("one", "two")
        )  # fmt: skip
        assert [line["step"] for line in alone] == [line["step"] for line in moved]
        if name == "held_out.jsonl":
            assert alone == moved


def test_run_that_was_stopped_in_its_first_step_has_its_first_evaluation_when_it_goes_on(tmp_path, tokenizer):
    settings = {"eval_dataset": {"general": make_prompts("general", 2)}, "eval_strategy": "steps", "eval_steps": 2,
                "eval_on_start": True, "max_steps": 2, "save_strategy": "no"}  # fmt: skip
    first = make_trainer(tmp_path / "one", tokenizer, **settings)
    score, calls = first.teachers["general"].score, []

    def once(*rows):
        calls.append(rows)
        if len(calls) > 1:
            raise TeacherError("it is gone")
        return score(*rows)

    first.teachers["general"].score = once
    with pytest.raises(TeacherError, match="Nothing is lost"):
        first.train()
    shutil.copytree(tmp_path / "one" / "checkpoint-0", tmp_path / "moved" / "checkpoint-0")
    for folder, given in (("two", str(tmp_path / "moved" / "checkpoint-0")), ("one", "auto")):
        make_trainer(tmp_path / folder, tokenizer, **settings).train(resume_from_checkpoint=given)
        assert [line["step"] for line in lines_of(tmp_path / folder / "held_out.jsonl")] == [0, 2]
