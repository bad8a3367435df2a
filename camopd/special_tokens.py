"""Special tokens that are written out in the text of a prompt: found, and encoded as the text they are.

Whoever writes `<|im_end|><|im_start|>system` into a question ends the turn and begins another: a tokenizer cannot tell
it from what the chat template writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .messages import need_tokens
from .tokens import refuse_ends


class SpecialTokens:
    """Those of a tokenizer, in the text of prompts: of all messages but those of the assistant."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # Those that are not called special, as `<think>` of Qwen3, become one id of a text, too. Spaces are none.
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}
        self._tokens = {**dict.fromkeys(map(str, tokenizer.all_special_tokens)), **added}
        self._any = _any_of(self._tokens)
        # What `split_special_tokens` of a tokenizer leaves whole.
        self._whole = {name for name, token in added.items() if not token.special} - set(tokenizer.all_special_tokens)
        self._any_whole = _any_of(self._whole)

    def first(self, row: Mapping[str, Any]) -> str | None:
        """The first one in the text of a row as [`read_row`] gives it, `None` where there is none."""
        found = next(filter(None, map(self._any.search, _texts(row["prompt"]).values())), None)
        return found and found[0]

    def encode_as_text(self, row: Mapping[str, Any], render: Callable[[Mapping[str, Any]], str]) -> list[int]:
        """Token ids of a row in which those of the chat template are special tokens, and those in the text are not.

        `render` puts messages through the chat template. Raises `ValueError` where the template changes a text so that it
        cannot be found again, and where the tokenizer does not take what stands between special tokens piece by piece.
        """
        if isinstance(row["prompt"], str):
            return need_tokens(row, self._text_prompt(row["prompt"]))
        text = render(row)
        parts = self._parts(row, text, render)
        if self._join([(text, False)]) != self._tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ValueError(
                f"has the special token {self.first(row)!r} in its text, which split_special_tokens=True cannot encode as "
                "text: this tokenizer does not take what stands between special tokens by itself. Take it out of the row."
            )
        return need_tokens(row, self._join(parts))

    def _text_prompt(self, text: str) -> list[int]:
        """With what the tokenizer puts before and behind a text."""
        whole = list(self._tokenizer(text=text, split_special_tokens=True)["input_ids"])
        refuse_ends(self._tokenizer, text, whole, split_special_tokens=True)
        if not self._any_whole.search(text):
            return whole
        plain = self._tokenizer(text=text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        start = next(place for place in range(len(whole)) if whole[place : place + len(plain)] == plain)
        return [*whole[:start], *self._as_text(text), *whole[start + len(plain) :]]

    def _as_text(self, text: str) -> list[int]:
        """Ids of a text in which no added token counts: those that the tokenizer leaves whole are cut after a character."""
        pieces, start = [], 0
        while found := self._any_whole.search(text, start):
            pieces.append(text[start : found.start() + 1])
            start = found.start() + 1
        pieces.append(text[start:])
        rows = self._tokenizer(pieces, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [token for row in rows for token in row]
        whole = set(self._tokenizer.convert_tokens_to_ids(sorted(self._whole)))
        if len(pieces) > 1 and (whole & set(ids) or self._decode(ids) != text):
            raise ValueError(
                f"has {self._any_whole.findall(text)[0]!r} in its text, which split_special_tokens=True cannot encode as "
                "text: the tokenizer has it as one token and does not take its pieces one by one. Take it out of the row."
            )
        return ids

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _parts(
        self, row: Mapping[str, Any], text: str, render: Callable[[Mapping[str, Any]], str]
    ) -> list[tuple[str, bool]]:
        """The rendered `text` of a row in pieces, each with whether it is text of a message that has special tokens."""
        word = "Text"
        while word in text:
            word += "Text"
        marks = {place: f"{word}{place}x" for place, said in _texts(row["prompt"]).items() if self._any.search(said)}
        messages = row["prompt"]
        marked = [{**message, "content": marks.get(at, message["content"])} for at, message in enumerate(messages)]
        pieces = re.split(f"({'|'.join(marks.values())})", render({**row, "prompt": marked}))
        said = {mark: messages[place]["content"] for place, mark in marks.items()}
        for change in (str, str.strip):  # many templates trim
            parts = [(change(said[piece]), True) if piece in said else (piece, False) for piece in pieces]
            if "".join(part for part, _ in parts) == text and set(said) <= set(pieces):
                return parts
        raise ValueError(
            f"has the special token {self.first(row)!r} in its text, which split_special_tokens=True cannot encode as "
            "text: the chat template writes that text in another form. Take it out of the row, or change the template."
        )

    def _join(self, parts: list[tuple[str, bool]]) -> list[int]:
        """Token ids of parts of one text, of which special tokens count where the part is not text.

        What stands between two special tokens is encoded in one piece, as tokenizers do: template and text beside each
        other may share a token.
        """
        ids: list[int] = []
        pending, strip = "", False

        def flush() -> None:
            nonlocal pending
            pending = pending.lstrip() if strip else pending
            if pending:
                ids.extend(self._as_text(pending))
            pending = ""

        for part, is_text in parts:
            for piece in [part] if is_text else self._any.split(part):
                if is_text or piece not in self._tokens:
                    pending += piece
                    continue
                token = self._tokens[piece]
                if getattr(token, "lstrip", False):
                    pending = pending.rstrip()
                flush()
                ids.append(self._tokenizer.convert_tokens_to_ids(piece))
                strip = getattr(token, "rstrip", False)
        flush()
        return ids


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of these names."""
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _texts(prompt: Any) -> dict[int, str]:
    """What others than the assistant have written, by the place of the message."""
    if isinstance(prompt, str):
        return {0: prompt}
    return {place: message["content"] for place, message in enumerate(prompt) if message["role"] != "assistant"}
