"""Log-probs of completion tokens against plain full-vocabulary logits, on small real models."""

import contextlib

import pytest
import torch
from conftest import LOGP, VOCAB, make_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from plain_logits import (
    SIZES,
    assert_rows_match,
    assert_same_gradients,
    gather,
    gradients,
    make_gemma2,
    make_phi,
    make_rows,
    pad,
    reference,
    targets,
    weighted_sum,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from camopd import logprobs
from camopd.logprobs import SampledLogps, check_logps, completion_logps, completion_top_k, logps_tolerance


@pytest.mark.parametrize("vocab_chunk", [7, 40, 32768])
def test_logps_equal_plain_log_softmax_without_padding(monkeypatch, vocab_chunk):
    monkeypatch.setattr(logprobs, "CPU_VOCAB_CHUNK", vocab_chunk)
    model = make_model(0)
    token_ids, prompt_lens = make_rows()
    logps, entropy = completion_logps(model, token_ids, prompt_lens, pad_token_id=0)
    assert entropy is None
    assert logps.dtype == torch.float32
    assert logps.requires_grad
    assert_rows_match(logps, gather(reference(model, token_ids, prompt_lens), targets(token_ids, prompt_lens)))


def test_logps_do_not_depend_on_the_pad_token_or_on_the_other_rows():
    model = make_model(0)
    token_ids, prompt_lens = make_rows()
    logps, _ = completion_logps(model, token_ids, prompt_lens, pad_token_id=0)
    other, _ = completion_logps(model, token_ids, prompt_lens, pad_token_id=17)
    assert torch.equal(logps, other)
    for row, (ids, start) in enumerate(zip(token_ids, prompt_lens, strict=True)):
        alone, _ = completion_logps(model, [ids], [start], pad_token_id=0)
        torch.testing.assert_close(alone[0, : len(ids) - start], logps[row, : len(ids) - start], rtol=0, atol=LOGP)


def test_gradient_of_all_parameters_equals_autograd_through_plain_logits():
    model = make_model(0)
    token_ids, prompt_lens = make_rows()
    logps, _ = completion_logps(model, token_ids, prompt_lens, pad_token_id=0, with_entropy=True)
    actual = gradients(model, weighted_sum(logps))
    plain = pad(gather(reference(model, token_ids, prompt_lens), targets(token_ids, prompt_lens)))
    expected = gradients(model, weighted_sum(plain))
    assert len(expected) == len(list(model.parameters()))
    assert_same_gradients(actual, expected)


def test_entropy_is_exact_and_detached():
    model = make_model(0)
    token_ids, prompt_lens = make_rows()
    logps, entropy = completion_logps(model, token_ids, prompt_lens, pad_token_id=0, with_entropy=True)
    exact = [-(row.exp() * row).sum(dim=-1) for row in reference(model, token_ids, prompt_lens)]
    assert_rows_match(entropy, [row.detach() for row in exact])
    assert logps.requires_grad
    assert not entropy.requires_grad


def test_empty_completions_alone_give_zeros_and_a_zero_gradient():
    model = make_model(0)
    logps, entropy = completion_logps(model, [[3, 4], [5]], [2, 1], pad_token_id=0, with_entropy=True)
    assert torch.equal(logps, torch.zeros(2, 1))
    assert torch.equal(entropy, torch.zeros(2, 1))
    assert all((gradient == 0).all() for gradient in gradients(model, logps.sum()).values())


def test_row_without_prompt_is_refused():
    with pytest.raises(ValueError, match=r"every row needs at least one prompt token, which predicts its first"):
        completion_logps(make_model(0), [[3, 4], [5, 6]], [1, 0], pad_token_id=0)


# --- other heads ---


def make_cohere():
    """Logits times 0.25."""
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25))


def make_granite():
    """Logits divided by 4."""
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0))


@pytest.fixture(params=[make_gemma2, make_cohere, make_granite, make_phi], ids=["gemma2", "cohere", "granite", "phi"])
def other_model(request):
    torch.manual_seed(0)
    return request.param().eval()


