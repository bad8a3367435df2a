"""What the numbers behind the report's signs were worth where it could be tried: over runs whose end is known.

These are runs of models of 0.3 million weights, by `make testbed ARGS="--only settings"`, which writes
benchmarks/results/testbed/exploratory/signs.json; a test holds this file to that one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


NOT_TRIED = "not tried"  # of a sign that no run was asked for
RUNS = 66
SEEDS = 3


@dataclass(frozen=True)
class Evidence:
    """Rank correlations of a number of a run with how it ended, over all runs, and what the number says something of."""

    sign: str  # that the number belongs to; "" for one that is not a sign
    recovery: float | None  # of the covered skills, at the end; `None` where the number does not vary
    preservation: float | None  # of the domain's accuracy, at the end
    kept: float | None  # recovery at the best measured step that keeps 95 % of the domain
    says: tuple[str, ...] = ()  # clear over all runs, and within a method as well


EVIDENCE: dict[str, Evidence] = {
    "general gap, last third": Evidence("A gap that rises", -0.92, -0.25, -0.83, ("recovery", "kept")),
    "general gap, last over first third": Evidence("A gap that rises", -0.91, -0.24, -0.83, ("recovery", "kept")),
    "domain gap, last third": Evidence("A gap that rises", -0.29, -0.52, -0.40),
    "domain gap, last over first third": Evidence("A gap that rises", -0.57, -0.28, -0.58, ("kept",)),
    "cosine of the branch gradients": Evidence("Counteraction", 0.04, -0.19, -0.07),
    "gradient norm, general over domain": Evidence("Imbalance", -0.23, 0.13, -0.17),
    "trained tokens, general over domain": Evidence("Imbalance", -0.74, -0.28, -0.66, ("recovery", "kept")),
    "coherence beyond a random set, general": Evidence("Weak samples", 0.02, 0.33, 0.16),
    "score and length, general": Evidence("Selection follows length", 0.08, 0.09, 0.06),
    "top 1 % of tokens, general": Evidence("Selection follows outliers", 0.92, 0.24, 0.84, ("recovery", "kept")),
    "score and perplexity, general": Evidence("Selection follows outliers", -0.95, -0.25, -0.87, ("recovery", "kept")),
    "update with its gradient": Evidence("Steps mostly momentum", 0.26, -0.00, 0.25),
    "share kept, general": Evidence("", -0.30, 0.01, -0.20),
    "entropy, general, last third": Evidence("", -0.84, -0.17, -0.76, ("recovery", "kept")),
    "entropy, domain, last third": Evidence("", -0.42, -0.53, -0.53),
    "teacher's perplexity, general, last third": Evidence("", -0.91, -0.26, -0.84, ("recovery", "kept")),
    "answers cut, general, last third": Evidence("", -0.34, -0.02, -0.32),
    "gradient norm": Evidence("", -0.48, -0.44, -0.61),
}
WORDS = {
    "recovery": "recovery", "preservation": "what was kept of the domain", "kept": "recovery while the domain is kept",
}  # fmt: skip


def worth(sign: str) -> str:
    """What a sign said of how runs ended, as a cell of a table."""
    found = {number: each for number, each in EVIDENCE.items() if each.sign == sign}
    if not found:
        return NOT_TRIED
    said = [
        f"{number}: {getattr(each, outcome):+.2f} with {WORDS[outcome]}"
        for number, each in found.items()
        for outcome in each.says
    ]
    return "; ".join(said) or "nothing"


def in_short(settled: Collection[str]) -> str:
    """Which of these signs said something of how runs ended, which did not, and where that was tried; "" where none was."""
    signs = list(dict.fromkeys(each.sign for each in EVIDENCE.values() if each.sign in settled))
    if not signs:
        return ""
    useful = [sign.lower() for sign in signs if worth(sign) != "nothing"]
    others = [sign.lower() for sign in signs if worth(sign) == "nothing"]
    beside = [f"{number} ({', '.join(f'{getattr(each, of):+.2f} with {WORDS[of]}' for of in each.says)})"
              for number, each in EVIDENCE.items() if not each.sign and each.says]  # fmt: skip
    parts = [
        f"*On small models*: rank correlation with how {RUNS} runs of models of 0.3 million weights ended ({SEEDS} seeds): "
        "what was recovered, what was kept of the domain, and what was recovered while it was kept."
    ]
    if useful:
        parts.append(f"There the numbers of {', '.join(useful)} said something of it.")
        parts += [f"So did metrics that belong to no sign: {'; '.join(beside)}."] if beside else []
        parts.append(
            "A number that goes with recovery need not be its cause: as a gap falls, few tokens come to carry it."
        )
    if others:
        parts.append(f"{', '.join(others).capitalize()} said nothing that stands out from chance.")
    parts.append("Of larger models nothing is known.")
    return " ".join(parts)
