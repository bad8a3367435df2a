"""What the numbers that `camopd report` shows of a run have to do with how it ended, over the runs of explore.py.

Rank correlations, each within the runs of one seed, which share their models; the mean over seeds with its 95 % interval
(Student's t). Beside those over all runs are those within a method: both ranks less their means over the method's runs, so
that what is left is learning rates and chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from camopd.eval.stats import Interval
from camopd.report.read import lines_of
from camopd.report.signs import trend_of
from camopd.verdict import t_quantile


CLEAR = 0.3  # of a rank correlation, from which on a number says something; its interval must leave out 0 as well


@dataclass(frozen=True)
class Number:
    """One number of a run: the sign of the report that is about it, and how it is had from the run's metrics."""

    sign: str
    of: Callable[[pd.DataFrame], float]


def _mean(metric: str) -> Callable[[pd.DataFrame], float]:
    return lambda frame: float(frame[metric].mean()) if metric in frame else math.nan


def _last(metric: str) -> Callable[[pd.DataFrame], float]:
    return lambda frame: float(trend_of(frame[metric].dropna()).last) if metric in frame else math.nan


def _moved(metric: str) -> Callable[[pd.DataFrame], float]:
    def ratio(frame: pd.DataFrame) -> float:
        trend = trend_of(frame[metric].dropna())
        return float(trend.last / trend.first) if trend.first else math.nan

    return ratio


def _cosine(frame: pd.DataFrame) -> float:
    """Of the branches' gradients: at the same parameters where there are such, else the stale one, as the report does."""
    found = lines_of(frame, "conflict/cosine", "stale")
    return float(next(iter(found.values())).mean()) if found else math.nan


def _norms(frame: pd.DataFrame) -> float:
    """The general branch's gradient norm over the domain's."""
    found = lines_of(frame, "grad_norm", "step")
    if set(found) == {"general+domain"}:
        found = lines_of(frame, "conflict/{branch}_norm")
    return float(found["general"].mean() / found["domain"].mean()) if {"general", "domain"} <= set(found) else math.nan


def _tokens(frame: pd.DataFrame) -> float:
    """Trained tokens of a step: those of the general branch over those of the domain's."""
    found = lines_of(frame, "selection/{branch}/tokens")
    return float(found["general"].mean() / found["domain"].mean()) if {"general", "domain"} <= set(found) else math.nan


NUMBERS = {
    "general gap, last third": Number("A gap that rises", _last("gap/general/abs_mean")),
    "general gap, last over first third": Number("A gap that rises", _moved("gap/general/abs_mean")),
    "domain gap, last third": Number("A gap that rises", _last("gap/domain/abs_mean")),
    "domain gap, last over first third": Number("A gap that rises", _moved("gap/domain/abs_mean")),
    "cosine of the branch gradients": Number("Counteraction", _cosine),
    "gradient norm, general over domain": Number("Imbalance", _norms),
    "trained tokens, general over domain": Number("Imbalance", _tokens),
    "coherence beyond a random set, general": Number("Weak samples", _mean("coherence/general/gcg_excess")),
    "score and length, general": Number("Selection follows length", _mean("score/general/length_spearman")),
    "top 1 % of tokens, general": Number("Selection follows outliers", _mean("selection/general/top1_share")),
    "score and perplexity, general": Number(
        "Selection follows outliers", _mean("selection/general/score_perplexity_spearman")
    ),
    "update with its gradient": Number("Steps mostly momentum", _mean("update/cosine")),
    "share kept, general": Number("", _mean("selection/general/kept_fraction")),
    "entropy, general, last third": Number("", _last("rollout/general/entropy")),
    "entropy, domain, last third": Number("", _last("rollout/domain/entropy")),
    "teacher's perplexity, general, last third": Number("", _last("teacher/general/perplexity")),
    "answers cut, general, last third": Number("", _last("rollout/general/truncated")),
    "gradient norm": Number("", _mean("grad_norm")),
}


def numbers(frame: pd.DataFrame) -> dict[str, float | None]:
    """All of them, of a run's metrics as `read_run` gives them; `None` where a run has nothing to say."""
    found = {name: each.of(frame) for name, each in NUMBERS.items()}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


# -------------------------------------------------------------------------------------------------------- correlations


def correlation(rows: Sequence[Mapping[str, Any]], number: str, outcome: str, within: bool) -> float:
    """Spearman's, over rows with `method`, the number and the outcome; NaN where one of them does not vary.

    `within` takes the mean over its method's rows from each rank.
    """
    table = pd.DataFrame([row for row in rows if row.get(number) is not None])
    if len(table) < 3:
        return math.nan
    ranks = table[[number, outcome]].rank()
    if within:
        ranks = ranks - ranks.groupby(table["method"]).transform("mean")
    x, y = (ranks[name].to_numpy() - ranks[name].mean() for name in (number, outcome))
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 1e-9 else math.nan


def t_interval(values: Sequence[float]) -> Interval:
    """Mean with its 95 % interval by Student's t; NaN for the ends of a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def of_seeds(by_seed: Mapping[int, Sequence[Mapping[str, Any]]], number: str, outcome: str, within: bool) -> Interval:
    """The correlation, mean over seeds; seeds in which it has no value are left out."""
    found = [correlation(rows, number, outcome, within) for rows in by_seed.values()]
    found = [value for value in found if not math.isnan(value)]
    return t_interval(found) if found else Interval(math.nan, math.nan, math.nan)


def is_clear(interval: Interval) -> bool:
    """Whether a correlation says something: see `CLEAR`."""
    return abs(interval.value) >= CLEAR and interval.low * interval.high > 0


def said(interval: Interval, sign: str = "", digits: int = 3) -> str:
    """An interval with so many digits behind the point; `sign` is "+" for a difference."""
    return "{:{form}} [{:{form}}, {:{form}}]".format(
        interval.value, interval.low, interval.high, form=f"{sign}.{digits}f"
    )
