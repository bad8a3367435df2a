"""Settings and prompts that are set when the config, or the trainer that has read them, is made already.

Checks and what is derived are of the time when it was made: what comes later is made up for, or refused.
"""

from __future__ import annotations

import zlib
from dataclasses import fields
from typing import Any


# What a trainer that is made reads when it trains, evaluates or saves, and what goes with any other setting.
READ_LATER = (
    "output_dir overwrite_output_dir max_steps learning_rate weight_decay max_grad_norm logging_steps logging_first_step "
    "eval_steps save_steps save_total_limit save_only_model per_device_eval_batch_size dataloader_drop_last eval_on_start "
    "disable_tqdm run_name push_to_hub hub_model_id hub_revision hub_private_repo hub_strategy hub_always_push guards"
)


def note(args: Any) -> None:
    """Remember the settings as they are: all checks of `args` have been made."""
    args.noted = _values(args)


def check_again(args: Any) -> None:
    """Make a config that was changed since `note` as if it were new, with all checks, and what is derived derived anew.

    Raises what making it raises, and `TypeError` for another kind of config.
    """
    if not hasattr(args, "noted"):
        raise TypeError(
            f"args must be a CaMOPDConfig, got {type(args).__name__}. It takes what that one does, and more."
        )
    changed = {name for name, value in _values(args).items() if value != args.noted[name]}
    if not changed:
        return
    given = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    if "gradient_accumulation_steps" not in changed:  # what follows from the others
        given["gradient_accumulation_steps"] = None
    if "metric_for_best_model" in changed and "greater_is_better" not in changed:
        given["greater_is_better"] = None
        if "lr_scheduler_kwargs" not in changed and given["lr_scheduler_kwargs"]:
            of_metric = ("mode", "threshold_mode")
            kept = {name: value for name, value in given["lr_scheduler_kwargs"].items() if name not in of_metric}
            given["lr_scheduler_kwargs"] = kept
    vars(args).update(vars(type(args)(**given)))


def note_of_trainer(trainer: Any) -> None:
    """Remember what a trainer was made of."""
    trainer.noted = _read_once(trainer.args), trainer.train_dataset, trainer.eval_dataset, _precision(trainer)


def check_trainer(trainer: Any) -> None:
    """Raise `ValueError` for what was changed since `note_of_trainer` and would have no effect, and where another trainer
    has changed the precision of this one. `max_steps` is what it is by now."""
    values, *datasets, precision = trainer.noted
    for name, value in _read_once(trainer.args).items():
        if value != values[name]:
            raise ValueError(
                f"{name}={getattr(trainer.args, name)!r} was set after the trainer was made, which has read and checked it "
                "then. Set it in the CaMOPDConfig, and make a trainer with that."
            )
    for name, dataset in zip(("train_dataset", "eval_dataset"), datasets, strict=True):
        if getattr(trainer, name) is not dataset:
            raise ValueError(
                f"trainer.{name} was set after the trainer was made, and its prompts were not checked and dealt to "
                "branches. Pass them to the trainer; other held-out prompts can be passed to evaluate()."
            )
    if _precision(trainer) != precision:  # all accelerators of a process share their state
        raise ValueError(
            f"this trainer was made with mixed_precision={precision!r}, and another one that was made since has changed it "
            f"to {_precision(trainer)!r} for both. Make this one again, or both with the same bf16."
        )
    trainer.train_dataset.num_steps = trainer.args.max_steps


def _read_once(args: Any) -> dict[str, int]:
    return {name: value for name, value in _values(args).items() if name not in READ_LATER.split()}


def _precision(trainer: Any) -> str:
    return str(trainer.accelerator.mixed_precision)


def _values(args: Any) -> dict[str, int]:
    """A number for each setting, another one for another value: no copy of what may be large or secret."""
    return {field.name: zlib.crc32(repr(getattr(args, field.name)).encode()) for field in fields(args)}