def test_soft_cap_scale_and_bias_of_the_logits_are_the_models_own(other_model):
    token_ids, prompt_lens = make_rows(vocab_size=64)
    logps, entropy = completion_logps(other_model, token_ids, prompt_lens, pad_token_id=0, with_entropy=True)
    full = reference(other_model, token_ids, prompt_lens)
    completions = targets(token_ids, prompt_lens)
    assert_rows_match(logps, gather(full, completions))
    assert_rows_match(entropy, [-(row.exp() * row).sum(dim=-1) for row in full])

    # Without them the numbers are others, so the comparison above sees them.
    ids, start = token_ids[0], prompt_lens[0]
    hidden = other_model.base_model(torch.tensor([ids])).last_hidden_state[0, start - 1 : -1]
    bare = (hidden @ other_model.lm_head.weight.T).log_softmax(dim=-1)
    assert (gather([bare], completions[:1])[0] - logps[0, : len(ids) - start]).abs().max() > 0.1


def test_gradient_passes_through_soft_cap_scale_and_bias(other_model):
    token_ids, prompt_lens = make_rows(vocab_size=64)
    logps, _ = completion_logps(other_model, token_ids, prompt_lens, pad_token_id=0)
    actual = gradients(other_model, weighted_sum(logps))
    plain = pad(gather(reference(other_model, token_ids, prompt_lens), targets(token_ids, prompt_lens)))
    assert_same_gradients(actual, gradients(other_model, weighted_sum(plain)))


# --- top-k ---


def check_top_k(model, vocab_size):
    token_ids, prompt_lens = make_rows(vocab_size)
    ids, logps = completion_top_k(model, token_ids, prompt_lens, pad_token_id=0, k=5)
    assert ids.dtype == torch.int64
    assert not logps.requires_grad
    top = [row.detach().topk(5, dim=-1) for row in reference(model, token_ids, prompt_lens)]
    assert_rows_match(ids, [row.indices for row in top], tolerance=0)
    assert_rows_match(logps, [row.values for row in top])


@pytest.mark.parametrize("tile", [1, 3, 512])
def test_top_k_is_that_of_the_full_log_softmax(monkeypatch, tile):
    monkeypatch.setattr(logprobs, "TOP_K_TOKENS", tile)
    check_top_k(make_model(0), vocab_size=40)


def test_top_k_applies_soft_cap_scale_and_bias(other_model):
    check_top_k(other_model, vocab_size=64)


def test_top_k_of_the_whole_vocabulary_holds_the_completion_logps():
    model = make_model(0)
    token_ids, prompt_lens = make_rows()
    ids, top_logps = completion_top_k(model, token_ids, prompt_lens, pad_token_id=0, k=model.config.vocab_size)
    logps, _ = completion_logps(model, token_ids, prompt_lens, pad_token_id=0)
    for row, completion in enumerate(targets(token_ids, prompt_lens)):
        for place, token in enumerate(completion):
            found = top_logps[row, place][ids[row, place] == token]
            torch.testing.assert_close(found, logps[row, place, None].detach(), rtol=0, atol=LOGP)


# --- equal weights ---


def test_training_forward_equals_the_forward_without_gradient_bitwise():
    model = make_model(0)
    token_ids, prompt_lens = make_rows()
    with torch.no_grad():
        before, _ = completion_logps(model.eval(), token_ids, prompt_lens, pad_token_id=0)
    during, _ = completion_logps(model.train(), token_ids, prompt_lens, pad_token_id=0, with_entropy=True)
    assert torch.equal(before, during)


# --- PEFT ---


def make_lora(**config):
    """A LoRA model whose adapter is not zero."""
    torch.manual_seed(1)
    return get_peft_model(make_model(0), LoraConfig(r=4, init_lora_weights=False, **config)).eval()


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["lora", "lora+saved-head"],
)
def test_adapter_counts_while_active_and_not_while_disabled(config):
    model = make_lora(**config)
    if "modules_to_save" in config:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    token_ids, prompt_lens = make_rows()
    completions = targets(token_ids, prompt_lens)
    seen = []
    for context in (contextlib.nullcontext, model.disable_adapter):
        with context(), torch.no_grad():
            logps, _ = completion_logps(model, token_ids, prompt_lens, pad_token_id=0)
            assert_rows_match(logps, gather(reference(model, token_ids, prompt_lens), completions))
            ids, top_logps = completion_top_k(model, token_ids, prompt_lens, pad_token_id=0, k=3)
            top = [row.topk(3, dim=-1) for row in reference(model, token_ids, prompt_lens)]
            assert_rows_match(ids, [row.indices for row in top], tolerance=0)
            assert_rows_match(top_logps, [row.values for row in top])
            seen.append(logps)
    active, disabled = seen
    base, _ = completion_logps(make_model(0), token_ids, prompt_lens, pad_token_id=0)
    assert torch.equal(disabled, base)
    assert (active - disabled).abs().max() > 0.1


