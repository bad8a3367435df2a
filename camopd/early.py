"""What is wrong with a run's settings and can be said before torch is imported, which takes ten seconds and more.

All of it is refused later, too; here it is said within two seconds.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from .errors import CaMOPDError
from .ranges import check_written
from .run import check_names, named_teachers, read_settings
from .schedule import Schedule, mapping_form
from .settings import default_of, values_of
from .teachers.address import names_missing_folder, without_secrets


DTYPES = ("auto", "bfloat16", "float16", "float32")  # of TRL's ModelConfig


def check_early(config: str, overrides: list[str], training: bool = False) -> dict[str, Any]:
    """The settings of a run as they are written.

    Raises `ValueError` for unknown names, values that no run can have, models that are not there, and prompts, and when
    `training` also teachers, of other branches than those of the schedule.
    """
    settings = read_settings(config, overrides)
    check_names(config, settings)
    model = settings.get("model_name_or_path")
    if not model:
        raise ValueError(f"{config!r} names no student. Set model_name_or_path to the specialised model.")
    if isinstance(model, str) and names_missing_folder(model):
        raise ValueError(
            f"the student {model!r} cannot be loaded: model_name_or_path names no path on this machine. Fix the path, or "
            "give a model id of the Hub, owner/name without ./ or ~ before it."
        )
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


def _check_values(settings: dict[str, Any]) -> None:
    schedulers = values_of("transformers", "trainer_utils.py", "SchedulerType")
    for name, allowed in (("dtype", DTYPES), ("lr_scheduler_type", schedulers)):
        value = settings.get(name)
        if isinstance(value, str) and value not in allowed:
            raise ValueError(f"{name}={value!r} is none of {', '.join(allowed)}.{_meant(value, allowed)}")
    check_written(settings)


def _schedule(settings: dict[str, Any]) -> Schedule:
    try:
        return Schedule.parse(settings.get("schedule", default_of("schedule")))
    except (CaMOPDError, TypeError) as error:
        raise ValueError(str(error)) from None


def _meant(value: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(value, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
