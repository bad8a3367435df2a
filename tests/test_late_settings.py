"""What is set after a config or a trainer was made is made up for or refused: nothing trains as if it were not there."""

import dataclasses
import logging
import re

import pytest
import torch
from conftest import make_model, make_prompts
from trainers import make_args, make_trainer
from transformers import TrainerCallback
from trl import DistillationConfig

from camopd import CaMOPDTrainer
from camopd.late_settings import note


def make(args, tokenizer, **given):
    branches = ("general", "domain")
    return CaMOPDTrainer(
        model=make_model(1), teachers={branch: make_model(seed) for seed, branch in enumerate(branches, 2)}, args=args,
        train_dataset={branch: make_prompts(branch) for branch in branches}, processing_class=tokenizer, **given,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 0.3, "temperature"),
        ("top_k", 3, "top_k"),
        ("scale", {"general": -5.0, "domain": 1.0}, r"scale of branch 'general' must be a positive number"),
        ("generation_kwargs", {"typical_p": 0.5}, "generation_kwargs sets"),
        ("prompts_per_step", 7, "prompts_per_step=7 does not divide"),
        ("divergence", "whole", "divergence"),
    ],
)
def test_setting_that_is_changed_in_a_config_is_checked_as_one_that_is_given(
    name, value, message, tmp_path, tokenizer
):
    args = make_args(tmp_path)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        make(args, tokenizer)


def test_mapping_that_is_changed_in_its_place_is_seen(tmp_path, tokenizer):
    args = make_args(tmp_path, scale={"general": 2.0, "domain": 1.0})
    args.scale["general"] = -5.0
    with pytest.raises(ValueError, match="scale of branch 'general' must be a positive number"):
        make(args, tokenizer)


def test_what_follows_from_a_changed_setting_is_derived_anew(tmp_path, tokenizer):
    args = make_args(tmp_path, max_steps=1)
    before = args.gradient_accumulation_steps
    args.prompts_per_step *= 2
    args.report_to = "none"
    trainer = make(args, tokenizer)
    assert trainer.args is args and args.gradient_accumulation_steps == 2 * before
    trainer.train()
    assert len(trainer.step.samples) == args.prompts_per_step


def test_config_that_is_not_changed_is_not_made_again(tmp_path, tokenizer, caplog):
    args = make_args(tmp_path, max_tool_calling_iterations=3)
    kept = args.accelerator_config
    caplog.clear()
    with caplog.at_level(logging.WARNING, "camopd"):
        make(args, tokenizer)
    assert args.accelerator_config is kept


def test_copy_of_a_config_names_what_is_derived(tmp_path):
    args = make_args(tmp_path)
    more = 2 * args.prompts_per_step
    with pytest.raises(
        ValueError, match=r"gradient_accumulation_steps=\d+ contradicts .* in a copy of a config set it to"
    ):
        dataclasses.replace(args, prompts_per_step=more)
    copy = dataclasses.replace(args, prompts_per_step=more, gradient_accumulation_steps=None)
    assert copy.gradient_accumulation_steps == 2 * args.gradient_accumulation_steps


def test_metric_that_is_changed_in_a_config_gets_its_own_direction(tmp_path, tokenizer):
    args = make_args(
        tmp_path, metric_for_best_model="eval_general_kl", eval_strategy="steps", eval_steps=2,
        lr_scheduler_type="reduce_lr_on_plateau",
    )  # fmt: skip
    args.metric_for_best_model = "eval_general_gap"
    make(args, tokenizer, eval_dataset={"general": make_prompts("general", 3)})
    assert args.greater_is_better and args.lr_scheduler_kwargs == {"mode": "max", "threshold_mode": "abs"}


def test_config_of_another_trainer_is_refused_by_its_name(tmp_path, tokenizer):
    with pytest.raises(TypeError, match="args must be a CaMOPDConfig, got DistillationConfig"):
        make(DistillationConfig(str(tmp_path), use_cpu=True, bf16=False), tokenizer)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup_steps", 1),
        ("metric_for_best_model", "eval_general_gap"),
        ("report_to", ["wandb"]),
        ("label_smoothing_factor", 0.3),
        ("num_train_epochs", 3),
        ("scale", 5.0),
        ("mass_target", 0.1),
        ("prompts_per_step", 8),
        ("temperature", 0.5),
        ("seed", 7),
        ("beta", 0.5),
    ],
)
def test_setting_that_a_trainer_has_read_is_refused_afterwards(name, value, tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    setattr(trainer.args, name, value)
    for use in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} was set after the trainer was made")):
            use()


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_prompts_that_are_set_afterwards_are_refused(name, tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset={"general": make_prompts("general", 4)})
    setattr(trainer, name, {"general": make_prompts("general", 3)})
    for use in (trainer.train, trainer.evaluate):
        with pytest.raises(
            ValueError, match=f"trainer.{name} was set after the trainer was made.*Pass them to the trainer"
        ):
            use()


def test_precision_that_another_trainer_has_changed_is_refused(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path / "one", tokenizer, bf16=True)
    make_trainer(tmp_path / "other", tokenizer)
    with pytest.raises(
        ValueError, match=r"made with mixed_precision='bf16', and a trainer or config .* changed it to 'no'"
    ):
        trainer.train()
    make_trainer(tmp_path / "third", tokenizer, max_steps=1).train()  # which has changed it for itself


