"""A run that is stopped and resumed is the run that was not stopped."""

import contextlib
import json
import shutil

import pytest
import torch
from conftest import make_model, make_prompts
from fake_vllm import FakeVLLM
from trainers import lines, make_trainer
from transformers import TrainerCallback

from camopd.errors import ResumeError, TeacherError
from camopd.prompts import StepDataset


STEPS = 6


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokenizer):
    """Six steps with a checkpoint after each, the prompts every step saw, and the final parameters."""
    folder = tmp_path_factory.mktemp("undisturbed")
    prompts, parameters = train(folder, tokenizer)
    return folder, prompts, parameters


def train(folder, tokenizer, resume=None, **kwargs):
    trainer = make_trainer(folder, tokenizer, max_steps=STEPS, save_strategy="steps", save_steps=1, **kwargs)
    prompts = []
    begin = trainer.begin_step
    trainer.begin_step = lambda rows: prompts.append([(row["branch"], row["prompt"]) for row in rows]) or begin(rows)
    trainer.train(resume_from_checkpoint=resume)
    return prompts, [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("stopped_after", [1, 3, 4, 5])
def test_resume_at_any_step_gives_the_same_prompts_branches_losses_and_weights(
    stopped_after, undisturbed, tmp_path, tokenizer
):
    folder, expected_prompts, expected_parameters = undisturbed
    shutil.copytree(folder / f"checkpoint-{stopped_after}", tmp_path / f"checkpoint-{stopped_after}")
    shutil.copy(folder / "metrics.jsonl", tmp_path / "metrics.jsonl")  # as left by a run that died further on
    prompts, parameters = train(tmp_path, tokenizer, resume=str(tmp_path / f"checkpoint-{stopped_after}"))
    assert prompts == expected_prompts[stopped_after:]
    for key in ("step", "branch", "loss", "grad_norm", "learning_rate"):
        assert [line[key] for line in lines(tmp_path)] == [line[key] for line in lines(folder)], key
    for found, expected in zip(parameters, expected_parameters, strict=True):
        assert torch.equal(found, expected)


def test_resume_true_takes_the_last_checkpoint(undisturbed, tmp_path, tokenizer):
    folder, expected_prompts, _ = undisturbed
    for step in (2, 4):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    prompts, _ = train(tmp_path, tokenizer, resume=True)
    assert prompts == expected_prompts[4:]


def test_resume_of_streamed_prompts_is_at_the_right_row(tmp_path, tokenizer):
    streams = lambda: {name: make_prompts(name).to_iterable_dataset() for name in ("general", "domain")}  # noqa: E731
    expected, _ = train(tmp_path / "one", tokenizer, train_dataset=streams())
    shutil.copytree(tmp_path / "one" / "checkpoint-3", tmp_path / "two" / "checkpoint-3")
    found, _ = train(tmp_path / "two", tokenizer, resume=True, train_dataset=streams())
    assert found == expected[3:]


def test_resume_with_a_dealer_that_forgets_the_step_is_caught_by_its_branch(
    undisturbed, tmp_path, tokenizer, monkeypatch
):
    # Resumed after step 3, the next step is the domain's. A data order that starts over would deal general prompts.
    folder, _, _ = undisturbed
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    rows_of = StepDataset.rows_of
    monkeypatch.setattr(StepDataset, "rows_of", lambda self, step: rows_of(self, step - 3))
    with pytest.raises(RuntimeError, match=r"step 3 got prompts of \['general'\].*wants \['domain'\]"):
        train(tmp_path, tokenizer, resume=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"schedule": "general:1,domain:1"}, r"schedule: 'general:3,domain:1' then, 'general:1,domain:1' now"),
        ({"seed": 7}, r"seed: 42 then, 7 now"),
        ({"prompts_per_step": 8}, r"prompts_per_step: 4 then, 8 now"),
        ({"scale": 1.0}, r"scale: \{'general': 2.0, 'domain': 1.0\} then, \{'general': 1.0, 'domain': 1.0\} now"),
        ({"mass_target": 0.5}, r"mass_target: .*0.8.* then, .*0.5.* now"),
        ({"learning_rate": 1e-3}, r"learning_rate: 0.01 then, 0.001 now"),
        (
            {"train_dataset": {name: make_prompts(name, 5) for name in ("general", "domain")}},
            r"prompts: .*11 rows.*5 rows",
        ),
        ({"model": make_model(3)}, r"student: .* then, .* now"),
        ({"max_grad_norm": 0.5}, r"max_grad_norm: 1.0 then, 0.5 now"),
        ({"optim": "sgd"}, r"optim: 'adamw_torch_fused' then, 'sgd' now"),
        ({"lr_scheduler_type": "linear"}, r"lr_scheduler_type: 'constant' then, 'linear' now"),
        (
            {"weight_decay": 0.1, "adam_beta2": 0.9},
            r"weight_decay: 0.0 then, 0.1 now\n  adam_beta2: 0.999 then, 0.9 now",
        ),
    ],
    ids=[
        "schedule",
        "seed",
        "prompts_per_step",
        "scale",
        "mass_target",
        "learning_rate",
        "prompts",
        "student",
        "clipping",
        "optim",
        "lr_scheduler_type",
        "weight decay",
    ],
)
def test_resume_of_another_run_is_refused(kwargs, message, undisturbed, tmp_path, tokenizer):
    folder, _, _ = undisturbed
    trainer = make_trainer(tmp_path, tokenizer, max_steps=STEPS, **kwargs)
    with pytest.raises(ResumeError, match=message):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def test_resume_with_another_teacher_is_refused(undisturbed, tmp_path, tokenizer):
    folder, _, _ = undisturbed
    make_model(2).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    teachers = {"general": str(tmp_path / "other"), "domain": make_model(1)}
    trainer = make_trainer(tmp_path, tokenizer, max_steps=STEPS, teachers=teachers)
    with pytest.raises(ResumeError, match=r"teachers: .*'loaded model'.*then.*other"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def test_resume_from_a_folder_that_is_not_our_checkpoint_is_refused(undisturbed, tmp_path, tokenizer):
    folder, _, _ = undisturbed
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "camopd.json").unlink()
    with pytest.raises(ResumeError, match=r"has no camopd.json: it is not a checkpoint of CaMOPDTrainer"):
        make_trainer(tmp_path, tokenizer).train(resume_from_checkpoint=True)


