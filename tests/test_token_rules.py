"""The baselines' formulas against numbers worked by hand and the golden vectors of the design."""

import math

import pytest
import torch

from camopd import CaMOPDConfig
from camopd.errors import CaMOPDError
from camopd.samples import Sample
from camopd.token_rules import TOKEN_RULES, TokenRule, weigh
from camopd.token_rules.relaxed_opd import above_floor, entropy_threshold, relaxed_rewards, reward_floor
from camopd.token_rules.selectkd import acceptance_weights, accepted, proposals
from camopd.token_rules.sigma import sigma_weights


# log(0.3 / 0.7), computed with another library in float64, and gaps around it
FLOOR = -0.8472978603872036
GAPS = torch.tensor([[-3.0, -1.0, FLOOR, -0.5, 0.0, 0.7]], dtype=torch.float64)
EVERYWHERE = torch.ones_like(GAPS, dtype=torch.bool)


# --- Relaxed OPD -------------------------------------------------------------------------------------------------


def test_the_floor_is_that_of_the_mixture():
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


def test_the_first_phase_takes_the_tokens_that_are_not_cut():
    assert above_floor(GAPS, 0.3).tolist() == [[False, False, True, True, True, True]]
    at_the_floor = torch.tensor([reward_floor(0.3)])  # float32, as gaps are
    assert above_floor(at_the_floor, 0.3).tolist() == [True]


def test_the_floor_is_the_mixture_reward_with_a_maximum_in_place_of_logaddexp():
    exact = torch.logaddexp(torch.tensor(math.log(0.3)), math.log(0.7) + GAPS)
    hard = math.log(0.7) + relaxed_rewards(GAPS, EVERYWHERE, 0.3)
    assert ((exact - hard) >= 0).all() and ((exact - hard) <= math.log(2) + 1e-12).all()


@pytest.mark.parametrize(
    ("share", "threshold", "above"),
    [(0.2, 9.0, 2), (0.5, 6.0, 5), (1.0, 1.0, 10), (0.05, 10.0, 1), (0.25, 8.0, 3)],
)
def test_the_entropy_threshold_leaves_its_share_of_ten_tokens(share, threshold, above):
    entropy = torch.tensor([3.0, 1, 2, 10, 9, 8, 7, 4, 5, 6])
    assert entropy_threshold(entropy, share) == threshold
    assert int((entropy >= threshold).sum()) == above


@pytest.mark.parametrize("count", [1, 2, 7, 11, 100, 999])
@pytest.mark.parametrize("share", [0.2, 0.3, 0.5])
def test_the_entropy_mask_is_that_of_the_interpolated_quantile(count, share):
    entropy = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    wanted = entropy >= torch.quantile(entropy, 1 - share) - 1e-12
    assert ((entropy >= entropy_threshold(entropy, share)) == wanted).all()


def test_tokens_of_equal_entropy_are_taken_together():
    assert entropy_threshold(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), 0.2) == 1.0


def test_a_step_without_tokens_has_no_threshold():
    assert entropy_threshold(torch.zeros(0), 0.2) == math.inf


# --- SelecTKD ----------------------------------------------------------------------------------------------------


def test_the_proposal_is_the_likeliest_token_and_of_equals_the_lowest_id():
    ids = torch.tensor([[7, 3, 1], [9, 4, 2], [8, 6, 5]])
    logps = torch.tensor([[-0.5, -1.0, -2.0], [-1.0, -1.0, -3.0], [-1.0, -1.0, -1.0]])
    assert proposals(ids, logps).tolist() == [7, 4, 5]


def test_a_proposal_is_accepted_where_it_is_among_the_teachers():
    teacher = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    found = accepted(torch.tensor([5, 6, 6]), teacher)
    assert found.tolist() == [True, False, True]
    torch.testing.assert_close(acceptance_weights(found, 0.01), torch.tensor([1.0, 0.01, 1.0]))
    assert acceptance_weights(found, 0.0).tolist() == [1.0, 0.0, 1.0]


def test_an_empty_completion_has_empty_weights():
    nothing = torch.zeros(0, 5, dtype=torch.long)
    assert acceptance_weights(accepted(proposals(nothing, torch.zeros(0, 5)), nothing), 0.01).shape == (0,)


# --- DN-MOPD -----------------------------------------------------------------------------------------------------


def sums(*values: float) -> tuple[int, float, float]:
    return len(values), sum(values), sum(value**2 for value in values)


def test_sigma_weights_bring_branches_to_the_spread_of_all_tokens():
    # a: spread 1 around 0; b: spread 3 around 0; together sqrt((2 * 1 + 2 * 9) / 4) = sqrt(5)
    weights = sigma_weights({"a": sums(-1, 1), "b": sums(-3, 3)})
    assert weights == pytest.approx({"a": math.sqrt(5), "b": math.sqrt(5) / 3})


def test_the_spread_of_all_tokens_holds_the_distance_of_the_branches():
    # Each branch has spread 1, around -2 and 2; together sqrt(1 + 4).
    weights = sigma_weights({"a": sums(-3, -1), "b": sums(1, 3)})
    assert weights == pytest.approx({"a": math.sqrt(5), "b": math.sqrt(5)})


def test_sigma_weights_are_clipped():
    weights = sigma_weights({"quiet": sums(*[-0.01, 0.01] * 50), "loud": sums(-100, 100)})
    assert weights == {"quiet": 4.0, "loud": 0.25}


@pytest.mark.parametrize("degenerate", [sums(), sums(0.3), sums(0.1, 0.1, 0.1)])
def test_a_branch_without_spread_keeps_its_weight(degenerate):
    weights = sigma_weights({"a": degenerate, "b": sums(-1, 1)})
    assert weights["a"] == 1.0
    assert 0.25 <= weights["b"] <= 4.0


def test_one_branch_alone_has_weight_one():
    assert sigma_weights({"a": sums(0.2, -0.7, 1.3)}) == pytest.approx({"a": 1.0})
    assert sigma_weights({}) == {}


# --- what a rule must give --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, torch.ones(1), torch.tensor([1.0, math.nan, 1.0])])
def test_weights_that_do_not_fit_their_samples_are_refused(wrong):
    class Mine(TokenRule):
        def weigh(self, samples, step, gather):
            samples[0].token_weights, samples[1].token_weights = self.given
            return {"mine": 1.0}

    samples = [Sample("general", place, [4] * 5, 2, torch.ones(3, dtype=torch.bool), 3, False) for place in range(2)]
    rule = Mine(None)
    for rule.given in ((None, None), (torch.ones(3), torch.zeros(3))):
        assert weigh(rule, samples, 0, list) == {"mine": 1.0}
    rule.given = (torch.ones(3), wrong)
    with pytest.raises(CaMOPDError, match=r"Mine gave sample 1 token weights of shape .*; \(3,\) are needed"):
        weigh(rule, samples, 0, list)


def test_an_own_rule_is_taken_by_its_name_in_the_table(monkeypatch, tmp_path):
    monkeypatch.setitem(TOKEN_RULES, "mine", TokenRule)
    assert CaMOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, token_rule="mine").token_rule == "mine"
