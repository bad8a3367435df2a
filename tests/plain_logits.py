"""Log-probs by plain logits, row by row, and how two ways to compute them are compared."""

import torch
from conftest import LOGP, rounding
from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM


# (prompt, completion) lengths: a one-token prompt, an empty completion, a one-token completion, the longest row twice
LENGTHS = [(1, 6), (5, 0), (3, 1), (7, 4), (2, 9)]


def make_rows(vocab_size=40, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    token_ids = [torch.randint(vocab_size, (sum(row),), generator=generator).tolist() for row in lengths]
    return token_ids, [prompt for prompt, _ in lengths]


def reference(model, token_ids, prompt_lens):
    """log_softmax of the logits that predict each row's completion, row by row and without padding: [(T_i, V)]."""
    full = []
    for ids, start in zip(token_ids, prompt_lens, strict=True):
        logits = model(torch.tensor([ids])).logits[0]
        full.append(logits[start - 1 : len(ids) - 1].float().log_softmax(dim=-1))
    return full


def targets(token_ids, prompt_lens):
    return [torch.tensor(ids[start:], dtype=torch.long) for ids, start in zip(token_ids, prompt_lens, strict=True)]


def gather(full, completions):
    return [logps.gather(1, ids[:, None])[:, 0] for logps, ids in zip(full, completions, strict=True)]


def assert_rows_match(padded, rows, tolerance=LOGP):
    assert padded.shape[:2] == (len(rows), max(1, *(len(row) for row in rows)))
    for row, expected in zip(padded, rows, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=tolerance)
        assert (row[len(expected) :] == 0).all()


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=0, atol=rounding(largest), msg=lambda text, n=name: n + text
        )


def weighted_sum(padded):
    """A loss that gives every token another gradient."""
    weights = torch.linspace(-1, 1, padded.numel(), device=padded.device).view(padded.shape)
    return (weights * padded).sum()


def pad(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make_gemma2():
    """Soft cap of 2, far inside the range of these logits."""
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0))


def make_phi():
    """A head with a bias."""
    model = PhiForCausalLM(PhiConfig(**SIZES))
    torch.nn.init.normal_(model.lm_head.bias)
    return model
