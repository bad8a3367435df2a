"""Rows without padding: the numbers of rows with it, and only of models that keep them apart."""

import math

import pytest
import torch
from conftest import make_forward, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
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
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from camopd.balance import LONGEST_PACKED, MASKED_ATTENTION, attention_cost, packing_is_less_work, square_cost
from camopd.logprobs import completion_logps, rounding_of
from camopd.memory import Shape
from camopd.packing import packing_fault, settle_packing, supports_packing, wants_packing


def make_sliding():
    """A window of 4 tokens, shorter than most rows."""
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))


@pytest.mark.parametrize(
    ("make", "implementation"),
    [
        (lambda: make_model(0), "sdpa"),
        (lambda: make_model(0), "eager"),
        (make_sliding, "sdpa"),
        (make_sliding, "eager"),
        (make_gemma2, "eager"),  # it has no sdpa
        (make_phi, "sdpa"),
    ],
    ids=["llama-sdpa", "llama-eager", "sliding-sdpa", "sliding-eager", "gemma2-eager", "phi-sdpa"],
)
def test_padding_free_rows_equal_rows_on_their_own(make, implementation):
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation(implementation)
    token_ids, prompt_lens = make_rows()
    logps, entropy = completion_logps(
        model, token_ids, prompt_lens, pad_token_id=0, with_entropy=True, padding_free=True
    )
    expected = reference(model, token_ids, prompt_lens)
    assert_rows_match(logps, gather(expected, targets(token_ids, prompt_lens)))
    assert_rows_match(entropy, [-(row.exp() * row).sum(dim=-1).detach() for row in expected])
    plain = pad(gather(expected, targets(token_ids, prompt_lens)))
    assert_same_gradients(gradients(model, weighted_sum(logps)), gradients(model, weighted_sum(plain)))


@pytest.mark.slow  # torch compiles its kernel
def test_padding_free_flex_attention_equals_rows_on_their_own():
    model = make_model(0)
    model.set_attn_implementation("flex_attention")
    token_ids, prompt_lens = make_rows()
    with torch.no_grad():  # on a CPU it has no backward
        logps, _ = completion_logps(model, token_ids, prompt_lens, pad_token_id=0, padding_free=True)
        model.set_attn_implementation("eager")
        assert_rows_match(logps, gather(reference(model, token_ids, prompt_lens), targets(token_ids, prompt_lens)))


def test_padding_free_forwards_as_many_tokens_as_there_are(monkeypatch):
    model = make_model(0)
    shapes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    token_ids, prompt_lens = make_rows()
    completion_logps(model, token_ids, prompt_lens, pad_token_id=0, padding_free=True)
    completion_logps(model, token_ids, prompt_lens, pad_token_id=0)
    assert shapes == [(1, sum(map(len, token_ids))), (len(token_ids), max(map(len, token_ids)))]


def test_padding_free_is_the_default_where_attention_gains_from_it(monkeypatch):
    model = make_model(0)
    for implementation, gains in (("sdpa", None), ("eager", False), ("flex_attention", True)):  # None: by the batch
        model.set_attn_implementation(implementation)
        with monkeypatch.context() as patch:
            patch.setattr("torch.accelerator.is_available", lambda: False)
            assert wants_packing(model, None) is gains
            patch.setattr("torch.accelerator.is_available", lambda: True)  # where it has not been measured
            assert wants_packing(model, None) is bool(gains)
        assert wants_packing(model, True) is True
        assert wants_packing(model, False) is False
    model.config._attn_implementation = "flash_attention_2"  # whose kernels are not on this machine
    assert wants_packing(model, None) is True
    assert wants_packing(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), None) is True


def make_windows():
    """Layers that say that they have a window."""
    return Qwen3ForCausalLM(
        Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention"] * 2)
    )


@pytest.mark.parametrize("make", [lambda: make_model(0), make_windows], ids=["full", "sliding"])
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=6))
def test_less_work_is_fewer_operations_by_torchs_own_count(make, lengths):
    from torch.utils.flop_counter import FlopCounterMode

    model = make()
    model.set_attn_implementation("eager")
    rows = [[1] * length for length in lengths]

    def operations(packed):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            completion_logps(model, rows, [len(row) - 1 for row in rows], 0, padding_free=packed)
        attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
        return counter.get_total_flops() - attention + MASKED_ATTENTION / 2 * attention

    without, padded = operations(True), operations(False)
    # A weight of the embeddings counts as work of every token, as one of them is of none: a tenth of all in these models.
    if not 0.87 < without / padded < 1.15:
        assert packing_is_less_work(lengths, square_cost(model)) is (without < padded)


