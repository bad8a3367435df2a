"""What single settings may be, said without torch. What has to fit together is in method_rules.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .schedule import number_of, short


class Range(NamedTuple):
    """Settings, the test that each of their values has to pass, and how an error says so."""

    names: str
    test: Callable[[Any], bool]
    must_be: str
    why: str = ""


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53


def _number(test: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and test(float(value))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def choice(name: str, *choices: str) -> Range:
    return Range(name, choices.__contains__, f"one of {choices}")


COUNT = "a whole number of at least 1"
# A value of None, where it is the default, stands for "not set" and is always allowed.
RANGES = (
    Range(
        "prompts_per_step per_device_train_batch_size per_device_eval_batch_size max_prompt_length score_tokens "
        "max_tokens_per_micro_batch loss_prefix_tokens divergence_top_k", _whole(1), COUNT,
    ),
    Range(
        "max_steps", _whole(1), COUNT,
        " With one stream per branch there is no epoch to count; say how many optimizer steps to make.",
    ),
    Range("eval_tasks_items", _whole(1), COUNT),
    Range("diagnostics_steps", _whole(0), f"{COUNT}, or 0 to measure nothing"),
    Range("rollout_lag", lambda value: type(value) is int and value in (0, 1), "0 or 1, a number of steps"),
    Range("relaxed_exploration_steps", _whole(0), "a whole number of at least 0"),
    choice("student_logps", "trainer", "engine", "auto"),
    choice("optimizer_moments", "shared", "per_branch"),
    choice("loss_normalization", "sample", "token"),
    choice("branch_weights", "none", "sigma"),
    choice("divergence", "sampled", "full", "top_k"),
    choice("baseline", "none", "kl"),
    Range("relaxed_mixture", _number(lambda value: 0 < value < 1), "in (0, 1)", " It is lambda of Relaxed OPD."),
    Range(
        "relaxed_entropy_share", _number(lambda value: 0 < value <= 1), "in (0, 1]",
        " It is a share of the tokens; 1 leaves the choice by entropy out.",
    ),
    Range(
        "selectkd_reject_weight", _number(lambda value: 0 <= value < 1), "in [0, 1)",
        " A rejected token weighs less than an accepted one. For a weight of 1 on every token, set token_rule to 'none'.",
    ),
    Range("teacher_timeout", _number(lambda value: 0 < value < math.inf), "a positive number of seconds"),
    Range("importance_sampling_low importance_sampling_high", _number(lambda value: True), "a number"),
    Range("gradient_accumulation_steps", _whole(-(2**53)), "a whole number; it is derived, leave it out"),
    Range("lr_scheduler_type", lambda value: isinstance(value, str) and len(value) < 100, "the name of a schedule"),
    Range(
        "learning_rate max_grad_norm weight_decay adam_epsilon", _number(lambda value: 0 <= value < math.inf),
        "a number of at least 0",
    ),
    Range("adam_beta1 adam_beta2", _number(lambda value: 0 <= value < 1), "in [0, 1)"),
    Range("logging_steps save_steps", _number(lambda value: value < math.inf), "a number"),
    Range(
        "disable_dropout rebalance padding_free split_special_tokens trust_checkpoint prefill overwrite_output_dir verbose",
        _is_bool, "true or false",
    ),
)  # fmt: skip


def check(rule: Range, name: str, value: Any) -> None:
    """Raise `ValueError` for a value that a setting may not have."""
    try:
        allowed = rule.test(value)
    except (TypeError, OverflowError):  # a list where a text should be, a number beyond all floats
        allowed = False
    if not allowed:
        raise ValueError(f"{name} must be {rule.must_be}, got {short(value)}.{rule.why}")


def check_written(settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a value of a config or a command line that no run can have; numbers may be texts there."""
    for rule in RANGES:
        for name in rule.names.split():
            value = settings.get(name)
            if isinstance(value, str):
                if rule.test is _is_bool:  # of the command line, where there are other words for it
                    continue
                try:
                    number = number_of(value)
                    value = int(number) if number == int(number) else number
                except (ValueError, OverflowError):
                    pass
            if value is not None:
                check(rule, name, value)
