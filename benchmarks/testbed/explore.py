"""Exploratory, and of neither protocol: settings one at a time around CaMOPD's, and what a run's signs are worth.

    make testbed ARGS="--only settings"

Models, task, budget and outcome are those of the protocol; seeds are others, and every setting is tried at two learning
rates, since a rate alone turns the order of methods round. A run is measured every four steps, and has the numbers that
`camopd report` shows of it. It is one file, and is not run again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from camopd import atomic
from camopd.eval.stats import Interval
from camopd.report.page import table as markdown_table

from . import signs, tables
from .arms import ARMS
from .jobs import go_through, say
from .run import STEPS, Bench, run
from .signs import said
from .tables import Outcome


RATES = (1.5e-4, 3e-4)
EVERY = 4  # steps, a cycle of the schedule
BASE = "CaMOPD"
VARIATIONS: dict[str, dict[str, Any]] = {
    BASE: ARMS["camopd"],
    "schedule 1-1": {**ARMS["camopd"], "schedule": "general:1,domain:1"},
    "schedule 7-1": {**ARMS["camopd"], "schedule": "general:7,domain:1"},
    "mass target 0.6": {**ARMS["camopd"], "mass_target": 0.6},
    "no selection": ARMS["without_selection"],
    "mixed 1:1": ARMS["vanilla"],
    "mixed 1:1, scale 2": {**ARMS["vanilla"], "scale": {"general": 2, "domain": 1}},
    "answers cut at 4": {**ARMS["camopd"], "max_completion_length": 4},
    "baseline: kl": {**ARMS["camopd"], "baseline": "kl"},
    "divergence: top_k": {**ARMS["camopd"], "divergence": "top_k", "divergence_top_k": 5},
    "divergence: full": {**ARMS["camopd"], "divergence": "full"},
}
GRADIENTS = ("baseline: kl", "divergence: top_k", "divergence: full")  # of CaMOPD's samples
SEEDS = tuple(range(201, 213))
HALF = 0.5  # recovery of covered skills, with the domain kept, to which steps are counted
OUTCOMES = {"recovery": "recovery, end", "preservation": "domain, end", "kept": "recovery with the domain kept"}


def work(out: Path, models: Path, until: float, seeds: Sequence[int]) -> None:
    """Do the runs that are not there, all of a seed before the next."""
    jobs = (
        (f"{seed}-{re.sub('[^a-z0-9.]+', '_', name.lower())}-{rate:g}", seed, partial(_run, name, rate, seed))
        for seed in seeds
        for name in VARIATIONS
        for rate in RATES
    )
    go_through(jobs, out, models, until)


def _run(name: str, rate: float, seed: int, bench: Bench) -> dict[str, Any]:
    settings = {**VARIATIONS[name], "diagnostics_steps": EVERY}
    return run(bench, name, rate, seed, every=EVERY, settings=settings)


# -------------------------------------------------------------------------------------------------------------- tables


def by_seed(runs: tables.Runs) -> dict[int, dict[tuple[str, float], Mapping[str, Any]]]:
    """The runs of each seed that has all of them."""
    found: dict[int, dict[tuple[str, float], Mapping[str, Any]]] = {}
    for each in runs:
        found.setdefault(each["seed"], {})[each["arm"], each["learning_rate"]] = each
    return {seed: of for seed, of in sorted(found.items()) if len(of) == len(VARIATIONS) * len(RATES)}


def write(out: Path) -> None:
    """explore.md, and signs.json for what `camopd report` says of its signs."""
    seeds = by_seed(tables.read(out))
    if not seeds:
        return say("no seed has all runs yet")
    keys, each = list(next(iter(seeds.values()))), list(seeds.values())
    ends = {key: [tables.at(of[key], of[key]["points"][-1]) for of in each] for key in keys}
    best = {key: [tables.outcome(of[key]) for of in each] for key in keys}
    steps = {key: [steps_to(of[key]) for of in each] for key in keys}
    rows = {seed: [_row(run) for run in of.values()] for seed, of in seeds.items()}
    minutes = sum(run["seconds"] for of in each for run in of.values()) / 60
    parts = [
        "# Settings one at a time, and what signs are worth\n",
        f"Exploratory: in neither protocol, no hypothesis, no adjustment for {len(VARIATIONS)} settings. "
        f'`make testbed ARGS="--only settings"`; {len(keys) * len(each)} runs on {len(each)} seeds, {minutes:.0f} minutes. '
        "Brackets are 95 % intervals over seeds (Student's t).",
        "\n## Settings\n",
        "Recovery of the covered skills at the best measured step that keeps 95 % of the domain, at each learning rate "
        "and on average over the two; the difference to CaMOPD's defaults is paired by seed.\n",
        _settings(best, ends),
        "\n## Other gradients\n",
        f"Mean over the learning rates. Steps until {HALF:.0%} of the covered skills are back with the domain kept, as "
        f"measured every {EVERY}; a run that does not come there counts as {STEPS}.\n",
        _gradients(best, steps),
        "\n## Signs\n",
        "Rank correlation of a number of the report with how the run ended. *Within* leaves methods out: only learning "
        f"rates and chance differ. A number says something of an outcome where both are at least {signs.CLEAR}, with an "
        "interval without 0, and of one sign. That rule is older than the runs.\n",
        _signs(rows),
    ]
    atomic.write(out / "explore.md", "\n".join(parts) + "\n")
    found = {"runs": len(keys) * len(each), "seeds": len(each), "numbers": evidence(rows)}
    atomic.write(out / "signs.json", json.dumps(found, indent=1) + "\n")
    print("\n".join(parts))


def steps_to(run: Mapping[str, Any], share: float = HALF) -> int:
    """The first measured step with so much recovery and the domain kept, each on the half of the items that chooses;
    `STEPS` where there is none. No outcome is read there, so the half that reports stays out of it."""
    first, top = run["points"][0]["choose"], run["general"]["choose"]["covered"]
    for point in run["points"]:
        now = point["choose"]
        back = (now["covered"] - first["covered"]) / (top - first["covered"])
        if back >= share and now["domain"] >= tables.KEPT * first["domain"]:
            return int(point["step"])
    return STEPS


def _row(run: Mapping[str, Any]) -> dict[str, Any]:
    end = tables.at(run, run["points"][-1])
    return {
        "method": run["arm"], **run["signs"], "recovery": end.recovery, "preservation": end.preservation,
        "kept": tables.outcome(run).recovery,
    }  # fmt: skip


def _over_rates(found: Mapping[tuple[str, float], Sequence[Any]], name: str, field: str = "recovery") -> list[float]:
    """Mean over the learning rates, of each seed."""
    of = [[getattr(one, field) if isinstance(one, Outcome) else one for one in found[name, rate]] for rate in RATES]
    return [sum(values) / len(values) for values in zip(*of, strict=True)]


def _minus(one: Sequence[float], other: Sequence[float]) -> Interval:
    return signs.t_interval([a - b for a, b in zip(one, other, strict=True)])


def _settings(best: Mapping[Any, Sequence[Outcome]], ends: Mapping[Any, Sequence[Outcome]]) -> str:
    rows = [["setting", *(f"at {rate:g}" for rate in RATES), "mean", f"minus {BASE}", "domain at the end",
             "trained tokens"]]  # fmt: skip
    base = _over_rates(best, BASE)
    for name in VARIATIONS:
        each = [signs.t_interval([one.recovery for one in best[name, rate]]).value for rate in RATES]
        mine = _over_rates(best, name)
        rows.append([
            f"`{name}`" if ": " in name else name, *(f"{value:.3f}" for value in each), said(signs.t_interval(mine)),
            "" if name == BASE else said(_minus(mine, base), "+"),
            said(signs.t_interval(_over_rates(ends, name, "preservation"))),
            f"{signs.t_interval(_over_rates(ends, name, 'tokens')).value:.0f}",
        ])  # fmt: skip
    return markdown_table(rows)


def _gradients(best: Mapping[Any, Sequence[Outcome]], steps: Mapping[Any, Sequence[int]]) -> str:
    less = "minus the sampled gap"
    rows = [["gradient", "recovery", less, "steps", less, "runs that come there"]]
    base, base_took = _over_rates(best, BASE), _over_rates(steps, BASE)
    for name in (BASE, *GRADIENTS):
        mine, took = _over_rates(best, name), _over_rates(steps, name)
        there = sum(step < STEPS for rate in RATES for step in steps[name, rate])
        rows.append([
            "sampled gap" if name == BASE else f"`{name}`", said(signs.t_interval(mine)),
            "" if name == BASE else said(_minus(mine, base), "+"), _steps(signs.t_interval(took)),
            "" if name == BASE else _steps(_minus(took, base_took), "+"),
            f"{there} of {len(RATES) * len(took)}",
        ])  # fmt: skip
    return markdown_table(rows)


def _steps(interval: Interval, sign: str = "") -> str:
    return f"{interval.value:{sign}.1f} [{interval.low:{sign}.1f}, {interval.high:{sign}.1f}]"


def evidence(rows: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Of each number of signs.py, the correlations with the outcomes, over all runs and within methods, and the outcomes
    that it `says` something of: those with which both are clear, in the same direction."""
    found: dict[str, Any] = {}
    for number, each in signs.NUMBERS.items():
        pairs = {
            outcome: [signs.of_seeds(rows, number, outcome, within) for within in (False, True)]
            for outcome in OUTCOMES
        }
        found[number] = {
            "sign": each.sign,
            "says": [outcome for outcome, (over, inside) in pairs.items()
                     if signs.is_clear(over) and signs.is_clear(inside) and over.value * inside.value > 0],
            **{outcome: {"all": asdict(over), "within": asdict(inside)} for outcome, (over, inside) in pairs.items()},
        }  # fmt: skip
    return found


def _signs(rows: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    lines = [
        [
            "number",
            *(f"{words}{more}" for words in OUTCOMES.values() for more in ("", ", within")),
            "says something of",
        ]
    ]
    for number, found in evidence(rows).items():
        cells = [said(Interval(**found[outcome][which]), "+") for outcome in OUTCOMES for which in ("all", "within")]
        lines.append([number, *cells, ", ".join(OUTCOMES[outcome] for outcome in found["says"]) or "nothing"])
    return markdown_table(lines)
