"""Which of my branches is hurting? What a run's own numbers say to that, as signs in words.

It takes no side: the paper blames gradients that counteract each other, others blame branches of unequal weight. A sign is
there, is not there, or was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..verdict import Verdict, short, signed
from ..words import counted
from .read import branches_of, lines_of, step_kinds, teacher_seconds


DIAGNOSTICS = "diagnostics_steps"  # the setting that turns on conflict/* and coherence/*
FEWEST = 8  # measured steps of a branch below which nothing is called seen or not seen
FEWEST_FOR_TREND = 13  # steps, so that the last third has five
CLEAR = 3.0  # standard errors from which on a change is told from noise
SMALL = 0.02  # of the level: a smaller change is called none, however clear


@dataclass(frozen=True)
class Sign:
    """One thing to look for in a run: whether it is there, and the numbers."""

    name: str
    state: str  # "seen", "not seen", "unclear", "not measured"
    text: str

    @property
    def settled(self) -> bool:
        """Whether the run says one or the other."""
        return self.state not in ("unclear", "not measured")


@dataclass(frozen=True)
class Number:
    """A number of a sign: the mean of a metric in a line of it, in words, and whether the sign is seen in it."""

    metric: str  # with {branch} where there is one for each branch
    # With {mean}, {short} for the mean in three digits, {beside} for the mean of `beside`, {measured} steps.
    words: str
    seen: Callable[[pd.Series], bool] | None = None  # None: no sign, only shown
    beside: str = ""


@dataclass(frozen=True)
class Detector:
    """A sign that is seen when one of its numbers says so in one of the lines."""

    name: str
    missing: str  # where nothing is measured
    numbers: tuple[Number, ...]
    split: str = "branch"  # as `lines_of` takes it
    lead: tuple[str, str] = ("", "")  # before the numbers of a sign that is seen, of one that is not
    of_selection: str = (
        ""  # asks only branches of which samples are dropped: where none are, not "seen", or not "compared"
    )


def _related(correlation: pd.Series) -> bool:
    return abs(correlation.mean()) >= 0.3


DETECTORS = (
    # The paper's second failure mode: what selection gains in coherence beyond a random set of the same size.
    Detector(
        "Weak samples",
        f"`{DIAGNOSTICS}: 10` measures the coherence of the gradients.",
        (
            Number("coherence/{branch}/gcg", "GCG {mean:+.1f}%"),
            Number("coherence/{branch}/gcg_control", "random control {mean:+.1f}%"),
            Number("coherence/{branch}/gcg_excess", "difference {mean:+.1f} points ({measured})",
                   lambda excess: excess.mean() > CLEAR * excess.sem()),
        ),
        lead=("kept samples agree more than chance gives: ", "kept samples agree no more than chance gives: "),
        of_selection="compared",
    ),
    Detector(
        "Selection follows length",
        "no step has scores of samples of different lengths.",
        (
            Number("score/{branch}/length_spearman", "rank correlation of score and length {mean:+.2f}", _related),
            Number("selection/{branch}/length_ratio", "kept samples {short} times as long as dropped ones"),
            Number("selection/{branch}/jaccard_length", "overlap with selecting by length {mean:.2f} (chance {beside:.2f})",
                   beside="selection/{branch}/jaccard_chance"),
        ),
        of_selection="seen",
    ),
    # Whether few tokens carry the score, or text on which the teacher is lost.
    Detector(
        "Selection follows outliers",
        "no step says which tokens carry the score.",
        (
            Number("selection/{branch}/top1_share", "{mean:.0%} of the score on the top 1% of tokens",
                   lambda share: share.mean() >= 0.5),
            Number("selection/{branch}/score_perplexity_spearman",
                   "rank correlation of score and teacher perplexity {mean:+.2f}", _related),
        ),
        of_selection="seen",
    ),
    Detector(
        "Steps mostly momentum",
        "the optimizer keeps no Adam moments that can be read.",
        (Number("update/cosine", "{mean:+.2f} in {measured}", lambda cosine: cosine.mean() < 0.1),),
        "step",
        ("mean cosine of Adam's update with the step's own gradient: ",) * 2,
    ),
)  # fmt: skip


# Verdicts that settle whether a branch has moved away, in a list of branches.
SETTLED = {
    "recovered": "has recovered",
    "in part": "has recovered in part",
    "not recovered": "has not recovered",
    "not shown": "is not shown to have recovered",
    "kept": "is kept",
}


def hurting(verdicts: Sequence[Verdict]) -> str:
    """Which branch hurts by the held-out prompts; "" where none of them was measured before and after.

    One hurts that has certainly moved away from its teacher, and by more than a branch may that is kept.
    """
    away, settled, left = [], [], []
    for verdict in verdicts:
        change = verdict.change
        if change is None:
            continue
        low, high = change.value - change.half, change.value + change.half
        if verdict.state == "moved" or (verdict.state == "not recovered" and low > 0):
            away.append(
                f"**{verdict.branch}**: on held-out prompts it has moved away from its teacher, by {short(change.value)} "
                f"nats per token ({signed(low)} to {signed(high)})."
            )
        elif verdict.state in SETTLED:
            settled.append(f"{verdict.branch} {SETTLED[verdict.state]}")
        else:
            left.append(verdict.branch)
    if not away and settled:
        away = [f"None that held-out prompts show: {', '.join(settled)}."]
    if left:
        away.append(f"Not settled by held-out prompts: {', '.join(left)}.")
    return " ".join(away)


def signs_of(frame: pd.DataFrame) -> list[Sign]:
    """What a run's training says about its branches, the answer in short first. `frame` is what `read_run` returns."""
    trends = {branch: trend_of(values) for branch, values in lines_of(frame, "gap/{branch}/abs_mean").items()}
    others = [_counteraction(frame), _imbalance(frame), *(_detect(detector, frame) for detector in DETECTORS)]
    return [_answer(trends, others), _gaps(trends), *others, _cost(frame)]


