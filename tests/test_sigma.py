"""The weights of branches by DN-MOPD, against numbers worked by hand."""

import math

import pytest

from camopd.token_rules.sigma import sigma_weights


def sums(*values: float) -> tuple[int, float, float]:
    return len(values), sum(values), sum(value**2 for value in values)


def test_sigma_weights_bring_branches_to_the_spread_of_all_tokens():
    # a: spread 1 around 0; b: spread 3 around 0; together sqrt((2 * 1 + 2 * 9) / 4) = sqrt(5)
    weights = sigma_weights({"a": sums(-1, 1), "b": sums(-3, 3)})
    assert weights == pytest.approx({"a": math.sqrt(5), "b": math.sqrt(5) / 3})


def test_spread_of_all_tokens_holds_the_distance_of_the_branches():
    # Each branch has spread 1, around -2 and 2; together sqrt(1 + 4).
    weights = sigma_weights({"a": sums(-3, -1), "b": sums(1, 3)})
    assert weights == pytest.approx({"a": math.sqrt(5), "b": math.sqrt(5)})


def test_sigma_weights_are_clipped():
    weights = sigma_weights({"quiet": sums(*[-0.01, 0.01] * 50), "loud": sums(-100, 100)})
    assert weights == {"quiet": 4.0, "loud": 0.25}


@pytest.mark.parametrize("degenerate", [sums(), sums(0.3), sums(0.1, 0.1, 0.1)])
def test_branch_without_spread_keeps_its_weight(degenerate):
    weights = sigma_weights({"a": degenerate, "b": sums(-1, 1)})
    assert weights["a"] == 1.0
    assert 0.25 <= weights["b"] <= 4.0


def test_sigma_weight_of_one_branch_alone_is_one():
    assert sigma_weights({"a": sums(0.2, -0.7, 1.3)}) == pytest.approx({"a": 1.0})
    assert sigma_weights({}) == {}
