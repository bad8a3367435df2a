"""The learning rate of each step, against the formula, and what transformers would ignore."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from trainers import lines, make_args, make_trainer
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from camopd.learning_rate import check_passed


@pytest.mark.parametrize(("warmup", "steps"), [(3, 3), (0.5, 2)])
def test_warm_up_is_taken_with_the_default_schedule(warmup, steps, tmp_path, tokenizer):
    """Step k of n is at k / n of the learning rate, counted from 0, and all after them at the whole one."""
    make_trainer(tmp_path, tokenizer, warmup_steps=warmup, max_steps=4, diagnostics_steps=0).train()
    expected = [1e-2 * min(1.0, step / steps) for step in range(4)]
    assert [line["learning_rate"] for line in lines(tmp_path)] == pytest.approx(expected)
    assert [line["update/changed_share"] > 0 for line in lines(tmp_path)] == [rate > 0 for rate in expected]


def test_schedule_without_warm_up_is_the_papers(tmp_path):
    assert make_args(tmp_path).lr_scheduler_type == SchedulerType.CONSTANT


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 4}, "warmup_steps=4 is 4 of max_steps=4 steps.*never reached"),
        ({"warmup_steps": 100}, "warmup_steps=100"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5 is neither a whole number"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "'num_cycles': 2.*would be ignored.*'constant'"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}, "warmup_steps": 1}, "would be ignored.*'constant_with_warmup'"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 0.0}}, "'cosine' cannot be made.*min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "'warmup_stable_decay' cannot be made.*num_decay_steps"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 1, "metric_for_best_model": "general_kl",
             "eval_strategy": "steps"},
            "'reduce_lr_on_plateau' has no warm-up.*warmup_steps=1",
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"mode": "max"},
             "metric_for_best_model": "general_kl", "eval_strategy": "steps"},
            "mode='max'.*general_kl.*smaller value is the better",
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"threshold_mode": "rel"},
             "metric_for_best_model": "general_gap", "eval_strategy": "steps"},
            "threshold_mode='rel', and general_gap is negative.*the wrong way round",
        ),
        (
            {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"min_lr": 0.1}, "learning_rate": 0.1,
             "metric_for_best_model": "general_kl", "eval_strategy": "steps"},
            "min_lr=0.1, and learning_rate=0.1 is not above it: it could only rise",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 500}, "max_steps": 120},
            "learning_rate=0.01 is never reached, but .*add up to max_steps=120",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "max_steps": 120,
             "lr_scheduler_kwargs": {"num_stable_steps": 30, "num_decay_steps": 20}},
            "its learning rate is 0 in 70 of 120 steps.*add up to max_steps=120",
        ),
    ],
)  # fmt: skip
def test_settings_that_would_be_ignored_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **settings)


@pytest.mark.parametrize(("warmup", "steps"), [(2, 2), (0.5, 2)])
def test_optimizer_that_warms_up_itself_is_left_to_it(warmup, steps, tmp_path):
    """transformers hands `warmup_steps` to schedule-free AdamW; a second warm-up would multiply with the first."""
    args = make_args(tmp_path, optim="schedule_free_adamw", warmup_steps=warmup)
    assert (args.lr_scheduler_type, args.warmup_steps) == (SchedulerType.CONSTANT, steps)
    assert make_args(tmp_path, optim="schedule_free_radam", warmup_steps=2).lr_scheduler_type == "constant_with_warmup"
    with pytest.raises(
        ValueError, match=r"'schedule_free_adamw' warms up .*'cosine' would do so a second time\. Leave"
    ):
        make_args(tmp_path, optim="schedule_free_adamw", warmup_steps=warmup, lr_scheduler_type="cosine")


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_schedules_of_transformers_can_all_be_had(kind, tmp_path, caplog):
    settings = {"lr_scheduler_type": kind, "eval_strategy": "steps", "eval_steps": 1}
    follows = kind in ("reduce_lr_on_plateau", "greedy")
    settings |= {"metric_for_best_model": "general_gap"} if follows else {"warmup_steps": 1}
    if kind == "warmup_stable_decay":
        settings["lr_scheduler_kwargs"] = {"num_decay_steps": 1}
    if kind.endswith("with_min_lr"):
        settings["lr_scheduler_kwargs"] = {"min_lr": 1e-6}
    args = make_args(tmp_path, **settings)
    assert args.lr_scheduler_type == ("constant_with_warmup" if kind == "constant" else kind)
    if follows:
        own = {"min_lr": 0.0} if kind == "greedy" else {}
        assert args.lr_scheduler_kwargs == {"mode": "max", "threshold_mode": "abs", **own}  # the gap grows to 0
    make_args(tmp_path, lr_scheduler_type="constant_with_warmup")
    assert "has no warm-up, as warmup_steps is 0" in caplog.text


def test_scheduler_must_be_of_the_optimizer_that_is_passed(tmp_path, caplog):
    args = make_args(tmp_path, warmup_steps=1)
    one, other = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate) for rate in (1e-2, 0.5))
    scheduler = LambdaLR(one, lambda step: 1.0)
    for optimizer in (None, other):
        with pytest.raises(ValueError, match=r"LambdaLR of an optimizer that is not the run's"):
            check_passed(args, optimizer, scheduler)
    check_passed(args, one, None)
    assert not caplog.records
    check_passed(args, one, scheduler)
    assert "follows the LambdaLR that was passed, not lr_scheduler_type='constant_with_warmup'" in caplog.text
    check_passed(args, other, None)
    assert "has learning rate 0.5, which is taken; the config's is 0.01" in caplog.text


@pytest.mark.parametrize(
    ("kind", "metric"), [("reduce_lr_on_plateau", "gap"), ("reduce_lr_on_plateau", "kl"), ("greedy", "kl")]
)
def test_schedule_that_follows_a_metric_lowers_the_rate_where_it_gets_no_better(kind, metric, tmp_path):
    args = make_args(
        tmp_path, lr_scheduler_type=kind, metric_for_best_model=f"general_{metric}", eval_strategy="steps", eval_steps=1,
        lr_scheduler_kwargs={"patience": 1}, learning_rate=2e-6,
    )  # fmt: skip
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule = get_scheduler(kind, optimizer, 0, 20, args.lr_scheduler_kwargs)
    value = -0.2 if metric == "gap" else 0.2
    for _ in range(8):
        schedule.step(value)
    assert optimizer.param_groups[0]["lr"] < args.learning_rate
