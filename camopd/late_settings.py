"""Settings and prompts that are set when the config, or the trainer that has read them, is made already.

Checks and what is derived are of the time when it was made: what comes later is made up for, or refused.
"""

from __future__ import annotations

import copy
import zlib
from dataclasses import fields
from typing import Any

from .best import check_metric
from .learning_rate import settle_schedule
from .method_rules import read_completion_length


# What a trainer that is made reads when it trains, evaluates or saves, and what goes with any other setting.
READ_LATER = (
    "output_dir", "overwrite_output_dir", "max_steps", "learning_rate", "weight_decay", "max_grad_norm", "logging_steps",
    "logging_first_step", "logging_nan_inf_filter", "eval_steps", "save_steps", "save_total_limit", "save_only_model",
    "per_device_eval_batch_size", "run_name", "dataloader_drop_last", "eval_on_start", "num_completions_to_print",
    "log_unique_prompts", "push_to_hub", "hub_model_id", "hub_revision", "hub_private_repo", "hub_strategy",
    "hub_always_push",
)  # fmt: skip
OF_OPTIMIZER = ("learning_rate", "weight_decay")  # read when it is made


def as_given(args: Any) -> dict[str, Any]:
    """The settings of a config as a user gives them, before anything is derived."""
    return {field.name: getattr(args, field.name) for field in fields(args) if field.init}


def note(args: Any, given: dict[str, Any] | None = None) -> None:
    """Remember the settings as they are: all checks of `args` have been made. `given` before what was derived; by default
    they are those of the last call, and what was set since."""
    values = _values(args)
    if given is None:
        given = {**args.given, **{name: getattr(args, name) for name in _changed(args, values)}}
    args.given, args.noted = given, values


def check_again(args: Any) -> None:
    """Make a config that was changed since `note` as if it were new, with all checks, and what is derived derived anew.

    Raises what making it raises, and `TypeError` for another kind of config.
    """
    if "CaMOPDConfig" not in (each.__name__ for each in type(args).__mro__):
        raise TypeError(
            f"args must be a CaMOPDConfig, got {type(args).__name__}. It takes what that one does, and more."
        )
    changed = _changed(args, _values(args))
    if changed:
        before = {name: value for name, value in getattr(args, "given", {}).items() if name not in changed}
        vars(args).update(vars(type(args)(**{**as_given(args), **before})))


def note_of_trainer(trainer: Any) -> None:
    """Remember what a trainer was made of."""
    trainer.noted = _values(trainer.args), trainer.train_dataset, trainer.eval_dataset, _precision(trainer)
    trainer.noted_guards = trainer.args.guards  # the object that is read at each step


def check_trainer(trainer: Any) -> None:
    """Before it trains or evaluates: raise `ValueError` for what was changed since `note_of_trainer` and would have no
    effect, and where another trainer has changed the precision of this one. `max_steps` is what it is by now."""
    if trainer.is_in_train:  # a callback has set what is read at each use, or has no effect any more
        return
    args, (values, *datasets, precision) = trainer.args, trainer.noted
    changed = {name for name, value in _values(args).items() if value != values[name]} - {"guards"}
    late = changed - set(READ_LATER) | (changed & set(OF_OPTIMIZER) if trainer.optimizer is not None else set())
    late |= {"guards"} if args.guards is not trainer.noted_guards else set()
    late |= {"max_grad_norm"} & changed if trainer.is_deepspeed_enabled else set()
    for name in sorted(late):
        raise ValueError(
            f"{name}={getattr(args, name)!r} was set after the trainer was made, or its optimizer, which has read and "
            "checked it then. Set it in the CaMOPDConfig, and make a trainer with that."
        )
    for name, dataset in zip(("train_dataset", "eval_dataset"), datasets, strict=True):
        if getattr(trainer, name) is not dataset:
            raise ValueError(
                f"trainer.{name} was set after the trainer was made, and its prompts were not checked and dealt to "
                "branches. Pass them to the trainer; other held-out prompts can be passed to evaluate()."
            )
    if _precision(trainer) != precision:  # all accelerators of a process share their state
        raise ValueError(
            f"this trainer was made with mixed_precision={precision!r}, and a trainer or config that was made since has "
            f"changed it to {_precision(trainer)!r} for both. Make this one again, or both with the same bf16."
        )
    if changed:
        alone = copy.copy(args)  # they settle what they check
        read_completion_length(alone)
        settle_schedule(alone)
        check_metric(
            alone, trainer.run.schedule.branches, trainer.eval_dataset or {}, trainer.callback_handler.callbacks
        )
    trainer.train_dataset.num_steps = args.max_steps
    note_of_trainer(trainer)


def _precision(trainer: Any) -> str:
    try:
        return str(trainer.accelerator.mixed_precision)
    except AttributeError:  # a config that is made empties accelerate's state, until its trainer is made
        return "none"


def _changed(args: Any, values: dict[str, int]) -> set[str]:
    noted = getattr(args, "noted", {})  # none of a config that an older version has saved
    return {name for name, value in values.items() if value != noted.get(name)}


def _values(args: Any) -> dict[str, int]:
    """A number for each setting, another one for another value: no copy of what may be large or secret."""
    return {field.name: zlib.crc32(repr(getattr(args, field.name)).encode()) for field in fields(args)}
