"""Errors, intervals and tests of scores (camopd/eval/stats.py), against scipy's values and properties."""

import json
import math
import os
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camopd.eval.stats import difference, exact_mcnemar, mean_and_error, share


binary = st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=1, max_size=40)


def pairs_of(back, broke, same=5):
    return [0] * back + [1] * broke + [1] * same, [1] * back + [0] * broke + [1] * same


@pytest.mark.parametrize(
    ("back", "broke", "p"),  # scipy.stats.binomtest(min(back, broke), back + broke).pvalue, scipy 1.17.1
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (6, 0, 0.03125),
        (12, 3, 0.03515625),
        (7, 7, 1.0),
        (3, 1, 0.625),
        (60, 40, 0.05688793364),
    ],
)
def test_mcnemar_is_scipys_binomial_test(back, broke, p):
    found = exact_mcnemar(*pairs_of(back, broke))
    assert found[:2] == (back, broke)
    assert found[2] == pytest.approx(p, rel=1e-9)


@given(binary)
def test_mcnemar_counts_every_change_and_knows_no_direction(pairs):
    before, after = zip(*pairs, strict=True)
    back, broke, p = exact_mcnemar(before, after)
    assert back + broke == sum(old != new for old, new in pairs)
    assert exact_mcnemar(after, before) == (broke, back, p)
    assert 0 < p <= 1


def test_standard_error_is_over_items():
    mean, error = mean_and_error([0, 1, 1, 1])
    assert mean == 0.75 and error == pytest.approx(0.25)  # s = 1/2, n = 4
    assert math.isnan(mean_and_error([1])[1]) and math.isnan(mean_and_error([])[0])


def test_difference_has_the_width_that_the_normal_distribution_gives():
    rng = np.random.default_rng(1)
    before = rng.random(400)
    after = before + rng.normal(0.1, 0.2, 400)
    found = difference(before, after)
    half = 1.959964 * (after - before).std() / 20
    assert found.value == pytest.approx((after - before).mean())
    # 10,000 resamples place a 2.5 % quantile within 0.04 standard errors (4 sigma of sqrt(p q / n) / density).
    assert found.low == pytest.approx(found.value - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.1 * half)
    assert difference(before, after) == found


@given(binary)
@settings(max_examples=20, deadline=None)
def test_difference_lies_in_its_interval_and_turns_its_sign(pairs):
    before, after = zip(*pairs, strict=True)
    found, turned = difference(before, after), difference(after, before)
    assert -1 <= found.low <= found.value + 1e-12 and found.value - 1e-12 <= found.high <= 1
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


def test_share_is_of_the_way_between_the_two():
    start, teacher = [0] * 60 + [1] * 40, [1] * 90 + [0] * 10
    result = [1] * 30 + [0] * 30 + [1] * 40
    found = share(start, teacher, result)
    assert found.value == pytest.approx(0.6)  # from 0.4 to 0.7 of 0.9
    assert found.low < found.value < found.high
    assert share(start, teacher, start).value == 0 and share(start, teacher, teacher) == share(teacher, start, start)
    assert share(start, teacher, teacher).low == share(start, teacher, teacher).high == 1


def test_share_of_nothing_has_no_ends():
    same = [0, 1] * 20
    found = share(same, same, [1] * 40)
    assert math.isnan(found.value) and (found.low, found.high) == (-math.inf, math.inf)
    few = share([0, 1, 0, 1, 0], [1, 1, 0, 0, 1], [1, 0, 0, 0, 0])  # 0.4 and 0.6 of five items
    assert few.value == pytest.approx(-1) and few.low == -math.inf


@pytest.mark.eval
def test_stats_agree_with_scipy():
    rng = np.random.default_rng(3)
    cases = [(rng.integers(0, 2, 80).tolist(), rng.integers(0, 2, 80).tolist()) for _ in range(20)]
    code = (
        "import json, sys, numpy as np; from scipy import stats\n"
        "out = []\n"
        "for a, b in json.load(sys.stdin):\n"
        "    a, b = map(np.array, (a, b)); up, down = int((b > a).sum()), int((a > b).sum())\n"
        "    ci = stats.bootstrap((b, a), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, vectorized=True,\n"
        "                         n_resamples=20000, method='percentile', rng=0).confidence_interval\n"
        "    out.append([stats.binomtest(up, up + down).pvalue, ci.low, ci.high, stats.sem(b)])\n"
        "print(json.dumps(out))"
    )
    python = os.environ.get("CAMOPD_EVAL_PYTHON", ".venv-eval/bin/python")
    said = subprocess.run(
        [python, "-c", code], input=json.dumps(cases), capture_output=True, text=True, check=True
    ).stdout
    for (before, after), (p, low, high, error) in zip(cases, json.loads(said), strict=True):
        assert exact_mcnemar(before, after)[2] == pytest.approx(p, rel=1e-9)
        found = difference(before, after)
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.0126)  # one item of 80: means are multiples
        assert mean_and_error(after)[1] == pytest.approx(error)
