"""Settings and prompts that are set when the config, or the trainer that has read them, is made already.

Checks and what is derived are of the time when it was made: what comes later is made up for, or refused.
"""

from __future__ import annotations

import zlib
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments


# A trainer reads them when it is made. Of transformers' own it reads the others when it trains.
READ_ONCE = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "bf16", "fp16", "deepspeed", "fsdp",
)  # fmt: skip
READ_AT_EACH_STEP = ("guards", "overwrite_output_dir")


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
    if "gradient_accumulation_steps" not in changed:  # it follows from the others
        given["gradient_accumulation_steps"] = None
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
                f"{name}={getattr(trainer.args, name)!r} was set after the trainer was made, which has read it then: it "
                "would have no effect. Set it in the CaMOPDConfig, and make a trainer with that."
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
    later = {field.name for field in fields(TrainingArguments)} - set(READ_ONCE) | set(READ_AT_EACH_STEP)
    return {name: value for name, value in _values(args).items() if name not in later}


def _precision(trainer: Any) -> str:
    return str(trainer.accelerator.mixed_precision)


def _values(args: Any) -> dict[str, int]:
    """A number for each setting, another one for another value: no copy of what may be large or secret."""
    return {field.name: zlib.crc32(repr(getattr(args, field.name)).encode()) for field in fields(args)}
