"""Forwards without gradient: every row once, in its place, and equal weights give equal numbers."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import LOGP, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_logits import gather, make_rows, reference, targets
from trainers import lines, make_trainer
from transformers import MixtralConfig, MixtralForCausalLM

from camopd.balance import score_batches
from camopd.forward import FORWARD_COST, disable_functional_dropout, in_length_sorted_batches
from camopd.logprobs import completion_logps


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_batches_run_longest_first_without_gradient_and_rows_come_back_in_order(batch_size):
    model = make_model(0)
    token_ids, prompt_lens = make_rows()
    calls = []

    def forward(batch_ids, batch_lens):
        assert not torch.is_grad_enabled()
        calls.append([len(ids) for ids in batch_ids])
        return completion_logps(model, batch_ids, batch_lens, pad_token_id=0, with_entropy=True)

    rows = in_length_sorted_batches(forward, token_ids, prompt_lens, batch_size)
    assert [length for call in calls for length in call] == sorted(map(len, token_ids), reverse=True)
    assert calls == [
        [len(token_ids[row]) for row in batch]
        for batch in score_batches([len(ids) for ids in token_ids], batch_size, False, FORWARD_COST)
    ]

    full = reference(model, token_ids, prompt_lens)
    expected = gather(full, targets(token_ids, prompt_lens))
    assert len(rows) == 5
    for (logps, entropy), row, distribution in zip(rows, expected, full, strict=True):
        assert not logps.requires_grad
        torch.testing.assert_close(logps, row.detach(), rtol=0, atol=LOGP)
        exact = -(distribution.exp() * distribution).sum(dim=-1).detach()
        torch.testing.assert_close(entropy, exact, rtol=0, atol=LOGP)


def test_batches_pass_on_outputs_that_are_missing_or_have_more_axes():
    token_ids, prompt_lens = [[1, 2], [3, 4, 5, 6]], [1, 1]

    def forward(batch_ids, batch_lens):
        width = max(len(ids) - start for ids, start in zip(batch_ids, batch_lens, strict=True))
        return None, torch.tensor([ids[0] for ids in batch_ids])[:, None, None].expand(-1, width, 2)

    rows = in_length_sorted_batches(forward, token_ids, prompt_lens, batch_size=2)
    assert [row[0] for row in rows] == [None, None]
    assert [row[1].tolist() for row in rows] == [[[1, 1]], [[3, 3]] * 3]


def test_batches_of_no_rows_are_none():
    assert in_length_sorted_batches(lambda ids, lens: (), [], [], batch_size=2) == []


@pytest.mark.parametrize("seed", range(3))
def test_models_with_equal_weights_score_bitwise_equal(seed):
    student = make_model(seed)
    teacher = copy.deepcopy(student)
    token_ids, prompt_lens = make_rows(seed=seed)

    def scores(model, with_entropy):
        def forward(ids, lens):
            return completion_logps(model, ids, lens, pad_token_id=0, with_entropy=with_entropy)

        return [row[0] for row in in_length_sorted_batches(forward, token_ids, prompt_lens, batch_size=2)]

    for ours, theirs in zip(scores(student, True), scores(teacher, False), strict=True):
        assert torch.equal(ours, theirs)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=40), st.integers(1, 50), st.booleans())
def test_rows_come_back_once_in_their_places_and_cut_to_their_lengths(rows, batch_size, padding_free):
    token_ids = [list(range(100 * row, 100 * row + sum(lengths))) for row, lengths in enumerate(rows)]
    seen = []

    def forward(ids, prompt_lens):
        seen.extend(row[0] for row in ids)
        width = max(map(len, ids))
        padded = [
            [*row[start:], *[-1] * (width - len(row) + start)] for row, start in zip(ids, prompt_lens, strict=True)
        ]
        return torch.tensor(padded), None

    found = in_length_sorted_batches(
        forward, token_ids, [prompt_len for prompt_len, _ in rows], batch_size, padding_free
    )
    assert sorted(seen) == [ids[0] for ids in token_ids]
    assert [values.tolist() for values, _ in found] == [
        ids[start:] for ids, (start, _) in zip(token_ids, rows, strict=True)
    ]


def test_micro_batches_go_without_padding_where_that_is_less_work(tmp_path, tokenizer, monkeypatch):
    """And the metrics count the tokens that the model has seen."""
    monkeypatch.setattr("camopd.balance.MASKED_ATTENTION", 0.4)  # a model this small is mostly attention
    trainer = make_trainer(tmp_path, tokenizer, max_steps=6, prompts_per_step=8, max_completion_length=24)
    seen = []

    def count(module, args, kwargs):
        if torch.is_grad_enabled():
            seen.append((kwargs["input_ids"].numel(), kwargs["attention_mask"] is None))

    trainer.model.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    steps = lines(tmp_path)
    total = sum(line["train/tokens"] / (1 - line["train/padding"]) for line in steps)
    assert sum(tokens for tokens, _ in seen) == pytest.approx(total)
    assert {packed for _, packed in seen} == {True, False}
    assert any(line["train/padding"] > 0 for line in steps) and len(seen) == sum(
        line["train/micro_batches"] for line in steps
    )


def test_rows_that_see_each_other_are_padded_from_the_first_step(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("camopd.forward.packing_fault", lambda forward, rounding: "rows see each other")
    with pytest.raises(ValueError, match=r"padding_free=True, but in the student rows see each other\. Leave"):
        make_trainer(tmp_path, tokenizer, padding_free=True, max_steps=1).train()


def test_noise_of_routers_is_off_with_dropout(tmp_path):
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_functional_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits) and config.router_jitter_noise == 0.3


def test_model_that_draws_its_experts_in_training_is_refused():
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(model_type="phimoe")
    with pytest.raises(ValueError, match=r"draws its experts at random in training.*disable_dropout=False"):
        disable_functional_dropout(model)
