"""What a score on some items can and cannot say: standard errors, paired intervals and the exact paired test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


RESAMPLES = 10_000
LEVEL = 0.95  # of intervals


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval; an end is infinite where the resamples do not bound it."""

    value: float
    low: float
    high: float


def mean_and_error(scores: Sequence[float]) -> tuple[float, float]:
    """The mean over items and its standard error, s / sqrt(n); NaN where there are too few."""
    values = np.asarray(scores, dtype=float)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return (float(values.mean()) if len(values) else math.nan), error


def exact_mcnemar(before: Sequence[float], after: Sequence[float]) -> tuple[int, int, float]:
    """Items that came back, items that broke, and the two-sided p-value of as uneven a split of them by chance.

    Scores are 0 or 1, of the same items. Given the n items that changed, each is as likely to change either way: the number
    that came back is binomial with p = 1/2 (McNemar, 1947, in its exact form).

    >>> exact_mcnemar([1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1])
    (4, 1, 0.375)
    """
    pairs = list(zip(before, after, strict=True))
    back = sum(old < new for old, new in pairs)
    broke = sum(old > new for old, new in pairs)
    changed = back + broke
    tail = sum(math.comb(changed, count) for count in range(min(back, broke) + 1))
    return back, broke, float(min(1.0, tail / 2 ** (changed - 1))) if changed else 1.0


def resampled_means(*columns: Sequence[float], seed: int = 0) -> np.ndarray:
    """Means of each column over resampled items, (RESAMPLES, columns): the same items for all columns."""
    table = np.array(columns, dtype=float).T
    count = len(table)
    rng = np.random.default_rng(seed)
    # How often each item is drawn says as much as which are, and a product of matrices is quick.
    means = [
        rng.multinomial(count, np.full(count, 1 / count), size=1000) @ table / count for _ in range(RESAMPLES // 1000)
    ]
    return np.concatenate(means)


def difference(before: Sequence[float], after: Sequence[float]) -> Interval:
    """Mean of `after - before` over items, with its paired bootstrap interval (percentiles)."""
    changes = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    return _interval(float(changes.mean()), resampled_means(changes)[:, 0])


def share(zero: Sequence[float], one: Sequence[float], found: Sequence[float]) -> Interval:
    """How far `found` is on the way from `zero` to `one`: (found - zero) / (one - zero) of the means, paired over items.

    Recovery is `share(start, teacher, result)`, the domain kept is `share(teacher, start, result)`.

    A resample in which `zero` and `one` change places has no share. Where more than a fortieth of them do, the ends of the
    interval are infinite: the items cannot tell the two apart, and no share of nothing can be given.
    """
    means = resampled_means(zero, one, found)
    span = float(np.mean(one) - np.mean(zero))
    value = float(np.mean(found) - np.mean(zero)) / span if span else math.nan
    spans = means[:, 1] - means[:, 0]
    if not span or (spans * span <= 0).mean() > (1 - LEVEL) / 2:
        return Interval(value, -math.inf, math.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = (means[:, 2] - means[:, 0]) / spans
    return _interval(value, shares[spans * span > 0])


def _interval(value: float, resamples: np.ndarray) -> Interval:
    low, high = np.quantile(resamples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
