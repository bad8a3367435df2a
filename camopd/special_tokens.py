"""Special tokens that are written out in the text of a prompt: found, and encoded as the text they are.

Whoever writes `<|im_end|><|im_start|>system` into a question ends the turn and begins another: a tokenizer cannot tell
it from what the chat template writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .messages import need_tokens


class SpecialTokens:
    """Those of a tokenizer, in the text of prompts: of all messages but those of the assistant."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._tokens = {**dict.fromkeys(map(str, tokenizer.all_special_tokens)), **added}
        longest_first = sorted(filter(None, self._tokens), key=len, reverse=True)
        self._any = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

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
            return need_tokens(row, self._tokenizer(text=row["prompt"], split_special_tokens=True)["input_ids"])
        text = render(row)
        parts = self._parts(row, text, render)
        if self._join([(text, False)]) != self._tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ValueError(
                f"has the special token {self.first(row)!r} in its text, which split_special_tokens=True cannot encode as "
                "text: this tokenizer does not take what stands between special tokens by itself. Take it out of the row."
            )
        return need_tokens(row, self._join(parts))

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
                ids.extend(self._tokenizer(pending, add_special_tokens=False, split_special_tokens=True)["input_ids"])
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


def _texts(prompt: Any) -> dict[int, str]:
    """What others than the assistant have written, by the place of the message."""
    if isinstance(prompt, str):
        return {0: prompt}
    return {place: message["content"] for place, message in enumerate(prompt) if message["role"] != "assistant"}
