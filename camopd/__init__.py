"""CaMOPD: bring back the general abilities a specialised language model has lost, and keep its domain.

Paper: https://arxiv.org/abs/2605.27115. Names are imported when first used, so that `camopd --help` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__


__all__ = ["CaMOPDConfig", "CaMOPDTrainer", "Schedule", "Teacher", "TokenScores"]

if TYPE_CHECKING:
    from .config import CaMOPDConfig
    from .schedule import Schedule
    from .teachers.base import Teacher, TokenScores
    from .trainer import CaMOPDTrainer

_HOME = {
    "CaMOPDConfig": ".config",
    "CaMOPDTrainer": ".trainer",
    "Schedule": ".schedule",
    "Teacher": ".teachers.base",
    "TokenScores": ".teachers.base",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