def test_gradient_of_the_adapter_equals_autograd_through_plain_logits():
    model = make_lora(target_modules=["q_proj", "v_proj"])
    token_ids, prompt_lens = make_rows()
    logps, _ = completion_logps(model, token_ids, prompt_lens, pad_token_id=0)
    actual = gradients(model, weighted_sum(logps))
    plain = pad(gather(reference(model, token_ids, prompt_lens), targets(token_ids, prompt_lens)))
    expected = gradients(model, weighted_sum(plain))
    assert expected
    assert all("lora_" in name for name in expected)
    assert_same_gradients(actual, expected)


# --- memory ---


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator gave out."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return output


VOCAB_SIZE, NUM_TOKENS = 50_000, 256


@pytest.fixture(scope="module")
def wide_model():
    return make_model(0, vocab_size=VOCAB_SIZE)


def make_wide_rows():
    return make_rows(VOCAB_SIZE, [(2, NUM_TOKENS), (3, NUM_TOKENS)])


def test_memory_never_holds_a_tensor_of_all_tokens_by_the_vocabulary(wide_model):
    token_ids, prompt_lens = make_wide_rows()
    full = 2 * NUM_TOKENS * VOCAB_SIZE
    with LargestTensor() as largest:
        logps, _ = completion_logps(wide_model, token_ids, prompt_lens, pad_token_id=0, with_entropy=True)
        logps.sum().backward()
    # The largest is the (512, 4096) tile, with room for the (50000, 32) embedding and its gradient.
    assert largest.numel <= 2 * NUM_TOKENS * 4096
    assert largest.numel < full / 4

    with LargestTensor() as largest:  # the measure itself: plain logits are seen
        wide_model(torch.tensor([token_ids[0][:NUM_TOKENS]])).logits.sum().backward()
    assert largest.numel >= NUM_TOKENS * VOCAB_SIZE


def test_top_k_has_logits_of_one_tile_of_tokens_at_a_time(monkeypatch, wide_model):
    monkeypatch.setattr(logprobs, "TOP_K_TOKENS", 64)
    token_ids, prompt_lens = make_wide_rows()
    with LargestTensor() as largest:
        completion_top_k(wide_model, token_ids, prompt_lens, pad_token_id=0, k=4)
    assert largest.numel == 64 * VOCAB_SIZE


# --- as they are drawn ---


@pytest.mark.parametrize("seed", range(2))
def test_recorded_logps_are_those_of_the_tokens_that_generate_draws(seed):
    model = make_model(0)
    model.generation_config.pad_token_id = 0
    prompts = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [0, 3, 4, 5]])
    mask = (prompts != 0).long()
    recorder = SampledLogps()
    torch.manual_seed(seed)
    sequences = model.generate(
        input_ids=prompts, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=12, eos_token_id=20,
        logits_processor=[recorder],
    )  # fmt: skip
    recorder.finish(sequences)
    torch.manual_seed(seed)
    assert torch.equal(
        sequences,
        model.generate(
            input_ids=prompts, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=12, eos_token_id=20
        ),
    )
    for row, logps in enumerate(recorder.rows()):
        prompt = prompts[row][mask[row].bool()].tolist()
        completion = sequences[row, prompts.size(1) :].tolist()
        completion = completion[: completion.index(20) + 1] if 20 in completion else completion
        full = reference(model, [prompt + completion], [len(prompt)])
        (expected,) = gather(full, [torch.tensor(completion)])
        torch.testing.assert_close(torch.tensor(logps[: len(completion)]), expected.detach(), rtol=0, atol=LOGP)


