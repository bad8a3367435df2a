"""What a token rule must give, and the table of them. Their formulas are in files of their own."""

import math

import pytest
import torch

from camopd import CaMOPDConfig
from camopd.errors import CaMOPDError
from camopd.samples import Sample
from camopd.teachers.base import TokenScores
from camopd.token_rules import TOKEN_RULES, TokenRule, rule_of, weigh


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


@pytest.mark.parametrize(
    ("ids", "logps", "said"),
    [
        ([4, 5], [-0.1, 1.5], r"probabilities that add up to 5\.387"),
        ([4, 5], [-0.2, -0.2], r"probabilities that add up to 1\.637"),
        ([4, 5], [-0.5, math.nan], "a log-prob that is not finite"),
        ([4, 4], [-1.0, -1.0], "the same token twice"),
        ([4, -1], [-1.0, -1.0], "a token below 0"),
    ],
)
def test_likeliest_tokens_that_no_distribution_has_are_refused(ids, logps, said, make_config):
    """Of the second of three tokens; as they should be, they pass, rounded to bfloat16 as well."""
    rule = rule_of(make_config(divergence="top_k", divergence_top_k=2))
    sample = Sample("general", 7, [4] * 5, 2, torch.ones(3, dtype=torch.bool), 3, False)
    sure = torch.tensor([[0.999, 0.001]]).log().to(torch.bfloat16).float()
    right = TokenScores(torch.zeros(3), torch.tensor([[4, 5]] * 3), sure.repeat(3, 1))
    rule.read_teacher(sample, right, "mine")
    assert torch.equal(sample.seen["teacher_top_logps"], right.top_logps)
    rule.read_teacher(
        sample, TokenScores(torch.zeros(0), right.top_ids[:0], right.top_logps[:0]), "mine"
    )  # an empty answer
    right.top_ids[1], right.top_logps[1] = torch.tensor(ids), torch.tensor(logps)
    with pytest.raises(CaMOPDError, match=rf"'mine' gave {said} among its 2 .* at token 1 .* of sample 7\."):
        rule.read_teacher(sample, right, "mine")


class Advantage(TokenRule):
    def advantages(self, gaps, mask):
        return gaps + 1


@pytest.mark.parametrize(
    ("rule", "settings", "match"),
    [
        (TokenRule, {"divergence": "top_k"}, "token_rule='mine' would not be used: divergence='top_k'"),
        (Advantage, {"divergence": "full"}, "token_rule='mine' is about the sampled gap"),
        (Advantage, {"baseline": "kl"}, "token_rule='mine' is about the sampled gap"),
    ],
)
def test_own_rule_that_would_not_be_used_is_refused(rule, settings, match, monkeypatch, make_config):
    monkeypatch.setitem(TOKEN_RULES, "mine", rule)
    with pytest.raises(ValueError, match=match):
        make_config(token_rule="mine", **settings)
    monkeypatch.setitem(TOKEN_RULES, "mine", type("Weights", (TokenRule,), {}))
    make_config(token_rule="mine", divergence="full")


@pytest.mark.parametrize("needs", [True, False])
def test_own_rule_that_needs_the_entropy_gives_its_guard_an_effect(needs, monkeypatch, make_config, caplog):
    monkeypatch.setitem(TOKEN_RULES, "mine", type("Mine", (TokenRule,), {"needs_entropy": needs}))
    make_config(token_rule="mine", student_logps="engine", guards={"entropy": 0.01})
    assert ("guards['entropy']" in caplog.text) != needs


def test_own_rule_is_taken_by_its_name_in_the_table(monkeypatch, tmp_path):
    monkeypatch.setitem(TOKEN_RULES, "mine", TokenRule)
    assert CaMOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, token_rule="mine").token_rule == "mine"
