"""What a tokenizer and a model must agree about: which tokens there are, and which of them end an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import TemplateError


def need_end(tokenizer: Any) -> None:
    """Raise `ValueError` where a tokenizer has no end of sequence: no completion would end, and none could be scored."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the student's tokenizer ({tokenizer.name_or_path or type(tokenizer).__name__}) has no end of sequence. Set "
            "the token with which its model ends an answer, tokenizer.eos_token = '...', and save it with "
            "tokenizer.save_pretrained, or pass it as processing_class."
        )


def refuse_ends(tokenizer: Any, text: str, ids: Sequence[int], **how: Any) -> None:
    """Raise `ValueError` where the tokenizer has put something behind a text prompt, as its end of sequence: the student
    would go on behind a text that has ended. Also where the text has a begin of sequence, and has got a second one.

    Args:
        ids: of the text, with the special tokens around it.
        how: in which way else they were made.
    """
    first = getattr(tokenizer, "bos_token_id", None)
    if first is not None and list(ids[:2]) == [first, first] and text.startswith(tokenizer.bos_token):
        raise ValueError(
            f"has a text as its prompt that begins with {tokenizer.bos_token!r}, and the tokenizer puts another one before "
            "it: no model was trained on two. Take it out of the text, which is as it comes from apply_chat_template, or "
            "give the prompt as messages."
        )
    own = list(tokenizer(text=text, add_special_tokens=False, **how)["input_ids"])
    if not own or list(ids[-len(own) :]) == own:
        return
    for count in range(1, 4):
        if list(ids[-count - len(own) : -count]) == own:
            raise ValueError(
                f"has a text as its prompt, and the tokenizer puts {tokenizer.decode(ids[-count:])!r} behind every text, "
                "as one of a fine-tuning with add_eos_token does. Give the prompts as messages, or take that token out of "
                "post_processor in its tokenizer.json."
            )


def turn_end(tokenizer: Any) -> int | None:
    """The token with which the chat template ends an answer, `None` where it has none.

    Gemma, Phi and others end a turn with another token than `tokenizer.eos_token`.
    """
    if not tokenizer.chat_template:
        return None
    answer = "The capital of France is Paris"
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": answer},
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError):  # a template that wants other messages says so in its own way
        return None
    _, found, rest = text.rpartition(answer)
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return int(ids[0]) if ids and ids[0] in special else None


def ends_of(tokenizer: Any, eos_token_ids: int | Iterable[int] | None = None) -> list[int]:
    """Tokens that end an answer: that of the template first, then the tokenizer's and those of the generation config."""
    more = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids or [])
    return [
        token for token in dict.fromkeys([turn_end(tokenizer), tokenizer.eos_token_id, *more]) if token is not None
    ]


def unended_turn(tokenizer: Any, eos_token_ids: Iterable[int]) -> str | None:
    """A warning where the token with which the template ends a turn is not among those that end a completion."""
    end = turn_end(tokenizer)
    if end is None or end in eos_token_ids:
        return None
    token = tokenizer.convert_ids_to_tokens(end)
    return (
        f"the chat template ends a turn with {token!r} (id {end}), which ends no completion: it is neither "
        f"tokenizer.eos_token ({tokenizer.eos_token!r}) nor in eos_token_id of the student's generation_config.json. "
        f"Completions may run on to max_completion_length; add {end} to it."
    )


def head_size(model: Any) -> int:
    """Tokens that a model can write: rows of its head. Often more than its tokenizer has, for the sake of speed."""
    head = model.get_output_embeddings()
    if head is None:
        return int(model.config.get_text_config().vocab_size)
    packed = getattr(head, "out_features", None)  # of quantized layers, whose weights have another shape
    return packed or _rows(head.weight)


def embedding_size(model: Any) -> int:
    """Tokens that a model can read."""
    return _rows(model.get_input_embeddings().weight)


def _rows(weight: Any) -> int:
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO-3 keeps the shape of a whole parameter there


def check_known(prompt_ids: Sequence[int], tokenizer: Any, known: int) -> None:
    """Raise `ValueError` where a prompt has a token that the student cannot read: on a GPU that ends the process."""
    token = max(prompt_ids, default=0)
    if token >= known:
        raise ValueError(
            f"has the token {tokenizer.convert_ids_to_tokens(token)!r} (id {token}), and the student knows {known} tokens: "
            f"{tokenizer.decode(prompt_ids)[:200]!r}. Take it out of the prompts, or give the student a row for it with "
            "model.resize_token_embeddings(len(tokenizer))."
        )