def test_run_that_is_made_longer_goes_on_in_the_prompts(tmp_path, tokenizer):
    """`max_steps` is read when the run trains, as in transformers."""

    class Seen(TrainerCallback):
        def __init__(self):
            self.prompts = []

        def on_step_end(self, args, state, control, **kwargs):
            step = trainer.step
            self.prompts.append(sorted(tuple(each.token_ids[: each.prompt_len]) for each in step.samples))

    whole, parts = Seen(), Seen()
    trainer = make_trainer(tmp_path / "whole", tokenizer, max_steps=5, callbacks=[whole])
    trainer.train()
    trainer = make_trainer(
        tmp_path / "parts", tokenizer, max_steps=2, callbacks=[parts], save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.args.max_steps = 5
    trainer.train(resume_from_checkpoint=True)
    assert len(whole.prompts) == 5 and parts.prompts == whole.prompts


def test_what_a_trainer_reads_later_is_checked_with_the_rest(tmp_path, tokenizer):
    decays = {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_stable_steps": 2, "num_decay_steps": 2},
    }
    for settings, steps, message in (
        (decays, 8, "learning rate is 0 in"),
        ({"warmup_steps": 2}, 2, "never reached"),
        ({"max_completion_length": {0: 2, 3: 6}}, 2, "max_completion_length changes at step 3"),
    ):
        trainer = make_trainer(tmp_path, tokenizer, **settings)
        trainer.args.max_steps = steps
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_optimizer_that_is_made_takes_no_other_rate(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1)
    trainer.args.learning_rate = 1e-3  # before it is made
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3
    trainer.evaluate({"general": make_prompts("general", 3)})
    trainer.args.learning_rate = 1e-4
    with pytest.raises(
        ValueError, match=r"learning_rate=0\.0001 was set after the trainer was made, or its optimizer"
    ):
        trainer.train()


def test_guards_may_change_in_their_place_and_not_be_replaced(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1)
    trainer.args.guards["log_ratio"] = None
    trainer.train()
    trainer.args.guards = {"log_prob": 0.5}
    with pytest.raises(ValueError, match=r"guards=.*was set after the trainer was made"):
        trainer.train()


class Sets(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        args.logging_strategy = "no"


def test_callback_that_sets_something_does_not_end_the_run(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=2, callbacks=[Sets()], eval_dataset={"general": make_prompts("general", 3)},
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2


def test_config_that_an_older_version_has_saved_is_made_anew(tmp_path, tokenizer):
    args = make_args(tmp_path)
    del args.noted, args.given
    make(args, tokenizer)
    assert set(args.noted) == {field.name for field in dataclasses.fields(args)}


def test_config_made_since_is_named_as_what_has_changed_the_precision(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    make_args(tmp_path / "other")
    with pytest.raises(ValueError, match=r"a trainer or config that was made since .* Make this one again"):
        trainer.train()


def test_what_was_derived_is_derived_from_what_is_set_later(tmp_path, tokenizer):
    follows = {"eval_strategy": "steps", "metric_for_best_model": "eval_general_kl", "eval_steps": 2}
    args = make_args(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", **follows)
    args.lr_scheduler_type = "cosine"
    own = {"general": make_prompts("general", 3)}
    make(args, tokenizer, eval_dataset=own)
    assert args.lr_scheduler_kwargs is None
    args = make_args(tmp_path, eval_strategy="steps", logging_steps=5)
    args.logging_steps = 2
    make(args, tokenizer, eval_dataset=own)
    assert args.eval_steps == 2


class Generates(TrainerCallback):
    """What a user's callback does that looks at the model between two steps."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.eval()
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


class Evaluates(TrainerCallback):
    def on_optimizer_step(self, *args, **kwargs):
        self.trainer.evaluate()


@pytest.mark.parametrize("kind", [Generates, Evaluates])
def test_callback_that_leaves_the_model_in_another_mode_costs_no_metric_and_no_table(kind, tmp_path, tokenizer):
    plain = make_trainer(tmp_path / "plain", tokenizer, max_steps=2, log_completions=True, logging_steps=1)
    plain.train()
    callback = kind()
    trainer = make_trainer(
        tmp_path / "run", tokenizer, max_steps=2, log_completions=True, logging_steps=1, callbacks=[callback],
        eval_dataset={"general": make_prompts("general", 3)},
    )  # fmt: skip
    callback.trainer = trainer
    trainer.train()
    steps = [[entry for entry in each.state.log_history if "loss" in entry] for each in (plain, trainer)]
    assert [len(each) for each in steps] == [2, 2]
    for one, other in zip(*steps, strict=True):
        assert {name for name, value in one.items() if value is not None} == {
            name for name, value in other.items() if value is not None
        }
        for name in ("loss", "gap/general/mean"):
            assert one.get(name) == other.get(name)
    names = [
        sorted(path.name for path in (tmp_path / run / "completions").glob("completions_*"))
        for run in ("plain", "run")
    ]
    assert names[0] == names[1] and len(names[0]) == 2


def test_note_is_of_values_and_not_of_texts_that_may_be_secret(tmp_path):
    args = make_args(tmp_path, run_name="of-a-secret")
    note(args)
    assert "of-a-secret" not in repr(args.noted) and set(args.noted) == {
        field.name for field in dataclasses.fields(args)
    }
