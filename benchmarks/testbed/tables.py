"""What the runs say: outcomes, paired differences with intervals, and the tables and figures of the protocols."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from camopd import atomic
from camopd.eval.stats import Interval, difference, resampled_means
from camopd.report.page import table as markdown_table

from .arms import ARMS, NAMES, rates
from .signs import said


KEPT = 0.95  # of the specialised model's accuracy on its domain, that counts as preserved
LEVEL = 0.05
BASE = "camopd"
# What each hypothesis says is larger, and than what; the protocols have the reasons. A comparison has those of its arms.
CONTRASTS = (
    ("counteraction", "camopd", "camopd_mixed"),
    ("counteraction", "without_selection", "mixed_3_1"),
    ("weak signal", "camopd", "random_selection"),
    ("weak signal", "camopd", "without_selection"),
    ("weak signal", "random_selection", "smallest_gaps"),
    ("budget", "vanilla_token", "vanilla"),
    ("optimizer", "branch_moments", "camopd"),
    ("optimizer", "beta1_0", "camopd"),
    ("optimizer", "sgd", "camopd"),
    ("teacher", "vanilla", "teacher_free"),
    ("gradient", "full", "camopd"),
    ("gradient", "top_k", "camopd"),
    ("gradient", "baseline_kl", "camopd"),
    ("gradient", "full_without_selection", "without_selection"),
)
OWN = "This is the protocol's table."
BESIDE = "Not in the protocol, made after its tables had been seen."
Runs = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What a run had come to at a measured step. Shares; NaN where there was nothing to recover."""

    recovery: float  # of covered skills
    uncovered: float
    preservation: float
    tokens: int
    step: int


def read(out: Path) -> list[dict[str, Any]]:
    """The results that are there."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "runs").glob("*.json"))]


def arms_of(runs: Runs) -> list[str]:
    """The arms that the runs are of."""
    there = {run["arm"] for run in runs}
    return [arm for arm in ARMS if arm in there]


def at(run: Mapping[str, Any], point: Mapping[str, Any]) -> Outcome:
    """A measured point of a run, on the half of the items that reports."""
    start, top, now = run["points"][0]["report"], run["general"]["report"], point["report"]

    def recovered(group: str) -> float:
        way = top[group] - start[group]
        return (now[group] - start[group]) / way if way > 0 else math.nan

    preservation = now["domain"] / start["domain"] if start["domain"] > 0 else math.nan
    return Outcome(recovered("covered"), recovered("uncovered"), preservation, point["tokens"], point["step"])


def outcome(run: Mapping[str, Any], most_tokens: float = math.inf, last_step: float = math.inf) -> Outcome:
    """The primary outcome: recovery at the best measured step that keeps the domain.

    Of the steps within the budget at which the half of the items that chooses has at least 95 % of the specialised model's
    domain accuracy, the one with the highest accuracy on covered skills there; read from the other half. Step 0 is always
    one of them, with a recovery of 0.
    """
    needed = KEPT * run["points"][0]["choose"]["domain"]
    within = [p for p in run["points"] if p["tokens"] <= most_tokens and p["step"] <= last_step]
    allowed = [p for p in within if p["choose"]["domain"] >= needed]
    return at(run, max(allowed, key=lambda point: point["choose"]["covered"]))


def last(run: Mapping[str, Any], most_tokens: float = math.inf, last_step: float = math.inf) -> Outcome:
    """The last measured point within the budget, whatever it keeps of the domain."""
    return at(run, [p for p in run["points"] if p["tokens"] <= most_tokens and p["step"] <= last_step][-1])


def matched_steps(runs: Runs, tokens: float) -> dict[str, int]:
    """By arm the measured step at which the mean of trained tokens over the seeds is nearest; of equal ones the earlier."""
    steps = sorted({point["step"] for run in runs for point in run["points"]})
    trained = {step: by_arm(runs, lambda run, step=step: last(run, last_step=step)) for step in steps}
    return {
        arm: min(steps, key=lambda step: abs(_mean([each.tokens for each in trained[step][arm]]) - tokens))
        for arm in arms_of(runs)
    }


def chosen_rates(runs: Runs) -> dict[str, float]:
    """The learning rate of each arm with the highest mean outcome over the tuning seeds; of equal ones the lower."""
    means = rate_means(runs)
    return {arm: max(rates(arm), key=lambda rate: (means[arm][rate], -rate)) for arm in means}


def rate_means(runs: Runs) -> dict[str, dict[float, float]]:
    """Mean outcome over the tuning seeds by arm and learning rate; NaN where there is none yet."""
    tuning = [run for run in runs if run["stage"] == "tuning"]
    return {
        arm: {rate: _mean([outcome(run).recovery for run in tuning if (run["arm"], run["learning_rate"]) == (arm, rate)])
              for rate in rates(arm)}
        for arm in arms_of(runs)
    }  # fmt: skip


def by_arm(runs: Runs, of: Callable[[Mapping[str, Any]], Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes of the comparison, by arm, one for each seed of which all arms are there, in the order of the seeds."""
    comparison = {(run["arm"], run["seed"]): run for run in runs if run["stage"] == "comparison"}
    arms = arms_of(runs)
    seeds = sorted({seed for _, seed in comparison if all((arm, seed) in comparison for arm in arms)})
    return {arm: [of(comparison[arm, seed]) for seed in seeds] for arm in arms}