def test_resume_does_not_seek_on_the_hub_a_checkpoint_that_another_machine_has(tmp_path, tokenizer, monkeypatch):
    """That machine would not come to the fetch, where this one waits for all."""
    asked = []
    monkeypatch.setattr("camopd.checkpoints.gather_object", lambda mine: asked.append(mine) or [*mine, False])
    monkeypatch.setattr("camopd.checkpoints.snapshot_download", None)
    with pytest.raises(ResumeError, match=r"cannot go on from 'run/checkpoint-3': it has no camopd.json"):
        make_trainer(tmp_path, tokenizer).train(resume_from_checkpoint="run/checkpoint-3")
    assert asked[0] == [True]


def test_resume_without_any_checkpoint_says_so(tmp_path, tokenizer):
    with pytest.raises(ResumeError, match=r"there is no checkpoint in .* Start without"):
        make_trainer(tmp_path, tokenizer).train(resume_from_checkpoint=True)


def test_checkpoints_all_remember_the_run(undisturbed):
    folder, _, _ = undisturbed
    record = json.loads((folder / "checkpoint-3" / "camopd.json").read_text())
    assert record["schedule"] == "general:3,domain:1"
    assert record["branches"] == ["general", "domain"]
    assert set(record["teachers"]) == {"general", "domain"}
    assert record["seed"] == 42


def test_resume_has_the_parent_skip_what_was_trained(tmp_path, tokenizer):
    # Our data order depends on transformers' own fast-forwarding; `ignore_data_skip` would start over from step 0.
    with pytest.raises(ValueError, match="ignore_data_skip=True cannot be used"):
        make_trainer(tmp_path, tokenizer, ignore_data_skip=True)


# ------------------------------------------------------------------------------------- a teacher that goes away for good


def train_with(server, folder, tokenizer, resume=None, dies_at=None, **kwargs):
    """As `train`, with both teachers on a server, which may die over a step; also the steps that were rolled out."""
    teachers = {"general": server.url, "domain": [server.url]}
    trainer = make_trainer(folder, tokenizer, teachers=teachers, teacher_timeout=0.3, max_steps=4, **kwargs)
    generated = []
    roll_out = trainer.roll_out

    def roll_out_and_note(rows, *limits):
        generated.append(trainer.state.global_step)
        if generated[-1] == dies_at:
            server.before = server.close
        return roll_out(rows, *limits)

    trainer.roll_out = roll_out_and_note
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        for teacher in trainer.teachers.values():
            teacher.close()
    return [parameter.detach().clone() for parameter in trainer.model.parameters()], generated


@pytest.fixture(scope="module")
def served(tmp_path_factory, tokenizer):
    """Four steps with both teachers on a server that lives, and no checkpoint: the folder, and the final parameters."""
    folder = tmp_path_factory.mktemp("served")
    with contextlib.closing(FakeVLLM(make_model(1), tokenizer)) as server:
        parameters, generated = train_with(server, folder, tokenizer, save_strategy="no", optim="adamw_torch")
    assert generated == [0, 1, 2, 3]
    return folder, parameters


