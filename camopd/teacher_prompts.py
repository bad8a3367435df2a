"""What the teacher of a branch sees in place of the prompt: rows bring it, or a template makes it of each prompt.

The student's completion stays the same tokens, and stands behind the teacher's own prompt. So both prompts must end alike:
a teacher that is told to think first, or not to, would score tokens that stand in another place of the conversation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from .messages import MOST_BYTES, Messages, as_messages, read_row
from .prompts import PromptReader, PromptStream, named
from .schedule import short
from .special_tokens import SpecialTokens


COLUMN = "teacher_prompt"  # of rows; the setting of the config has the same name
PLACE = "{prompt}"  # in a template
MOST_COMPARED = 64  # tokens at the end of two prompts
MOST_ADDED = 8  # tokens of a prompt beside those of its bytes: what a tokenizer puts at its beginning and its end
FORM = (
    f"Write a text with {PLACE}, which takes the place of the last user message, or messages of which the last one is the "
    f"user's and has {PLACE}."
)


def read_templates(given: Any, branches: Collection[str]) -> dict[str, Messages | str] | None:
    """The config's `teacher_prompt` with messages in one form. Raises `ValueError` for what is not a template by branch."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(f"{COLUMN} must map branches to templates, got {short(given)}. {FORM}")
    return {branch: _read_template(template, branch, branches) for branch, template in given.items()}


def _read_template(template: Any, branch: str, branches: Collection[str]) -> Messages | str:
    if branch not in branches:
        raise ValueError(
            f"{COLUMN} has a template for {branch!r}, but the branches of the schedule are {list(branches)}. Fix the name."
        )
    try:
        messages = as_messages(template)
    except ValueError as error:
        raise ValueError(f"{COLUMN} of branch {branch!r} {error} {FORM}") from None
    if messages is None and isinstance(template, str) and PLACE in template:
        return template
    if messages is None or messages[-1]["role"] != "user" or PLACE not in messages[-1]["content"]:
        raise ValueError(
            f"{COLUMN} of branch {branch!r} has no {PLACE} where a prompt could stand: {str(template)[:200]!r}. {FORM}"
        )
    early = next((message["role"] for message in messages[:-1] if PLACE in message["content"]), None)
    if early is not None:
        raise ValueError(
            f"{COLUMN} of branch {branch!r} has {PLACE} in a message of the {early}, too, where the teacher would read "
            f"just that: the prompt takes the place in the last message alone. Leave it out there. {FORM}"
        )
    return messages