# --- are they those of the model's own logits? ---

ROWS, STARTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]], [2, 1]


def check(model, forward=None):
    return check_logps("it", lambda ids, lens: completion_logps(model, ids, lens, 0)[0], forward or model, model)


@pytest.mark.parametrize(
    "bend",
    [lambda logits: 1.1 * logits, lambda logits: 3 * torch.tanh(logits / 3), lambda logits: logits.roll(1, dims=-1)],
    ids=["scaled", "capped", "shifted"],
)
def test_model_that_does_something_unknown_to_its_logits_is_refused(bend):
    model = make_model(0)

    def own(**inputs):
        output = model(**inputs)
        output.logits = bend(output.logits)
        return output

    largest = check(model)
    assert largest < 1e-5
    with pytest.raises(ValueError, match=r"of it that CaMOPD computes .* differ .* by \d.* served by vLLM"):
        check(model, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tolerance_follows_the_dtype_and_a_difference_above_it_is_refused(dtype):
    model = make_model(0).to(dtype)
    seen = []

    def own(shift):
        def forward(**inputs):
            output = model(**inputs)
            seen.append(logps_tolerance(model, output.logits[0].float(), inputs["input_ids"][0]))
            output.logits = output.logits.float() + shift * (torch.arange(output.logits.size(-1)) % 2)
            return output

        return forward

    check(model, own(0.0))
    unit = 2**-24 if dtype == torch.float32 else 2**-9 * 2  # bfloat16 keeps eight bits
    assert seen[-1] / unit < 32 * 2 * 20
    check(model, own(seen[-1] / 10))
    with pytest.raises(ValueError, match="differ"):
        check(model, own(seen[-1] * 10))


def test_config_that_asks_for_hidden_states_changes_nothing_and_one_for_tuples_is_refused():
    model = make_model(0)
    plain = completion_logps(model, ROWS, STARTS, 0)[0]
    model.config.output_hidden_states = True
    assert torch.equal(completion_logps(model, ROWS, STARTS, 0)[0], plain)
    check(model)
    model.config.return_dict = False  # transformers' own forward of Llama stops at it
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has return_dict=False.*Set return_dict to true"):
        check(model)


def test_balance_loss_of_experts_is_switched_off_and_that_is_said(caplog):
    """It comes behind the head, where the forward has ended, and `generate` fails with it."""
    config = Qwen3MoeConfig(
        vocab_size=len(VOCAB), hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        output_router_logits=True,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    for _ in range(2):
        completion_logps(model, [[5, 6, 7]], [1], 0)
    assert [record.getMessage()[:50] for record in caplog.records] == [
        "Qwen3MoeForCausalLM has output_router_logits=True,"
    ]
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=True)


def test_head_of_the_adapters_own_is_that_of_the_adapter_or_of_the_base():
    model = get_peft_model(make_model(0), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape)
    check(model)
    with model.disable_adapter():
        check(model)
        off = completion_logps(model, ROWS, STARTS, 0)[0]
    torch.testing.assert_close(off, completion_logps(make_model(0), ROWS, STARTS, 0)[0], rtol=0, atol=1e-5)


def test_lora_on_the_head_and_prompt_tuning_are_refused():
    """The student's are refused by TRL; a teacher may come with them."""
    model = get_peft_model(make_model(0), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    with pytest.raises(ValueError, match="differ from those of its own logits by"):
        check(model)
    model = get_peft_model(make_model(0), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="tokens of its own before them"):
        check(model)


def test_forward_ends_where_the_head_begins():
    model, (ids, start) = make_model(0), (ROWS[0], STARTS[0])
    logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
    model.lm_head.forward = None  # would be called
    found, _ = completion_logps(model, [ids], [start], 0)
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
    torch.testing.assert_close(found[0], expected, rtol=0, atol=LOGP)
    assert not model.lm_head._forward_pre_hooks


def test_head_that_is_not_called_is_said():
    model = make_model(0)
    model.forward = lambda **inputs: model.model(inputs["input_ids"])
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be computed: its forward does not hand"):
        completion_logps(model, ROWS, STARTS, 0)
