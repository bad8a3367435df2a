"""What is wrong with a run's settings and can be said before torch is imported, which takes ten seconds and more.

All of it is refused later, too; here it is said within two seconds.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection
from typing import Any

from .errors import CaMOPDError
from .run import check_names, named_teachers, read_settings
from .schedule import Schedule, mapping_form
from .settings import declared, values_of
from .teachers.address import names_missing_folder, without_secrets


DTYPES = ("auto", "bfloat16", "float16", "float32")  # of TRL's ModelConfig


def check_early(config: str, overrides: list[str]) -> None:
    """Raise `ValueError` for unknown names, values that no run can have, paths that are not there, and prompts of other
    branches than those of the schedule."""
    settings = read_settings(config, overrides)
    check_names(config, settings)
    model = settings.get("model_name_or_path")
    if isinstance(model, str) and names_missing_folder(model):
        raise ValueError(
            f"the student {model!r} cannot be loaded: model_name_or_path names no path on this machine. Fix the path, or "
            "give a model id of the Hub."
        )
    if "teachers" in settings:
        named_teachers(settings)
    _check_values(settings)
    prompts = settings.get("prompts")
    if prompts is not None and not isinstance(prompts, dict):
        raise ValueError(without_secrets(mapping_form("prompts", prompts)))
    for _, text in _schedule(settings).mismatches("prompts", prompts) if prompts else ():
        raise ValueError(text)


def _check_values(settings: dict[str, Any]) -> None:
    schedulers = values_of("transformers", "trainer_utils.py", "SchedulerType")
    for name, allowed in (("dtype", DTYPES), ("lr_scheduler_type", schedulers)):
        value = settings.get(name)
        if isinstance(value, str) and value not in allowed:
            raise ValueError(f"{name}={value!r} is none of {', '.join(allowed)}.{_meant(value, allowed)}")
    rate = settings.get("learning_rate", 0)
    try:
        number = float(rate)  # YAML reads 4e-5 as a text
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"learning_rate must be a number of at least 0, got {rate!r}.")


def _schedule(settings: dict[str, Any]) -> Schedule:
    default = next(ast.literal_eval(default) for _, name, default, _ in declared() if name == "schedule")
    try:
        return Schedule.parse(settings.get("schedule", default))
    except (CaMOPDError, TypeError) as error:
        raise ValueError(str(error)) from None


def _meant(value: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(value, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