def number(value: float) -> str:
    """Three digits that say something: 0.0123, 1.23, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# -------------------------------------------------------------------------------------------------------------- trends


@dataclass(frozen=True)
class Trend:
    """How a value moves: means of the first and last third of its steps, and a line fitted to the last third."""

    steps: int
    first: float
    last: float
    verdict: str  # over the last third: "rises", "falls", "is flat", "too few steps"
    start: float = math.nan  # of the fitted line
    end: float = math.nan
    higher: bool = False  # the last third is clearly above the first


def trend_of(values: pd.Series) -> Trend:
    """The trend of a value. A rise or fall is one of more than three standard errors and of more than 2 % of the level;
    of fewer than 13 steps none is told from noise."""
    third = math.ceil(len(values) / 3)
    first, last = values.iloc[:third].mean(), values.iloc[-third:].mean()
    if len(values) < FEWEST_FOR_TREND:
        return Trend(len(values), first, last, "too few steps")
    x = values.index[-third:].to_numpy(float)
    length = x[-1] - x[0]
    (slope, start), covariance = np.polyfit(x - x[0], values.iloc[-third:].to_numpy(), 1, cov=True)
    change, error = slope * length, math.sqrt(covariance[0, 0]) * length
    clear = abs(change) > max(CLEAR * error, SMALL * abs(last))
    noise = (values.diff() ** 2).mean() / 2  # variance from neighbours, which a trend does not raise
    return Trend(
        steps=len(values),
        first=first,
        last=last,
        verdict=("rises" if change > 0 else "falls") if clear else "is flat",
        start=start,
        end=start + change,
        higher=last - first > max(CLEAR * math.sqrt(2 * noise / third), SMALL * abs(first)),
    )


def _answer(trends: Mapping[str, Trend], others: Sequence[Sign]) -> Sign:
    parts, drifted = [], []
    for branch, trend in trends.items():
        if trend.verdict == "rises":
            share = f"by {trend.end / trend.start - 1:.0%} " if trend.start > 0 else ""
            parts.append(
                f"**{branch}** gets worse: its gap rises {share}over the last third of its steps "
                f"({number(trend.start)} → {number(trend.end)} nats per token)."
            )
        elif trend.higher:
            then = "falls again" if trend.verdict == "falls" else "stays there"
            drifted.append(
                f"**{branch}** has moved away from its teacher ({number(trend.first)} → {number(trend.last)} nats per "
                f"token, first to last third of its steps), and {then} at the end."
            )
    parts += drifted
    state = "seen" if parts else "not seen"
    short = [branch for branch, trend in trends.items() if trend.verdict == "too few steps"]
    if not trends:
        parts = ["Not measured: this run has no gaps."]
    elif len(short) == len(trends):
        moves = ", ".join(
            f"{_move(branch, trend)} ({counted(trend.steps, 'step')})" for branch, trend in trends.items()
        )
        parts = [
            f"This run is too short to tell a trend, which takes {FEWEST_FOR_TREND} steps of a branch. First to last "
            f"third, in nats per token: {moves}."
        ]
    else:
        told = ", ".join(branch for branch in trends if branch not in short)
        none = f"No branch has a training gap that rises over the last third of its steps ({told})."
        parts = parts or [none]
        parts += [f"Too few steps of {branch} to tell ({trends[branch].steps})." for branch in short]
    names = [sign.name.lower() for sign in others if sign.state == "seen"]
    if names:
        parts.append(f"Signs seen: {', '.join(names)}.")
    return Sign("Answer", state, " ".join(parts))


def _gaps(trends: Mapping[str, Trend]) -> Sign:
    if not trends:
        return Sign("Gaps", "not measured", "no gap in these steps.")
    parts = []
    for branch, trend in trends.items():
        end = "" if trend.verdict == "is flat" else f", {number(trend.start)} → {number(trend.end)}"
        how = f", and {trend.verdict} over the last third{end}"
        if trend.verdict == "too few steps":
            how = f" ({counted(trend.steps, 'step')}, too few for a trend)"
        parts.append(_move(branch, trend) + how)
    verdicts = {trend.verdict for trend in trends.values()}
    state = "unclear" if verdicts == {"too few steps"} else "seen" if "rises" in verdicts else "not seen"
    return Sign("A gap that rises", state, f"mean |gap| in nats per token, first → last third: {'; '.join(parts)}.")


def _move(branch: str, trend: Trend) -> str:
    return f"**{branch}** {number(trend.first)} → {number(trend.last)}"


# --------------------------------------------------------------------------------------------------------------- signs


def _detect(detector: Detector, frame: pd.DataFrame) -> Sign:
    found = [(shown, lines_of(frame, shown.metric, detector.split)) for shown in detector.numbers]
    lines = step_kinds([frame]) if detector.split == "step" else branches_of([frame])
    if detector.of_selection:
        kept = lines_of(frame, "selection/{branch}/kept_fraction")
        lines = [branch for branch in lines if branch not in kept or kept[branch].min() < 1]
        if not lines and detector.of_selection == "compared":
            return Sign(
                detector.name, "not measured", "every sample is kept, so there is no selection to compare with chance."
            )
        if not lines:
            return Sign(detector.name, "not seen", "every sample is kept, so nothing is selected.")
    lines = [line for line in lines if any(shown.seen and line in values for shown, values in found)]
    if not lines:
        return Sign(detector.name, "not measured", detector.missing)
    texts, verdicts, judged = [], [], []
    for line in lines:
        here = [(shown, values[line]) for shown, values in found if line in values]
        judged.append(next(values for shown, values in here if shown.seen))
        verdicts += [shown.seen(values) for shown, values in here if shown.seen]
        words = []
        for shown, values in here:
            mean = values.mean()
            beside = frame[shown.beside.format(branch=line)].mean() if shown.beside else math.nan
            steps = counted(len(values), "measured step")
            words.append(shown.words.format(mean=mean, short=number(mean), beside=beside, measured=steps))
        texts.append(f"**{line}** {', '.join(words)}")
    texts[0] = detector.lead[0 if any(verdicts) else 1] + texts[0]
    return _sign(detector.name, "seen" if any(verdicts) else "not seen", texts, judged)


def _counteraction(frame: pd.DataFrame) -> Sign:
    """The paper's first failure mode: gradients of two branches that point against each other (Figure 1)."""
    found = lines_of(frame, "conflict/cosine", "stale")
    if not found:
        return Sign(
            "Counteraction", "not measured", f"`{DIAGNOSTICS}: 10` measures the cosine of the branch gradients."
        )
    against = {"stale": " against the other branch's earlier, stale gradient"}
    texts = [
        f"the cosine of the branch gradients{against.get(line, '')} is negative in {(values < 0).sum()} of {len(values)} "
        f"measured steps, mean {values.mean():+.3f}"
        for line, values in found.items()
    ]
    judged = next(iter(found.values()))  # those at the same parameters, where there are any
    negative = (judged < 0).mean()
    state = "seen" if negative >= 0.75 else "not seen" if negative <= 0.25 else "unclear"
    return _sign("Counteraction", state, texts, [judged])


