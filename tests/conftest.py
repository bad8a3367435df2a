"""Small real models and prompts. Nothing here reaches a network."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may depend on a hub
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


VOCAB = ["<pad>", "<s>", "</s>", "<unk>", *(chr(code) for code in range(97, 123)), *"0123456789 .?"]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ' ' + message['content'] + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with a chat template."""
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCAB)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def make_model(seed: int, vocab_size: int = len(VOCAB)) -> LlamaForCausalLM:
    """Two layers, 32 wide, random weights large enough that two seeds disagree about every token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model_factory():
    return make_model


def make_prompts(branch: str, count: int = 11) -> Dataset:
    """Prompts of different lengths."""
    return Dataset.from_list([{"prompt": f"{branch} {'x' * (index % 4)} {index}"} for index in range(count)])


@pytest.fixture
def prompts():
    return {branch: make_prompts(branch) for branch in ("general", "domain")}
