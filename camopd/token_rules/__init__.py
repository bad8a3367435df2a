"""Which tokens count: what is published beside CaMOPD. A file and a line of the table per rule; sigma.py weighs branches.

The rules are off by default. `docs/methods.md` says where the sources differ or are silent, and what was chosen.
"""

from typing import Any

from .base import TokenRule, weigh
from .relaxed_opd import RelaxedOPD
from .selectkd import SelecTKD
from .sigma import sigma_weights
from .teacher_free import TeacherFree
from .top_k import TopK


# By the name in `token_rule`.
TOKEN_RULES: dict[str, type[TokenRule]] = {
    "none": TokenRule,
    "relaxed_opd": RelaxedOPD,
    "selectkd": SelecTKD,
    "teacher_free": TeacherFree,
}


def rule_of(args: Any) -> TokenRule:
    """The rule of a run."""
    return TopK(args) if args.divergence == "top_k" else TOKEN_RULES[args.token_rule](args)


__all__ = ["TOKEN_RULES", "TokenRule", "rule_of", "sigma_weights", "weigh"]
