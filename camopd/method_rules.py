"""What the settings of the method and its baselines may be: per-branch values, choices, and what has to fit together.

What transformers and TRL bring is in setting_rules.py.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from .objective import IMPORTANCE_MODES, SCORE_KINDS
from .schedule import Schedule, mapping_form
from .teachers.address import ADAPTER_TEACHERS
from .teachers.limits import most_tokens_in_flight, request_seconds
from .token_rules import TOKEN_RULES


if TYPE_CHECKING:
    from .config import CaMOPDConfig

CHOICES = {
    "importance_sampling_mode": IMPORTANCE_MODES,
    "gap_student": ("trainer", "engine"),
    "optimizer_moments": ("shared", "per_branch"),
    "token_rule": TOKEN_RULES,
    "loss_normalization": ("sample", "token"),
    "branch_weights": ("none", "sigma"),
}
# Whole numbers, and the least that each may be. `None`, where it is the default, stands for "not set".
LEAST = {
    "prompts_per_step": 1,
    "per_device_train_batch_size": 1,
    "max_prompt_length": 1,
    "score_batch_size": 1,
    "max_steps": 1,
    "max_tokens_per_micro_batch": 1,
    "loss_prefix_tokens": 1,
    "diagnostics_steps": 0,
    "relaxed_exploration_steps": 0,
}
PER_BRANCH = ("mass_target", "scale", "score", "selection")
# optim that transformers builds from the learning rate and `adam_*` alone
PLAIN_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
_WHY = {
    "max_steps": " With one stream per branch there is no epoch to count; say how many optimizer steps to make.",
    "mass_target": "it is a share of the total score (Eq. 8) and lies in (0, 1]. To train on every sample, set "
    "selection to False.",
    "scale": "r_b of Eq. 9 must be a positive number. To leave a branch out, take it out of the schedule.",
    "score": f"it must be one of {SCORE_KINDS}: Eq. 6 or Eq. 7.",
}


def check_forms(args: CaMOPDConfig) -> None:
    """Raise `ValueError` for what is not a whole number where one is due, and for JSON that cannot be read.

    For the beginning: what follows reads these settings.
    """
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is None and args.__dataclass_fields__[name].default is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            at_least = "1, or 0 to measure nothing" if name == "diagnostics_steps" else least
            raise ValueError(
                f"{name} must be a whole number of at least {at_least}, got {value!r}.{_WHY.get(name, '')}"
            )
    for name in (*PER_BRANCH, "teachers"):
        value = getattr(args, name)
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{name} is no valid JSON: {value} ({error}). Names and texts need double quotes: "
                    f'--{name} \'{{"general": ..., "domain": ...}}\'.'
                ) from None


def check_method(args: CaMOPDConfig, schedule: Schedule) -> None:
    """Raise `ValueError` for a setting of the method that is out of range or does not fit another one; per-branch values
    become numbers and truth values."""
    _check_schedule(args, schedule)
    for name in PER_BRANCH:
        _settle_per_branch(args, name)
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {getattr(args, name)!r}.")
    _check_optimizer(args)
    _check_baselines(args, schedule)
    _check_budget(args)
    _check_teachers(args)
    if not 0 <= args.importance_sampling_low <= 1 <= args.importance_sampling_high:
        raise ValueError(
            f"importance_sampling_low={args.importance_sampling_low} and "
            f"importance_sampling_high={args.importance_sampling_high} must enclose 1, the ratio of two engines that "
            "agree: 0 <= low <= 1 <= high. The default band is 0.5 to 2.0."
        )


def _check_schedule(args: CaMOPDConfig, schedule: Schedule) -> None:
    for step in range(schedule.period):
        for branch, rows in schedule.rows(step, args.prompts_per_step).items():
            if rows == 0:
                raise ValueError(
                    f"schedule {args.schedule!r} gives branch {branch!r} none of the {args.prompts_per_step} prompts "
                    f"of step {step}. Raise prompts_per_step or the branch's share."
                )


def _settle_per_branch(args: CaMOPDConfig, name: str) -> None:
    parse, allowed = {
        "mass_target": (float, lambda value: 0 < value <= 1),
        "scale": (float, lambda value: 0 < value < float("inf")),
        "score": (str, lambda value: value in SCORE_KINDS),
        "selection": (_to_bool, lambda value: True),
    }[name]
    value = getattr(args, name)
    if isinstance(value, dict):
        parsed: Any = {branch: _parse(f"{name}[{branch!r}]", item, parse) for branch, item in value.items()}
    else:
        parsed = _parse(name, value, parse)
    setattr(args, name, parsed)
    for branch, item in args.per_branch(name).items():
        if not allowed(item):
            raise ValueError(f"{name} of branch {branch!r} is {item!r}; {_WHY[name]}")


def _check_optimizer(args: CaMOPDConfig) -> None:
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in ("lomo", "adalomo"):
        raise ValueError(
            f"optim={optim!r} changes the weights in the backward of every micro-batch, but a rollout is for one "
            "update of them all (Eq. 9). Leave optim out, or take adamw_torch_8bit to save memory (docs/scale.md)."
        )
    if args.optim_args and (optim in (*PLAIN_ADAMW, "adafactor") or args.optimizer_moments == "per_branch"):
        raise ValueError(f"optim_args={args.optim_args!r} would be ignored: optim={optim!r} takes none. Leave it out.")
    if args.optimizer_moments == "per_branch" and optim not in PLAIN_ADAMW:
        raise ValueError(
            f"optimizer_moments='per_branch' is an AdamW of its own and cannot be optim={optim!r}. Leave optim out."
        )


def _check_baselines(args: CaMOPDConfig, schedule: Schedule) -> None:
    for name, allowed, reason in (
        (
            "relaxed_mixture",
            0 < args.relaxed_mixture < 1,
            "lambda of Relaxed OPD lies between 0 and 1, without them",
        ),
        (
            "relaxed_entropy_share",
            0 < args.relaxed_entropy_share <= 1,
            "it is a share of the tokens and lies in (0, 1]. 1 leaves the choice by entropy out",
        ),
        (
            "selectkd_reject_weight",
            0 <= args.selectkd_reject_weight < 1,
            "a rejected token weighs less than an accepted one, so it lies in [0, 1). For a weight of 1 on every "
            "token, set token_rule to 'none'",
        ),
    ):
        if not allowed:
            raise ValueError(f"{name} is {getattr(args, name)!r}; {reason}.")
    if args.branch_weights == "sigma" and all(len(shares) == 1 for shares in schedule.steps):
        raise ValueError(
            f"branch_weights='sigma' compares the branches inside a step, but no step of schedule {args.schedule!r} "
            "mixes any: every weight would be 1. Mix them ('general:1+domain:1'), or leave branch_weights out and set "
            "scale."
        )


def _check_budget(args: CaMOPDConfig) -> None:
    budget = args.max_tokens_per_micro_batch
    if budget is None:
        return
    longest = args.max_prompt_length + args.longest_completion
    if budget < longest:
        raise ValueError(
            f"max_tokens_per_micro_batch={budget} is smaller than one sample: max_prompt_length + "
            f"max_completion_length = {args.max_prompt_length} + {args.longest_completion} = {longest}. Raise it to "
            f"{longest} or lower the lengths."
        )
    if args.per_device_train_batch_size != 1:
        raise ValueError(
            f"max_tokens_per_micro_batch={budget} decides how many samples share a micro-batch, and so would "
            f"per_device_train_batch_size={args.per_device_train_batch_size}. Leave the second at 1."
        )


def _check_teachers(args: CaMOPDConfig) -> None:
    if not args.teacher_patience > 0:
        raise ValueError(f"teacher_patience must be a positive number of seconds, got {args.teacher_patience!r}.")
    if args.teachers is not None and not isinstance(args.teachers, dict):
        raise ValueError(mapping_form("teachers", args.teachers))
    in_process = args.teachers and all(teacher in tuple(ADAPTER_TEACHERS) for teacher in args.teachers.values())
    if args.world_size > 1 and not in_process:
        _check_ddp_timeout(args)


def _check_ddp_timeout(args: CaMOPDConfig) -> None:
    """A rank may wait for one request that times out, then for a server to come back, then for another such request."""
    rows = args.prompts_per_step // args.world_size
    if args.eval_strategy != "no" or args.eval_on_start:
        rows = max(rows, args.per_device_eval_batch_size)
    tokens = most_tokens_in_flight(rows, args.max_prompt_length + args.longest_completion)
    request = request_seconds(tokens)
    slowest = math.ceil(args.teacher_patience + 2 * request)
    if slowest > args.ddp_timeout:
        raise ValueError(
            f"a request to a teacher's server may take {request:.0f} seconds, with {tokens} tokens of this rank in flight. "
            f"Two of them and teacher_patience={args.teacher_patience:g} come to {slowest}, more than "
            f"ddp_timeout={args.ddp_timeout}: a rank that waits for its teacher would be taken for dead. Set it to "
            f"{slowest}, or lower teacher_patience or max_completion_length."
        )


def _parse(name: str, value: Any, parse: Any) -> Any:
    try:
        if parse is float and isinstance(value, bool):
            raise ValueError
        return parse(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be {'a number' if parse is float else 'true or false'} or a mapping from branch to that, "
            f"got {value!r}."
        ) from None


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(value)
