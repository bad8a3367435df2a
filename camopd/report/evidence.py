"""What the numbers behind the report's signs were worth where it could be tried: over runs whose end is known.

These are runs of models of 0.3 million weights, by `python -m testbed.explore`, which writes
benchmarks/results/testbed/exploratory/signs.json; a test holds this file to that one.
"""

from __future__ import annotations

from dataclasses import dataclass


RUNS = 0
SEEDS = 0


@dataclass(frozen=True)
class Evidence:
    """Rank correlations of a number of a run with how it ended, over all runs, and what the number says something of."""

    sign: str  # that the number belongs to; "" for one that is no sign
    recovery: float | None  # of the covered skills, at the end; `None` where the number does not vary
    preservation: float | None  # of the domain's accuracy
    says: tuple[str, ...] = ()  # clear over all runs, and within a method as well


EVIDENCE: dict[str, Evidence] = {}
WORDS = {"recovery": "recovery", "preservation": "what was kept of the domain"}


def worth(sign: str) -> str:
    """What a sign said of how runs ended, as a cell of a table."""
    found = {number: each for number, each in EVIDENCE.items() if each.sign == sign}
    if not found:
        return "not tried"
    said = [
        f"{number}: {getattr(each, outcome):+.2f} with {WORDS[outcome]}"
        for number, each in found.items()
        for outcome in each.says
    ]
    return "; ".join(said) or "nothing"


def in_short() -> str:
    """Which signs said something of how runs ended, which did not, and where that was tried."""
    signs = list(dict.fromkeys(each.sign for each in EVIDENCE.values() if each.sign))
    useful = [sign.lower() for sign in signs if worth(sign) != "nothing"]
    others = [sign.lower() for sign in signs if worth(sign) == "nothing"]
    beside = [f"{number} ({', '.join(f'{getattr(each, of):+.2f} with {WORDS[of]}' for of in each.says)})"
              for number, each in EVIDENCE.items() if not each.sign and each.says]  # fmt: skip
    parts = [
        f"*On small models*: rank correlation with how {RUNS} runs of models of 0.3 million weights ended ({SEEDS} seeds): "
        "what was recovered, and what kept."
    ]
    if useful:
        parts.append(f"There {', '.join(useful)} said something of it.")
    if others:
        parts.append(f"{', '.join(others).capitalize()} said nothing that stands out from chance.")
    if beside:
        parts.append(f"So did, of metrics that are no signs here: {'; '.join(beside)}.")
    return " ".join([*parts, "Of larger models nothing is known."])
