"""What is wrong with a run's settings and can be said before torch is imported, which takes ten seconds and more.

All of it is refused later, too; here it is said within two seconds.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from .errors import CaMOPDError
from .ranges import check_written
from .run import check_names, named_teachers, read_settings, set_env
from .schedule import Schedule, mapping_form
from .settings import default_of, keys_of, types, values_of
from .teachers.address import base_of, did_you_mean, has_adapter, names_missing_model, without_secrets


DTYPES = ("auto", "bfloat16", "float16", "float32")  # of TRL's ModelConfig
# Settings with the values of an enumeration of transformers: the file and its name
ENUMERATIONS = {
    "lr_scheduler_type": ("trainer_utils.py", "SchedulerType"),
    "eval_strategy": ("trainer_utils.py", "IntervalStrategy"),
    "logging_strategy": ("trainer_utils.py", "IntervalStrategy"),
    "save_strategy": ("trainer_utils.py", "SaveStrategy"),
    "hub_strategy": ("trainer_utils.py", "HubStrategy"),
    "optim": ("training_args.py", "OptimizerNames"),
}
TRUE = ("yes", "true", "t", "y", "1")  # as transformers' parser reads them
BOOLS = (*TRUE, "no", "false", "f", "n", "0")
_FEW = 12  # names that an error lists where one of them is near


def check_early(config: str, overrides: list[str], training: bool = False) -> dict[str, Any]:
    """The settings of a run as they are written. Their `env` is in the environment of this process from now on.

    Raises `ValueError` for unknown names, values that no run can have, models that are not there, and prompts, and when
    `training` also teachers, of other branches than those of the schedule.
    """
    settings = read_settings(config, overrides)
    check_names(config, settings)
    set_env(settings, devices=True)
    model = settings.get("model_name_or_path")
    if not model:
        raise ValueError(f"{config!r} names no student. Set model_name_or_path to the specialised model.")
    if isinstance(model, str):
        _need_model(model)
    schedule = _schedule(settings)
    if training or "teachers" in settings:
        teachers = named_teachers(settings)
        for _, text in schedule.mismatches("teachers", teachers) if training else ():
            raise ValueError(text)
    _check_values(settings)
    for name in ("prompts", "eval_prompts"):
        given = settings.get(name)
        missing = training and name == "prompts" and not given
        if missing or (given is not None and not isinstance(given, dict)):
            raise ValueError(without_secrets(mapping_form(name, given)))
        for branch, text in schedule.mismatches(name, given or {}) if given else ():
            if name == "prompts" or branch in (given or {}):
                raise ValueError(text)
    return settings


def _need_model(student: str) -> None:
    """Raise `ValueError` where the student, or the model under its adapter, is named by a path that leads nowhere."""
    if names_missing_model(student):
        raise ValueError(
            f"the student {student!r} cannot be loaded: model_name_or_path names no path on this machine."
            f"{did_you_mean(student)} Fix the path, or give a model id of the Hub, owner/name without ./ or ~ before it."
        )
    if not has_adapter(student):
        return
    base = base_of(student)
    if names_missing_model(base):
        raise ValueError(
            f"the student {student!r} is an adapter for {base!r}, and there is no such path on this machine."
            f"{did_you_mean(base)} Correct base_model_name_or_path in its adapter_config.json, or start from the folder in "
            "which it was trained."
        )


def _check_values(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if not isinstance(value, str):
            continue
        if name in ENUMERATIONS:
            allowed = values_of("transformers", *ENUMERATIONS[name])
        elif name == "token_rule":
            allowed = keys_of("camopd", "token_rules/__init__.py", "TOKEN_RULES")
        elif name == "dtype":
            allowed = DTYPES
        else:
            continue
        if value not in allowed:
            meant = _meant(value, allowed)
            names = "the names there are" if meant and len(allowed) > _FEW else ", ".join(allowed)
            raise ValueError(f"{name}={value!r} is none of {names}.{meant}")
    check_written(settings)
    for name, value in settings.items():
        if isinstance(value, str):
            _check_type(name, value)
    epochs = settings.get("num_train_epochs")
    if isinstance(epochs, (int, float, str)) and float(epochs) != -1:
        raise ValueError(
            f"num_train_epochs={epochs} cannot be used with CaMOPD: with a stream per branch there is no epoch to count; "
            "set max_steps. Leave it out, or at -1.0."
        )


def _check_type(name: str, text: str) -> None:
    """Raise `ValueError` for a text where a number, or true or false, has to be."""
    kinds = types().get(name, frozenset())
    if kinds == {"bool"} and text.lower() not in BOOLS:
        raise ValueError(f"{name} must be true or false, got {without_secrets(repr(text))}.")
    for kind, read, must_be in (("int", int, "a whole number"), ("float", float, "a number")):
        if kinds == {kind}:
            try:
                read(text)
            except ValueError:
                raise ValueError(f"{name} must be {must_be}, got {without_secrets(repr(text))}.") from None


def _schedule(settings: dict[str, Any]) -> Schedule:
    try:
        return Schedule.parse(settings.get("schedule", default_of("schedule")))
    except (CaMOPDError, TypeError) as error:
        raise ValueError(str(error)) from None


def _meant(value: str, known: Collection[str]) -> str:
    """Of the names that are near, or begin with what is near."""

    def nearness(name: str) -> float:
        return max(difflib.SequenceMatcher(None, value, text).ratio() for text in (name, name[: len(value)]))

    nearest = max(known, key=nearness)
    return f" Did you mean {nearest!r}?" if nearness(nearest) >= 0.6 else ""