def fill(template: Messages | str, prompt: Messages | str) -> Messages | str:
    """A template with a prompt in its place; both as they were read. Of a conversation its last user message goes there,
    and what stands before that comes behind the template's other messages. A system message that begins it stays first.

    Raises `ValueError` with what the row "has", for a prompt that the template does not fit.
    """
    if isinstance(prompt, str):
        if isinstance(template, str):
            return template.replace(PLACE, prompt)
        raise ValueError(
            f"has a text as its prompt, and the {COLUMN} of its branch is messages. Make both the same kind."
        )
    place = max((at for at, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if place is None:
        raise ValueError(f"has no user message, whose place the {COLUMN} of its branch takes. Leave the row out.")
    before, wrapper = ([], template) if isinstance(template, str) else (template[:-1], template[-1]["content"])
    systems = [message for message in (*before, *prompt) if message["role"] == "system"]
    if len(systems) > 1 and before:
        raise ValueError(
            f"has a system message, {systems[-1]['content'][:80]!r}, and so has the {COLUMN} of its branch. Leave one out, "
            f"or give the rows a column {COLUMN!r} in place of the template."
        )
    first = prompt[:1] if before and prompt[0]["role"] == "system" else []  # it opens a conversation, and stays there
    said = {**prompt[place], "content": wrapper.replace(PLACE, prompt[place]["content"])}
    return [*first, *before, *prompt[len(first) : place], said, *prompt[place + 1 :]]


def contexts_of(
    templates: Any,
    streams: Mapping[str, PromptStream],
    held_out: Mapping[str, Any],
    teachers: Mapping[str, Any],
) -> dict[str, Messages | str | None]:
    """The branches whose teachers see another prompt, with their templates; `None` where each row brings it.

    Raises `ValueError` where both say so, the held-out prompts of a branch differ in this from those of training, or the
    teacher is "self" and sees what the student sees. Of a stream that does not know its columns, the first row is read.
    """
    found: dict[str, Messages | str | None] = dict(templates or {})
    for branch, stream in streams.items():
        names = stream.dataset.column_names or next(stream.some(1))
        if COLUMN in names and branch in found:
            raise ValueError(
                f"branch {branch!r} has a {COLUMN} in the config, and its prompts have a column of that name. Leave one "
                "of them out."
            )
        if COLUMN in names:
            found[branch] = None
    for branch, rows in held_out.items():
        names = rows.column_names if isinstance(rows, Dataset) else rows[0]
        if (COLUMN in names) != (branch in found and found[branch] is None):
            _refuse_difference(branch, COLUMN in names, "its held-out prompts")
    for branch, teacher in teachers.items():
        if isinstance(teacher, str) and teacher == "self" and branch not in found:
            raise ValueError(
                f"the teacher of branch {branch!r} is 'self', the student as it is, and sees the same prompt: all gaps "
                f"would be 0. Give that branch a {COLUMN}, in the config or as a column of its prompts, or another teacher."
            )
    return found


def _refuse_difference(branch: str, has: bool, what: str) -> None:
    found = f"is in {what}, but its prompts of training have none" if has else f"is missing from {what}"
    raise ValueError(
        f"branch {branch!r}: the column {COLUMN!r} {found}. The teacher would see something else there than in training. "
        "Give all prompts of the branch that column, or none."
    )


class TeacherPrompts:
    """Reads the prompts of teachers as the student's are read."""

    def __init__(
        self, reader: PromptReader, tokenizer: Any, contexts: Mapping[str, Messages | str | None], limit: int
    ):
        """
        Args:
            reader: of the student's prompts.
            tokenizer: the one it encodes with.
            contexts: as `contexts_of` gives them.
            limit: tokens that a prompt may have; one of a teacher is not cut.
        """
        self.branches: Collection[str] = contexts.keys()
        self._reader, self._tokenizer, self._contexts, self._limit = reader, tokenizer, contexts, limit
        self._special = SpecialTokens(tokenizer)

    def ids(self, rows: Iterable[Mapping[str, Any]], prompt_ids: Iterable[list[int]]) -> list[list[int] | None]:
        """Token ids of what the teachers of rows see in place of the prompts; `None` where they see the same.

        Args:
            rows: that were read, each with its branch.
            prompt_ids: what the student sees; as many of its last tokens as there are.

        Raises `ValueError`, with the row's name, for one that cannot be used, is longer than `limit`, or ends otherwise
        than the student's.
        """
        return [self._ids(row, own) for row, own in zip(rows, prompt_ids, strict=True)]

    def _ids(self, row: Mapping[str, Any], own: list[int]) -> list[int] | None:
        other = self._as_seen(row)
        if other is None:
            return None
        (ids,) = self._reader.ids([other])
        if len(ids) > self._limit:
            raise ValueError(
                f"{other['row']} has {len(ids)} tokens, and max_prompt_length is {self._limit}. It is not cut, since its "
                f"beginning is what the student does not see. Raise max_prompt_length to {len(ids)}, or shorten it."
            )
        ends = [
            self._inside(tokens, self._reader.text_and_ending(one)[1]) for one, tokens in ((row, own), (other, ids))
        ]
        for end, tokens in zip(ends, (ids, own), strict=True):
            count = min(len(end), len(tokens))
            if count and end[-count:] != tokens[-count:]:
                self._refuse_ending(other, own[-count:], ids[-count:])
        return ids

    def check(self, datasets: Mapping[str, Iterable[Any]]) -> None:
        """Raise `ValueError` as `ids` does, for any row of a branch's dataset.

        Measured are the rows that could be longer than `limit`: a prompt has no more tokens than bytes, where a character
        may be several. The ends of two prompts are compared in all rows as text, and as tokens in the largest.
        """
        for branch, rows in datasets.items():
            self._reader.check({f"{branch} ({COLUMN})": self._seen(branch, rows)})

    def _seen(self, branch: str, rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """What its teacher sees of a branch's rows. They are measured, many at a time, as the next ones are asked for."""
        most, total = 0, 0
        largest: list[dict[str, Any]] = []
        pending: list[tuple[dict[str, Any], bool, str]] = []  # rows, whether the prompt is a text, and what is encoded
        for unread in rows:
            row = {**named(read_row, unread), "branch": branch}
            other = self._as_seen(row)
            if other is None:
                continue
            one, two = (named(self._reader.text_and_ending, each) for each in (row, other))
            for (text, _), (_, end) in ((one, two), (two, one)):
                if not text.endswith(end):
                    self._refuse_ending(other, one[0][-len(end) :], two[0][-len(end) :])
            yield other
            size = len(two[0].encode())
            if size > most:
                most, largest = size, [row]
            if size + MOST_ADDED > self._limit:
                pending.append((row, isinstance(other["prompt"], str), two[0]))
                total += size
                if self._special.first(other):  # which the reader may encode as text
                    self.ids([row], self._reader.ids([row]))
            if total > MOST_BYTES:
                self._refuse_long(pending)
                pending, total = [], 0
        self._refuse_long(pending)
        self.ids(largest, self._reader.ids(largest))

    def _refuse_long(self, rows: Sequence[tuple[dict[str, Any], bool, str]]) -> None:
        for is_text in (
            True,
            False,
        ):  # of which a text gets the tokenizer's own special tokens, as in `messages.tokenize`
            some = [(row, text) for row, of, text in rows if of is is_text]
            if not some:
                continue
            found = self._tokenizer([text for _, text in some], add_special_tokens=is_text)["input_ids"]
            long = [row for (row, _), ids in zip(some, found, strict=True) if len(ids) > self._limit]
            self.ids(long[:1], self._reader.ids(long[:1]))

    def _as_seen(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row with the teacher's prompt in place of the student's."""
        branch, name = row["branch"], row.get("row", "a row")
        template = self._contexts.get(branch)
        if (COLUMN in row) != (branch in self._contexts and template is None):
            _refuse_difference(branch, COLUMN in row, name)
        if branch not in self._contexts:
            return None
        prompt = row[COLUMN] if template is None else named(lambda row: fill(template, row["prompt"]), dict(row))
        other = {key: value for key, value in row.items() if key != COLUMN}
        if isinstance(prompt, str):  # which no chat template sees
            other = {key: value for key, value in other.items() if key not in ("tools", "chat_template_kwargs")}
        return {**other, "prompt": prompt, "row": f"the {COLUMN} of {name}"}

    def _inside(self, ids: list[int], end: str) -> list[int]:
        """The last tokens of a prompt, which make up its ending: without one that began before it, but the very last."""
        count = min(1, len(end))
        while count < min(len(ids), MOST_COMPARED) and len(self._decode(ids[-count - 1 :])) <= len(end):
            count += 1
        return ids[len(ids) - count :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _refuse_ending(self, other: Mapping[str, Any], own: Sequence[int] | str, its: Sequence[int] | str) -> None:
        own, its = (text if isinstance(text, str) else self._decode(text) for text in (own, its))
        raise ValueError(
            f"{other['row']} ends with {its!r}, and the prompt of the student with {own!r}. The teacher would score the "
            "student's tokens in another place of the conversation, thinking where the student answers, for example. Let "
            "both end alike: the same chat_template_kwargs (enable_thinking), and the same text of the assistant, if any."
        )
