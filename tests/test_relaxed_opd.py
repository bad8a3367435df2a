"""Relaxed OPD's formulas against numbers worked by hand and the golden vectors of the design."""

import math

import pytest
import torch

from camopd.token_rules.relaxed_opd import above_floor, entropy_threshold, relaxed_rewards, reward_floor


# log(0.3 / 0.7), computed with another library in float64, and gaps around it
FLOOR = -0.8472978603872036
GAPS = torch.tensor([[-3.0, -1.0, FLOOR, -0.5, 0.0, 0.7]], dtype=torch.float64)
EVERYWHERE = torch.ones_like(GAPS, dtype=torch.bool)


def test_floor_is_that_of_the_mixture():
    assert reward_floor(0.3) == pytest.approx(FLOOR, abs=1e-15)
    assert reward_floor(0.5) == 0
    assert reward_floor(0.9) == pytest.approx(math.log(9))  # above 0: even a token both find as likely is encouraged


def test_rewards_below_the_floor_are_raised_to_it_and_no_other_changes():
    rewards = relaxed_rewards(GAPS, EVERYWHERE, 0.3)
    torch.testing.assert_close(rewards, torch.tensor([[FLOOR] * 3 + [-0.5, 0.0, 0.7]], dtype=torch.float64))


def test_rewards_outside_the_mask_are_zero_also_where_the_floor_is_above_zero():
    mask = torch.tensor([[True, True, True, False, False, False]])
    gaps = torch.tensor([[-1.0, 0.5, 3.0, math.nan, -math.inf, 9.0]])
    log9 = math.log(9)
    torch.testing.assert_close(relaxed_rewards(gaps, mask, 0.9), torch.tensor([[log9, log9, 3.0, 0.0, 0.0, 0.0]]))


def test_first_phase_takes_the_tokens_that_are_not_cut():
    assert above_floor(GAPS, 0.3).tolist() == [[False, False, True, True, True, True]]
    at_the_floor = torch.tensor([reward_floor(0.3)])  # float32, as gaps are
    assert above_floor(at_the_floor, 0.3).tolist() == [True]


def test_floor_is_the_mixture_reward_with_a_maximum_in_place_of_logaddexp():
    exact = torch.logaddexp(torch.tensor(math.log(0.3)), math.log(0.7) + GAPS)
    hard = math.log(0.7) + relaxed_rewards(GAPS, EVERYWHERE, 0.3)
    assert ((exact - hard) >= 0).all() and ((exact - hard) <= math.log(2) + 1e-12).all()


@pytest.mark.parametrize(
    ("share", "threshold", "above"),
    [(0.2, 9.0, 2), (0.5, 6.0, 5), (1.0, 1.0, 10), (0.05, 10.0, 1), (0.25, 8.0, 3)],
)
def test_entropy_threshold_leaves_its_share_of_ten_tokens(share, threshold, above):
    entropy = torch.tensor([3.0, 1, 2, 10, 9, 8, 7, 4, 5, 6])
    assert entropy_threshold(entropy, share) == threshold
    assert int((entropy >= threshold).sum()) == above


@pytest.mark.parametrize("count", [1, 2, 7, 11, 100, 999])
@pytest.mark.parametrize("share", [0.2, 0.3, 0.5])
def test_entropy_mask_is_that_of_the_interpolated_quantile(count, share):
    entropy = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    wanted = entropy >= torch.quantile(entropy, 1 - share) - 1e-12
    assert ((entropy >= entropy_threshold(entropy, share)) == wanted).all()


def test_tokens_of_equal_entropy_are_taken_together():
    assert entropy_threshold(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), 0.2) == 1.0


def test_step_without_tokens_has_no_threshold():
    assert entropy_threshold(torch.zeros(0), 0.2) == math.inf
