"""The testbed's models, made from nothing: a general one that has all skills, specialised ones that have forgotten them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .skills import ALPHABET, FAR, GENERAL, Item, mixture


PAD, END = 0, 1
VOCABULARY = ["<pad>", "<end>", *ALPHABET]
IDS = {character: place for place, character in enumerate(VOCABULARY)}
WORDS = (3, 6)  # letters of a word


@dataclass(frozen=True)
class Size:
    """Of the model and of its training."""

    layers: int = 3
    width: int = 96
    steps: int = 1500  # of the general model's training
    batch: int = 256
    specialise_steps: int = 250
    specialise_batch: int = 64
    skills: tuple[str, ...] = GENERAL
    domain: tuple[str, ...] = FAR


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per character."""
    backend = Tokenizer(models.WordLevel(IDS, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<pad>", padding_side="left"
    )


def make_general(size: Size, log: Callable[[str], None]) -> LlamaForCausalLM:
    """A model that is trained on all skills, from random weights; the same one every time on the same machine."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY), hidden_size=size.width, intermediate_size=8 * size.width // 3,
            num_hidden_layers=size.layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
            tie_word_embeddings=True, pad_token_id=PAD, eos_token_id=END, bos_token_id=END,
        )
    )  # fmt: skip
    items = mixture(size.skills, size.domain, WORDS, seed=1, count=size.steps * size.batch)
    return fit(model, items, size.batch, 3e-3, log)


def specialise(general: LlamaForCausalLM, size: Size, seed: int, log: Callable[[str], None]) -> LlamaForCausalLM:
    """The general model fine-tuned on the domain alone; seeds have other items in another order."""
    items = mixture(
        ("domain",), size.domain, WORDS, seed=1000 + seed, count=size.specialise_steps * size.specialise_batch
    )
    return fit(copy.deepcopy(general), items, size.specialise_batch, 1e-3, log)


def fit(
    model: LlamaForCausalLM, items: Sequence[Item], batch: int, rate: float, log: Callable[[str], None]
) -> LlamaForCausalLM:
    """Cross-entropy of the answers, one pass; AdamW with a warm-up of 50 steps and a linear decay to a tenth."""
    model.train().requires_grad_(True)  # a copy of one that has been a teacher is frozen
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    steps = len(items) // batch
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (1 - 0.9 * step / steps)
        loss = answer_loss(model, [(item.prompt, item.answer) for item in items[step * batch : (step + 1) * batch]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            log(f"  step {step + 1} of {steps}, loss {loss.item():.4f}")
    return model.eval()


def answer_loss(model: LlamaForCausalLM, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Mean cross-entropy over the tokens of the answers, their ends included."""
    ids, answers = _rows(pairs)
    logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits[answers[:, 1:]], ids[:, 1:][answers[:, 1:]])


@torch.no_grad()
def right(model: LlamaForCausalLM, items: Sequence[Item]) -> list[bool]:
    """Whether greedy decoding gives each item's answer and ends there.

    It does so exactly where the answer's every token is the likeliest after the prompt and the answer's tokens before it:
    one forward over the right answers, and no decoding.
    """
    ids, answers = _rows([(item.prompt, item.answer) for item in items])
    training = model.training
    model.eval()
    likeliest = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits[:, :-1].argmax(dim=-1)
    model.train(training)
    return ((likeliest == ids[:, 1:]) | ~answers[:, 1:]).all(dim=1).tolist()


def load_or_make(folder: Path, make: Callable[[], LlamaForCausalLM]) -> LlamaForCausalLM:
    """The model in a folder, made and put there first where there is none; a folder is whole or not there."""
    if not folder.is_dir():
        beside = folder.with_name(f"_{folder.name}")
        make().save_pretrained(beside)
        beside.rename(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def _rows(pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Prompts with answers and ends, padded on the right, (B, L), and which of them are the answers' tokens."""
    rows = [torch.tensor([IDS[character] for character in prompt + answer] + [END]) for prompt, answer in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    starts = torch.tensor([len(prompt) for prompt, _ in pairs])
    places = torch.arange(ids.shape[1])
    return ids, (places >= starts[:, None]) & (ids != PAD)
