"""The sizes of models, against models that are made of them. The formula is held to measured peaks by its benchmark."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from camopd.memory import Shape, activations


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([16, 32]), st.integers(8, 40), st.sampled_from([2, 4]), st.sampled_from([1, 2]),
    st.integers(20, 50), st.booleans(), st.sampled_from([LlamaConfig, Qwen3Config]),
)  # fmt: skip
def test_weights_are_those_of_a_model_with_that_config(layers, hidden, mlp, heads, kv_heads, vocabulary, tied, kind):
    config = kind(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # The last norm, and those of queries and keys
    norms = hidden + (2 * layers * (hidden // heads) if kind is Qwen3Config else 0)
    assert Shape.of(config).weights + norms == sum(weight.numel() for weight in model.parameters())


def test_sizes_under_other_names_are_found_and_none_is_an_error():
    assert Shape.of(GPT2Config(n_layer=3, n_embd=48, n_head=4)) == Shape(3, 48, 192, 4, 4, 12, 50257, True)
    with pytest.raises(ValueError, match="Config does not have the sizes of a decoder"):
        Shape.of(PretrainedConfig())


def test_activations_grow_with_tokens_and_numbers():
    shape = Shape(2, 64, 128, 4, 2, 16, 1000, True)
    found = [activations(shape, tokens, tokens // 2, 4, "cpu") for tokens in (64, 128, 256)]
    assert found[0] < found[1] < found[2]
    assert found[2] > activations(shape, 256, 128, 2, "cpu")


def test_tiles_of_each_gradient_are_those_that_are_computed():
    """Of a head so large that all else is small: its weights' gradient twice, and the copies of a tile that
    test_divergence.py counts."""
    shape = Shape(1, 16, 16, 1, 1, 16, 100_000, True)
    found = {kind: activations(shape, 4096, 4096, 4, "cpu", kind) for kind in ("sampled", "whole", "top_k")}
    gradient, small = 8 * 100_000 * 16, 5e6
    for kind, tiles in (("sampled", 12 * 4096 * 4096), ("whole", 10 * 4096 * 32768), ("top_k", 3 * 512 * 100_000)):
        expected = gradient + 4 * max(tiles, 12 * 4096 * 4096)
        assert expected < found[kind] < expected + small, kind
    on_gpu = [activations(shape, 8192, 8192, 2, "cuda", kind) for kind in ("sampled", "top_k", "whole")]
    assert on_gpu[0] == on_gpu[1] < on_gpu[2]