def _imbalance(frame: pd.DataFrame) -> Sign:
    """Branches of unequal weight: gradient norm and trained tokens of a step, per branch."""
    branches = set(branches_of([frame]))
    norms = lines_of(frame, "grad_norm", "step")
    if not branches <= set(norms):  # every step is a mix
        norms = lines_of(frame, "conflict/{branch}_norm")
    texts, ratios, used = [], [], []
    for found, words in (
        (norms, "the gradient norm"),
        (lines_of(frame, "selection/{branch}/tokens"), "the trained completion tokens"),
    ):
        if len(branches) < 2 or not branches <= set(found):
            continue
        used += [found[branch] for branch in branches]
        of = pd.DataFrame(
            {branch: found[branch].agg(["mean", "sum", "count"]) for branch in found if branch in branches}
        )
        high, low = of.loc["mean"].idxmax(), of.loc["mean"].idxmin()
        if of[low]["mean"] > 0:
            ratios.append(of[high]["mean"] / of[low]["mean"])
            share = of[high] / of.sum(axis=1)
            texts.append(
                f"per step, {high} has {number(ratios[-1])} times {words} of {low} ({share['sum']:.0%} of the sum, with "
                f"{share['count']:.0%} of the steps)"
            )
    if not ratios:
        return Sign("Imbalance", "not measured", "no two branches with a gradient norm or kept tokens of their own.")
    return _sign("Imbalance", "seen" if max(ratios) >= 2 else "not seen", texts, used)


