"""SelecTKD's formulas against numbers worked by hand."""

import torch

from camopd.token_rules.selectkd import acceptance_weights, accepted, proposals


def test_proposal_is_the_likeliest_token_and_of_equals_the_lowest_id():
    ids = torch.tensor([[7, 3, 1], [9, 4, 2], [8, 6, 5]])
    logps = torch.tensor([[-0.5, -1.0, -2.0], [-1.0, -1.0, -3.0], [-1.0, -1.0, -1.0]])
    assert proposals(ids, logps).tolist() == [7, 4, 5]


def test_proposal_is_accepted_where_it_is_among_the_teachers():
    teacher = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    found = accepted(torch.tensor([5, 6, 6]), teacher)
    assert found.tolist() == [True, False, True]
    torch.testing.assert_close(acceptance_weights(found, 0.01), torch.tensor([1.0, 0.01, 1.0]))
    assert acceptance_weights(found, 0.0).tolist() == [1.0, 0.0, 1.0]


def test_empty_completion_has_empty_weights():
    nothing = torch.zeros(0, 5, dtype=torch.long)
    assert acceptance_weights(accepted(proposals(nothing, torch.zeros(0, 5)), nothing), 0.01).shape == (0,)
