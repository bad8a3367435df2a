"""The teacher's likeliest tokens for `divergence: top_k`; what becomes of them is in test_divergence.py."""

from types import SimpleNamespace

import pytest
import torch

from camopd import TokenScores
from camopd.errors import CaMOPDError
from camopd.samples import Sample
from camopd.token_rules.top_k import TopK


def test_likeliest_tokens_are_kept_or_the_teacher_is_named():
    rule = TopK(SimpleNamespace(divergence_top_k=2))
    sample = Sample("general", 0, [4] * 5, 2, torch.ones(3, dtype=torch.bool), 3, False)
    ids, logps = torch.arange(6).view(3, 2), torch.full((3, 2), -1.0)
    rule.read_teacher(sample, TokenScores(torch.zeros(3), ids, logps), "mine")
    assert torch.equal(sample.seen["teacher_top_ids"], ids) and torch.equal(sample.seen["teacher_top_logps"], logps)
    for wrong in (TokenScores(torch.zeros(3)), TokenScores(torch.zeros(3), ids, logps[:, :1])):
        with pytest.raises(CaMOPDError, match=r"teacher 'mine' gave top_\w+ of shape .* needs \(3, 2\)"):
            rule.read_teacher(sample, wrong, "mine")