@pytest.mark.parametrize(
    ("fails_at", "saving"),
    [
        *((step, {"save_strategy": "no"}) for step in (0, 2, 3)),
        *((step, {"save_strategy": "steps", "save_steps": 1}) for step in (0, 2, 3)),
        (2, {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}),
    ],
)
def test_teacher_that_is_gone_for_good_leaves_a_step_that_is_scored_after_resume(
    fails_at, saving, served, start_server, tmp_path, tokenizer
):
    undisturbed, expected = served
    server = start_server()
    kwargs = {**saving, "optim": "adamw_torch"}
    with pytest.raises(
        TeacherError,
        match=rf"(?s)has no replica left.*Nothing is lost: the weights before step {fails_at + 1} and its rollouts are in "
        rf"'.*checkpoint-{fails_at}'. Fix the teacher and resume_from_checkpoint=",
    ):
        train_with(server, tmp_path, tokenizer, dies_at=fails_at, **kwargs)

    again = start_server(port=server.port)
    found, generated = train_with(
        again, tmp_path, tokenizer, resume=str(tmp_path / f"checkpoint-{fails_at}"), **kwargs
    )
    assert generated == list(range(fails_at + 1, 4))  # the kept step is not rolled out again
    for key in ("step", "branch", "loss", "grad_norm", "selection/general/kept"):
        assert [line.get(key) for line in lines(tmp_path)] == [line.get(key) for line in lines(undisturbed)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_run_that_starts_anew_after_a_resume_that_failed_rolls_out_its_first_step(start_server, tmp_path, tokenizer):
    """The checkpoint has the rollouts of step 2, of the same branch."""
    server = start_server()
    with pytest.raises(TeacherError):
        train_with(server, tmp_path, tokenizer, dies_at=2, save_strategy="steps", save_steps=1)

    class FailsOnce(TrainerCallback):
        failures = iter([RuntimeError("not yet")])

        def on_train_begin(self, *args, **kwargs):
            for failure in self.failures:
                raise failure

    again = start_server(port=server.port)
    teachers = {"general": again.url, "domain": [again.url]}
    trainer = make_trainer(
        tmp_path, tokenizer, teachers=teachers, teacher_timeout=0.3, max_steps=4, callbacks=[FailsOnce()],
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    generated, roll_out = [], trainer.roll_out
    trainer.roll_out = lambda *args: generated.append(trainer.state.global_step) or roll_out(*args)
    with pytest.raises(RuntimeError, match="not yet"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer.train()
    assert generated == [0, 1, 2, 3]
    for teacher in trainer.teachers.values():
        teacher.close()


@pytest.mark.parametrize("as_checkpoint", [True, False])
def test_resume_does_not_use_rollouts_that_another_run_has_left(as_checkpoint, start_server, tmp_path, tokenizer):
    kwargs = {"save_strategy": "steps", "save_steps": 1, "seed": 7}
    server = start_server()
    with pytest.raises(TeacherError):  # of another seed, and so with other rollouts
        train_with(server, tmp_path / "two", tokenizer, dies_at=2, save_strategy="steps", save_steps=1)
    assert list((tmp_path / "two" / "checkpoint-2").glob("rollouts-*"))
    again = start_server(port=server.port)
    expected, _ = train_with(again, tmp_path / "one", tokenizer, **kwargs)
    found, generated = train_with(again, tmp_path / "two", tokenizer, overwrite_output_dir=True, **kwargs)
    if as_checkpoint:
        checkpoint = str(tmp_path / "two" / "checkpoint-2")
        found, generated = train_with(again, tmp_path / "two", tokenizer, resume=checkpoint, **kwargs)
    assert generated == [2, 3] if as_checkpoint else [0, 1, 2, 3]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_teacher_that_is_gone_during_evaluation_leaves_the_weights(start_server, tmp_path, tokenizer):
    server = start_server()
    trainer = make_trainer(
        tmp_path, tokenizer, teachers={"general": server.url, "domain": make_model(1)}, teacher_timeout=0.3, max_steps=4,
        eval_dataset={"general": make_prompts("general", 4)}, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    roll_out = trainer.roll_out
    trainer.roll_out = lambda *args: (None if trainer.model.training else server.close()) or roll_out(*args)
    with pytest.raises(
        TeacherError,
        match=r"(?s)has no replica left.*Nothing is lost: the weights after step 2 are in '.*checkpoint-2'",
    ):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "camopd.json").exists()
    assert list((tmp_path / "checkpoint-2").glob("rollouts-*")) == []


def test_run_that_needs_smaller_micro_batches_goes_on_with_them(undisturbed, tmp_path, tokenizer):
    """As after one that took more memory than there is: the same step of the optimizer, its sums in another order."""
    folder, expected_prompts, _ = undisturbed
    shutil.copytree(folder / "checkpoint-5", tmp_path / "checkpoint-5")
    prompts, _ = train(tmp_path, tokenizer, resume=True, per_device_train_batch_size=1)
    assert prompts == expected_prompts[5:]
    assert lines(tmp_path)[-1]["step"] == STEPS


def test_resumed_run_evaluates_saves_and_logs_as_often_as_its_own_settings_say(tmp_path, tokenizer):
    """transformers takes those of the checkpoint."""
    own = {"general": make_prompts("general", 3)}

    def run(**settings):
        trainer = make_trainer(tmp_path, tokenizer, eval_dataset=own, max_steps=6, save_strategy="steps", **settings)
        return trainer

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    run(save_steps=2, logging_steps=1, callbacks=[Stops()]).train()
    trainer = run(save_steps=3, logging_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train(resume_from_checkpoint=True)
    history = [entry for entry in trainer.state.log_history if entry["step"] > 2]
    assert [entry["step"] for entry in history if "eval_general_kl" in entry] == [3, 4, 5, 6]
    assert [entry["step"] for entry in history if "loss" in entry] == [4, 6]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3", "checkpoint-6"}