def test_square_is_no_larger_than_it_has_been_measured():
    half = LONGEST_PACKED // 2
    assert packing_is_less_work([half, *[1] * half], 1e-9)
    assert not packing_is_less_work([half + 1, *[1] * half], 1e-9)


@given(st.integers(1, 1000), st.integers(1, 50), st.floats(1e-6, 1e-1))
def test_rows_of_one_length_keep_their_form(length, rows, cost):
    """A masked square of them can only be more work."""
    assert not packing_is_less_work([length] * rows, cost)


def test_rows_that_see_each_other_without_padding_are_found_out(caplog):
    def forward(model):
        return lambda ids, lens, packed: completion_logps(model, ids, lens, pad_token_id=0, padding_free=packed)[0]

    assert packing_fault(forward(make_model(0))) == packing_fault(forward(make_sliding().eval())) == ""
    torch.manual_seed(0)
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    )
    assert supports_packing(opt)  # and yet
    fault = packing_fault(forward(opt.eval()), rounding=1.0)
    with pytest.raises(
        ValueError, match="padding_free=True, but in the student rows of one long sequence see each other"
    ):
        settle_packing(True, fault, True, "the student")
    assert settle_packing(None, fault, None, "the student") is False
    assert not caplog.text  # it would have been by the batch: nothing to warn of
    assert settle_packing(True, fault, None, "the student") is False
    assert "the student is forwarded with padding" in caplog.text
    assert settle_packing(True, "", None, "the student") is True
    assert settle_packing(None, "", None, "the student") is None


def test_rounding_of_unlikely_tokens_in_bfloat16_is_no_fault_of_packing():
    """As of the special tokens that the two rows are of in many models: at log-probs of -20 two kernels of 30 layers are
    apart by half a nat."""
    rows = torch.full((2, 8), -20.0)

    def apart(with_padding, behind):
        """Rows that are so far apart, with padding from those without, and in the second place from the first."""
        return lambda ids, lens, packed: rows + (torch.tensor([[0.0], [behind]]) if packed else -with_padding)

    for with_padding, behind, rounding, fault in (
        (0.5, 0.0, 0.0, "with padding, where 0.05"), (0.5, 0.0, 0.166, ""), (3.2, 0.0, 0.166, ""),
        (5.0, 0.0, 0.166, "with padding, where 4.2"), (0.0, 0.015, 0.0, ""), (0.0, 0.03, 0.0, "another one, where 0.02"),
        (0.5, 0.3, 0.166, ""), (0.0, 0.4, 0.166, "behind another one, where 0.33"), (math.nan, 0.0, 1.0, "with padding"),
    ):  # fmt: skip
        found = packing_fault(apart(with_padding, behind), rounding)
        assert (fault in found) if fault else not found, (with_padding, behind, rounding, found)
    model = make_model(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    assert rounding_of(model) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        found = packing_fault(
            lambda ids, lens, packed: completion_logps(model, ids, lens, pad_token_id=0, padding_free=packed)[0],
            rounding_of(model),
        )
    assert not found


def test_sizes_that_are_not_known_cost_nothing_and_keep_the_padding(monkeypatch):
    """Mamba has no attention; of sizes that differ by layer transformers raises `RuntimeError`."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4))
    assert attention_cost(mamba) == 0 and square_cost(mamba) is None

    class ByLayer(type(make_model(0).config)):
        @property
        def head_dim(self):
            raise RuntimeError("head_dim is another one in each layer")

        @head_dim.setter
        def head_dim(self, value):
            pass

    model = make_model(0)
    model.config.__class__ = ByLayer
    assert attention_cost(model) == 0 and square_cost(model) is None
    assert make_forward(model).packed is False
    with pytest.raises(ValueError, match="ByLayer does not have the sizes of a decoder"):
        Shape.of(model.config)


def test_padding_free_is_refused_where_a_state_runs_through_the_rows():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4))
    hybrid = Lfm2ForCausalLM(
        Lfm2Config(**{**SIZES, "num_hidden_layers": 2}, layer_types=["conv", "full_attention"], block_ff_dim=32)
    )
    for model in (mamba, hybrid):
        assert wants_packing(model, None) is False
        with pytest.raises(
            ValueError, match=rf"padding_free=True, but {type(model).__name__} has layers in which rows"
        ):
            wants_packing(model, True)
