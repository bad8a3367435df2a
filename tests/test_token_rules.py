"""What a token rule must give, and the table of them. Their formulas are in files of their own."""

import math

import pytest
import torch

from camopd import CaMOPDConfig
from camopd.errors import CaMOPDError
from camopd.samples import Sample
from camopd.token_rules import TOKEN_RULES, TokenRule, weigh


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
