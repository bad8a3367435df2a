"""Which tokens count: what is published beside CaMOPD. A file and a line of the table per rule; sigma.py weighs branches.

The rules are off by default. `docs/methods.md` says where the sources differ or are silent, and what was chosen.
"""

from .base import TokenRule, weigh
from .relaxed_opd import RelaxedOPD
from .selectkd import SelecTKD
from .sigma import sigma_weights


# By the name in `token_rule`.
TOKEN_RULES: dict[str, type[TokenRule]] = {
    "none": TokenRule,
    "relaxed_opd": RelaxedOPD,
    "selectkd": SelecTKD,
}

__all__ = ["TOKEN_RULES", "TokenRule", "sigma_weights", "weigh"]