def _cost(frame: pd.DataFrame) -> Sign:
    means = frame.drop(columns="branch").mean().dropna()
    if "time/step" not in means:
        return Sign("Time and padding", "not measured", "no times in these steps.")
    stages = {"rollout": "time/rollout", "scoring": "time/score", "training": "time/train"}
    shares = [f"{words} {means[name] / means['time/step']:.0%}" for words, name in stages.items() if name in means]
    text = f"a step takes {number(means['time/step'])} s: {', '.join(shares)}"
    waits = [
        f"{number(seconds['waited for'])} s for that of {branch}"
        for branch in branches_of([frame])
        if (seconds := teacher_seconds(frame, branch))
    ]
    if waits:
        text += f"; waiting for teachers: {', '.join(waits)}, where it is asked"
    if "train/padding" in means:
        text += f"; padding {means['train/padding']:.0%} of what goes through forward and backward"
    return Sign("Time and padding", "", f"{text}.")


def _sign(name: str, state: str, texts: Sequence[str], used: Iterable[pd.Series]) -> Sign:
    """A sign in this state, unless a branch has too few measured steps to say so."""
    if min(map(len, used)) < FEWEST:
        state, texts = "unclear", [*texts, f"fewer than {FEWEST} measured steps of a branch say little"]
    return Sign(name, state, f"{'; '.join(texts)}.")