def flip_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of a mean difference, by all changes of sign of the paired differences. Exact.

    >>> flip_p([1.0, 2.0, 3.0])
    0.25
    """
    values = np.asarray(differences, dtype=float)
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    means = abs(signs @ values)
    return float((means >= abs(values.sum()) - 1e-12).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in their order (Holm, 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean with its bootstrap interval over seeds."""
    resamples = resampled_means(values)[:, 0]
    low, high = np.quantile(resamples, [0.025, 0.975])
    return Interval(float(np.mean(values)), float(low), float(high))


@dataclass(frozen=True)
class Contrast:
    """A paired difference of two arms' recovery, its p-value, and that adjusted for all of its table."""

    first: str
    second: str
    interval: Interval
    p: float
    adjusted: float

    @property
    def verdict(self) -> str:
        """Of a hypothesis that says the first is larger."""
        if self.adjusted >= LEVEL:
            return "undecided"
        return "supported" if self.interval.value > 0 else "contradicted"


def contrasts(found: Mapping[str, Sequence[Outcome]], pairs: Sequence[tuple[str, str]]) -> list[Contrast]:
    """First minus second for each pair."""
    values = {arm: [each.recovery for each in outcomes] for arm, outcomes in found.items()}
    p_values = [flip_p(np.subtract(values[first], values[second])) for first, second in pairs]
    return [
        Contrast(first, second, difference(values[second], values[first]), p, adjusted)
        for (first, second), p, adjusted in zip(pairs, p_values, holm(p_values), strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------- tables


def write(out: Path, protocol: str = "PROTOCOL.md", reached: str = "", matched: str = "") -> None:
    """tables.md and the figures, of what is there. `reached` and `matched` say what the protocol has of the two tables of
    trained tokens, where that differs from the first."""
    from . import figures

    runs = read(out)
    if not runs:
        return print("no run of this comparison yet")
    parts = ["# The testbed's tables", _head(runs, protocol)]
    prompts = by_arm(runs, outcome)
    if prompts[BASE]:
        budget = min(
            run["points"][-1]["tokens"] for run in runs if run["stage"] == "comparison" and run["arm"] == BASE
        )
        tokens = by_arm(runs, lambda run: outcome(run, budget))
        short = {arm for arm, ends in by_arm(runs, last).items()
                 if min(end.tokens for end in ends) < budget}  # fmt: skip
        parts += [
            "## Equal prompts\n", _arms_table(runs, prompts, set()),
            f"\n## Equal trained tokens: at most {budget}\n",
            _arms_table(runs, tokens, short, by_arm(runs, lambda run: last(run, budget))),
            "\n† has trained fewer tokens than that in a run's whole budget of prompts.",
            f"\n{reached or OWN} Its tokens are not equal: runs are measured every few steps, and an arm "
            "is judged by the last measurement before the limit. *Reached* is what it has trained by then, "
            "mean over seeds.",
            f"\n## Matched trained tokens: about {budget}\n", _matched_table(runs, budget),
            f"\n{matched or BESIDE} Each arm up to the measured step at which it has "
            "trained nearest to that many tokens, the same step for all seeds. On the left the protocol's outcome: the "
            "best step until then that keeps the domain; p after Holm over the arms of this table. On the right the "
            "measurement at that step itself, whatever it keeps of the domain.",
            "\n## Hypotheses\n", _hypotheses(prompts, tokens), "\n## The end of the runs\n", _ends(runs),
        ]  # fmt: skip
        figures.draw(out, runs, prompts, by_arm(runs, last))
    parts += ["\n## Learning rates\n", _rates(runs)]
    atomic.write(out / "tables.md", "\n".join(parts) + "\n")
    print("\n".join(parts))


def _head(runs: Runs, protocol: str) -> str:
    seconds = sum(run["seconds"] for run in runs)
    seeds = len(by_arm(runs, outcome)[BASE])
    return (
        f"\nMade by `make testbed`; {protocol} says what everything is. {len(runs)} runs, {seconds / 60:.0f} minutes of "
        f"runs, added up. {seeds} seeds of the comparison have all arms and are in the tables. Brackets are 95 % bootstrap "
        "intervals over seeds.\n"
    )


def _arms_table(
    runs: Runs,
    found: Mapping[str, Sequence[Outcome]],
    short: set[str],
    reached: Mapping[str, Sequence[Outcome]] | None = None,
) -> str:
    chosen = chosen_rates(runs)
    others = [arm for arm in found if arm != BASE]
    against = {each.first: each for each in contrasts(found, [(arm, BASE) for arm in others])}
    rows = [["arm", "learning rate", "recovery, covered", "minus CaMOPD", "p (Holm)", "recovery, uncovered",
             "preservation", "step", "trained tokens", *(["reached"] if reached else [])]]  # fmt: skip
    for arm in sorted(found, key=lambda arm: -_mean([each.recovery for each in found[arm]])):
        each, versus = found[arm], against.get(arm)
        rows.append([
            NAMES[arm] + (" †" if arm in short else ""), f"{chosen[arm]:g}",
            said(mean_interval([one.recovery for one in each])), said(versus.interval, "+") if versus else "",
            f"{versus.adjusted:.3f}" if versus else "", said(mean_interval([one.uncovered for one in each])),
            f"{_mean([one.preservation for one in each]):.3f}", f"{_mean([one.step for one in each]):.0f}",
            f"{_mean([one.tokens for one in each]):.0f}",
            *([f"{_mean([one.tokens for one in reached[arm]]):.0f}"] if reached else []),
        ])  # fmt: skip
    rows.append(["no training", "", "0", "", "", "0", "1", "0", "0", *(["0"] if reached else [])])
    return markdown_table(rows)


def _matched_table(runs: Runs, tokens: int) -> str:
    steps = matched_steps(runs, tokens)
    kept = by_arm(runs, lambda run: outcome(run, last_step=steps[run["arm"]]))
    there = by_arm(runs, lambda run: last(run, last_step=steps[run["arm"]]))
    pairs = [(arm, BASE) for arm in kept if arm != BASE]
    left, right = ({each.first: each for each in contrasts(found, pairs)} for found in (kept, there))
    rows = [["arm", "up to step", "trained tokens", "recovery, covered", "minus CaMOPD", "p (Holm)",
             "at that step: recovery", "minus CaMOPD", "preservation"]]  # fmt: skip
    for arm in sorted(kept, key=lambda arm: -_mean([each.recovery for each in kept[arm]])):
        rows.append([
            NAMES[arm], str(steps[arm]), f"{_mean([one.tokens for one in there[arm]]):.0f}",
            said(mean_interval([one.recovery for one in kept[arm]])),
            said(left[arm].interval, "+") if arm in left else "", f"{left[arm].adjusted:.3f}" if arm in left else "",
            said(mean_interval([one.recovery for one in there[arm]])),
            said(right[arm].interval, "+") if arm in right else "",
            said(mean_interval([one.preservation for one in there[arm]])),
        ])  # fmt: skip
    return markdown_table(rows)


def _hypotheses(prompts: Mapping[str, Sequence[Outcome]], tokens: Mapping[str, Sequence[Outcome]]) -> str:
    asked = [each for each in CONTRASTS if {*each[1:]} <= {*prompts}]
    pairs = [(first, second) for _, first, second in asked]
    rows = [
        ["hypothesis", "says that", "difference, equal prompts", "p (Holm)", "", "equal trained tokens", "p (Holm)"]
    ]
    for (name, first, second), one, other in zip(
        asked, contrasts(prompts, pairs), contrasts(tokens, pairs), strict=True
    ):
        rows.append([
            name, f"{NAMES[first]} > {NAMES[second]}", said(one.interval, "+"), f"{one.adjusted:.3f}", one.verdict,
            said(other.interval, "+"), f"{other.adjusted:.3f}",
        ])  # fmt: skip
    return markdown_table(rows)


def _ends(runs: Runs) -> str:
    ends = by_arm(runs, last)
    rows = [["arm", "recovery, covered", "recovery, uncovered", "preservation"]]
    for arm, each in ends.items():
        columns = ([getattr(one, name) for one in each] for name in ("recovery", "uncovered", "preservation"))
        rows.append([NAMES[arm], *(said(mean_interval(column)) for column in columns)])
    return markdown_table(rows)


def _rates(runs: Runs) -> str:
    means, chosen = rate_means(runs), {}
    if not any(math.isnan(mean) for row in means.values() for mean in row.values()):
        chosen = chosen_rates(runs)
    rows = [["arm", "first", "second", "third", "fourth", "fifth", "range", "steps that keep the domain"]]
    for arm, row in means.items():
        known = [mean for mean in row.values() if not math.isnan(mean)]
        cells = [f"{'-' if math.isnan(mean) else f'{mean:.3f}'}{' *' if chosen.get(arm) == rate else ''} ({rate:g})"
                 for rate, mean in row.items()]  # fmt: skip
        rows.append([NAMES[arm], *cells, f"{max(known) - min(known):.3f}" if len(known) == len(row) else "-",
                     _keeping(runs, arm, chosen[arm]) if chosen else "-"])  # fmt: skip
    text = markdown_table(rows)
    if chosen:
        best = [means[arm][chosen[arm]] for arm in means]
        same = [[means[arm][rate] for arm in means if arm != "sgd"] for rate in rates(BASE)]
        turned = [_turned(first, second) for first, second in itertools.pairwise(same)]
        between = max(best) - min(best)
        within = _mean([max(row.values()) - min(row.values()) for row in means.values()])
        text += (
            f"\n\n`*` is chosen. Between arms, each at its own rate, the range is {between:.3f}; within an arm over its "
            f"rates it is {within:.3f} on average: the hypothesis *learning rate* is "
            f"{'supported' if within > between else 'not supported'}. "
            f"From one rate to the next {', '.join(f'{share:.0%}' for share in turned)} of the pairs of arms "
            "change their order (SGD left out). The last column is of the chosen rate: at how many measurements behind the "
            "start the tuning runs have 95 % of the domain in the half that chooses."
        )
    return text


def _keeping(runs: Runs, arm: str, rate: float) -> str:
    """At how many of the measurements of an arm's tuning runs the domain is kept."""
    kept = [
        point["choose"]["domain"] >= KEPT * run["points"][0]["choose"]["domain"]
        for run in runs
        if (run["stage"], run["arm"], run["learning_rate"]) == ("tuning", arm, rate)
        for point in run["points"][1:]
    ]
    return f"{sum(kept)} of {len(kept)}"


def _turned(first: Sequence[float], second: Sequence[float]) -> float:
    """Share of the pairs that stand in another order in the second than in the first; equal ones stand in none."""
    pairs = list(itertools.combinations(range(len(first)), 2))
    return sum((first[a] - first[b]) * (second[a] - second[b]) < 0 for a, b in pairs) / len(pairs)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
