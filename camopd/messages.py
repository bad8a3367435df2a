"""What a row of prompts says, as the model gets it: a text, or messages for the chat template; or an error in words."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from . import left_out
from .schedule import short
from .tokens import refuse_ends


ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "assistant": "assistant", "gpt": "assistant"}
MOST_BYTES = 1 << 19  # of a prompt in UTF-8; a tokenizer takes up to 200 for each of them, and seconds for a megabyte
BYTES_PER_TOKEN = 16  # of `max_prompt_length`, more than any text has on average; English has 4 to 5
COLUMNS = ("prompt", "system", "tools", "chat_template_kwargs", "teacher_prompt")  # of a row, which a model sees

Messages = list[dict[str, Any]]

_FORM = "Every row needs a non-empty 'prompt': a text, or messages with 'role' and 'content'."
# Arguments of apply_chat_template that are set here.
_OURS = {
    "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "tools", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "messages",
}  # fmt: skip


def read_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its prompt in one form: a text, or messages whose contents are texts.

    JSON text of messages becomes messages, ShareGPT's `from` and `value` become `role` and `content`, text parts are joined
    and a column `system` becomes the first message. Keys without a value are left out, as Arrow fills them in where other
    rows have one. `tools` is a list of JSON schemas and `chat_template_kwargs` a dict, if the row has any. A
    `teacher_prompt` has the forms of a prompt, and is there in full: `system` is not put before it.

    Raises `ValueError` with what the row "has" or "is", for the caller to say which row.
    """
    try:
        return _read_row(row)
    except RecursionError:
        raise ValueError(f"has lists or mappings in one another, too deep to be read. {_FORM}") from None


def _read_row(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt = row.get("prompt")
    messages = as_messages(prompt)
    if messages is None and (not isinstance(prompt, str) or not prompt.strip()):
        found = "no prompt" if prompt is None or prompt in ("", []) else f"the prompt {str(prompt)[:80]!r}"
        raise ValueError(f"has {found}. {_FORM}")
    more = {"tools": _tools(row.get("tools")), "chat_template_kwargs": _template_kwargs(row)}
    system = row.get("system")
    if messages is not None:
        prompt = _with_system(messages, system)
    else:
        given = [name for name, value in more.items() if value]
        given += ["system"] if isinstance(system, str) and system.strip() else []
        if given:
            raise ValueError(
                f"has {' and '.join(map(repr, given))}, but its prompt is a text, to which no chat template is applied: "
                f"they would have no effect. Write the prompt as messages, or leave the column{'s'[: len(given) > 1]} out."
            )
    kept = {name: value for name, value in row.items() if name not in COLUMNS}
    if "teacher_prompt" in row:
        kept["teacher_prompt"] = _teacher_prompt(row["teacher_prompt"])
    return {**kept, "prompt": prompt, **{name: value for name, value in more.items() if value}}


def _teacher_prompt(prompt: Any) -> Messages | str:
    try:
        messages = as_messages(prompt)
    except ValueError as error:
        raise ValueError(f"has a 'teacher_prompt' that cannot be read: it {error}") from None
    if messages is not None:
        return messages
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    raise ValueError(
        f"has the 'teacher_prompt' {str(prompt)[:80]!r}, where others have a text or messages. Give every row of the "
        "branch one: that of a row without a hint is its prompt."
    )


def as_messages(prompt: Any) -> Messages | None:
    """The messages of a conversation, in whatever form it comes, or None for what is not one. Raises as [`read_row`]."""
    if isinstance(prompt, str):
        prompt = _from_json(prompt)
    if not isinstance(prompt, list) or not prompt:
        return None
    messages = [_message(message, place) for place, message in enumerate(prompt)]
    if not any(message["content"].strip() or message.get("tool_calls") for message in messages):
        raise ValueError(f"has messages without any text. {_FORM}")
    last = messages[-1]
    if last["role"] == "assistant" and (last.get("tool_calls") or not last["content"].strip()):
        what = "an assistant turn that calls a tool" if last.get("tool_calls") else "an empty assistant turn"
        raise ValueError(
            f"has a prompt that ends with {what}, which the student cannot continue. Leave that turn out; a "
            "prompt that ends with some text of the assistant is continued."
        )
    return messages


def before_answer(prompt: Any) -> Any:
    """A conversation without the assistant turn that it ends with: that is the answer, and the student writes its own.

    Raises `ValueError` where nothing is left. What is not a conversation comes back as it is.
    """
    if isinstance(prompt, str):
        prompt = _from_json(prompt)
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return prompt  # of which `read_row` says what is wrong
    end = len(prompt)
    while end and _speaker(prompt[end - 1]) == "assistant":
        end -= 1
    if all(_speaker(message) == "system" for message in prompt[:end]):
        raise ValueError(
            f"the conversation {str(prompt)[:200]} has nothing before its assistant turn that could be answered. Leave it "
            "out, or put a user turn before."
        )
    return prompt[:end]


def without_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row; its `messages`, where it has no `prompt`, are its prompt without the answer. Raises as [`before_answer`]."""
    if row.get("prompt") is not None or row.get("messages") is None:
        return dict(row)
    return {**row, "prompt": before_answer(row["messages"])}


def read_prompt(row: Mapping[str, Any], prefill: bool) -> dict[str, Any]:
    """[`read_row`] of a row [`without_answer`]. Raises `ValueError` also for a prompt that ends with an assistant turn,
    unless `prefill` says that the student is to go on with it."""
    found = read_row(without_answer(row))
    prompt = found["prompt"]
    if not prefill and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"has a prompt that ends with an assistant turn, {prompt[-1]['content'][:80]!r}. If it is the answer, call the "
            "column 'messages', of which answers are left out, or take that turn out. Set prefill=True to have the student "
            "go on with it."
        )
    return found


def tokenize(
    row: Mapping[str, Any],
    tokenizer: Any,
    tools: Sequence[Callable[..., Any]] = (),
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    most: int = MOST_BYTES,
) -> list[int]:
    """Token ids of a row as [`read_row`] gives it, and as TRL makes them: of a text with the tokenizer's special tokens, of
    messages those of [`render`]. Raises `ValueError` as [`render`] and [`check_text`], and where there are none."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        left_out.warn_of_text([*(["tools"] if tools else []), *(["chat_template_kwargs"] if template_kwargs else [])])
        check_text(prompt, most)
        ids = tokenizer(text=prompt)["input_ids"]
        refuse_ends(tokenizer, prompt, ids)
    else:
        text = render(row, tokenizer, tools, chat_template, template_kwargs)
        check_text(text, most)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return need_tokens(row, ids)


def need_tokens(row: Mapping[str, Any], ids: Sequence[int]) -> list[int]:
    """The token ids of a row. Raises `ValueError` where there are none."""
    if not ids:
        shown = str(row["prompt"])[:80]
        raise ValueError(f"has the prompt {shown!r}, of which the tokenizer makes no token. {_FORM}")
    return list(ids)


def check_text(text: str, most: int = MOST_BYTES) -> None:
    """Raise `ValueError` for a prompt, as a tokenizer would get it, of more than `most` bytes, or that is not Unicode."""
    try:
        too_long = len(text) > most or len(text.encode()) > most
    except UnicodeEncodeError as error:  # which a tokenizer calls a wrong type
        raise ValueError(
            f"has {text[error.start]!r} at character {error.start} of its prompt, one half of a surrogate pair. Take it "
            "out; a file that has been read in the wrong encoding has such."
        ) from None
    if too_long:
        raise ValueError(
            f"has a prompt of {len(text)} characters, and {most} bytes are the most: a tokenizer that is given more may "
            "take all memory and end the process. Cut the prompt, or leave the row out. Only a max_prompt_length above "
            f"{MOST_BYTES // BYTES_PER_TOKEN} moves this bound, to {BYTES_PER_TOKEN} bytes for each of its tokens."
        )


def render(
    row: Mapping[str, Any],
    tokenizer: Any,
    tools: Sequence[Callable[..., Any]] = (),
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The messages of a row through the chat template: with a generation prompt, or, where they end with the assistant, up
    to where that goes on.

    Args:
        tools: Functions that the trainer runs; a row may name tools of its own instead.
        template_kwargs: Of the run; those of the row win.

    Raises `ValueError`, as `read_row`, for what the template refuses or leaves out.
    """
    messages = row["prompt"]
    goes_on = messages[-1]["role"] == "assistant"
    if tools and (goes_on or row.get("tools")):
        what = "a prompt that ends with the assistant" if goes_on else "'tools' of its own"
        raise ValueError(f"has {what}, which cannot be used together with the `tools` of the trainer. Leave one out.")
    try:
        text = _apply_template(row, tokenizer, tools, chat_template, template_kwargs, not goes_on, goes_on)
    except Exception as error:  # whatever a template raises
        raise ValueError(
            f"has a prompt of which the chat template says: {type(error).__name__}: {str(error)[:300]}. Roles: "
            f"{', '.join(message['role'] for message in messages)[:200]}. Change the row, or the template."
        ) from error
    if not text.strip():
        raise ValueError(
            "has messages of which the chat template makes an empty prompt. Change the row, or the template."
        )
    again = partial(
        _apply_template, tokenizer=tokenizer, tools=tools, chat_template=chat_template, template_kwargs=template_kwargs,
        generation_prompt=not goes_on, goes_on=goes_on,
    )  # fmt: skip
    left_out.check_calls(row, text, again)
    names = {**(template_kwargs or {}), **(row.get("chat_template_kwargs") or {})}
    left_out.check(row, text, str(chat_template or tokenizer.chat_template), names)
    return text


def ending(
    row: Mapping[str, Any],
    text: str,
    tokenizer: Any,
    tools: Sequence[Callable[..., Any]] = (),
    chat_template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The end of a row's messages that they do not decide themselves: the generation prompt, or the text of the assistant
    that is gone on with. "" of a prompt that is a text.

    Args:
        text: what [`render`] makes of the row with the other arguments.
    """
    messages = row["prompt"]
    if isinstance(messages, str):
        return ""
    if messages[-1]["role"] == "assistant":
        return text[max(0, text.rfind(messages[-1]["content"].strip())) :]
    without = _apply_template(row, tokenizer, tools, chat_template, template_kwargs, False, False)
    return text[len(os.path.commonprefix([text, without])) :]  # noqa: RUF071 - of characters is what is wanted


def _apply_template(
    row: Mapping[str, Any],
    tokenizer: Any,
    tools: Sequence[Callable[..., Any]],
    chat_template: str | None,
    template_kwargs: Mapping[str, Any] | None,
    generation_prompt: bool,
    goes_on: bool,
) -> str:
    text = tokenizer.apply_chat_template(
        row["prompt"],
        tools=row.get("tools") or list(tools) or None,  # a Llama template writes a preamble for an empty list
        chat_template=chat_template,
        add_generation_prompt=generation_prompt,
        continue_final_message=goes_on,
        tokenize=False,
        **{**(template_kwargs or {}), **(row.get("chat_template_kwargs") or {})},
    )
    return str(text)


def _speaker(message: Mapping[str, Any]) -> Any:
    return message.get("role") or SHAREGPT_ROLES.get(str(message.get("from")))


def _from_json(text: str) -> Any:
    """Messages that are written as JSON, or the text as it is. Raises `ValueError` for messages that cannot be read."""
    stripped = text.strip()
    if stripped[:1] not in ("[", "{"):
        return text
    try:
        found = json.loads(stripped)
    except (ValueError, RecursionError):
        if re.match(r"""\[\s*\{\s*['"](role|content|from|value)['"]\s*:""", stripped):
            raise ValueError(
                f"has the text {text[:80]!r}, which seems to be messages, but is not JSON (Python's own notation is not). "
                "Write a JSONL file, or each conversation with json.dumps."
            ) from None
        return text
    if isinstance(found, list) and any(isinstance(item, dict) and _is_message(item) for item in found):
        return found
    if isinstance(found, dict) and (_is_message(found) or isinstance(found.get("messages"), list)):
        raise ValueError(
            f"has the text {text[:80]!r}, an object in JSON. A conversation is a list of messages: "
            '[{"role": "user", "content": ...}].'
        )
    return text


def _is_message(item: Mapping[str, Any]) -> bool:
    return ("role" in item and ("content" in item or "tool_calls" in item)) or ("from" in item and "value" in item)


def _message(message: Any, place: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"has the prompt {str(message)[:80]!r} in place of message {place}. {_FORM}")
    message = _without_none(message)
    if "role" not in message and "from" in message:
        sender = message.pop("from")
        if not isinstance(sender, str) or sender not in SHAREGPT_ROLES:
            raise ValueError(
                f"has message {place} from {short(sender)}; known are {', '.join(SHAREGPT_ROLES)}. Write it with "
                f"'role' and 'content', the role one of {', '.join(ROLES)}."
            )
        message = {"role": SHAREGPT_ROLES[sender], "content": message.pop("value", None), **message}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(
            f"has {'no role' if role is None else f'the role {short(role)}'} in message {place} of its prompt. Use one "
            f"of {', '.join(ROLES)}; chat templates leave out other roles, or write them as they are. {_FORM}"
        )
    calls = message.get("tool_calls")
    if isinstance(content, list) and content:
        content = "".join(_text_of(part, place) for part in content)
    elif content is None and role == "assistant" and calls:
        content = ""  # many templates would write "None"
    if not isinstance(content, str):
        found = "no content" if content is None or content == [] else f"the content {str(content)[:80]!r}"
        raise ValueError(f"has {found} in message {place} of its prompt, from {role!r}. {_FORM}")
    return {**message, "content": content}


def _text_of(part: Any, place: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ValueError(
        f"has a part of type {short(kind)} in message {place} of its prompt. Only text can be read: images are not "
        "supported, because no teacher can score them yet. Leave the part or the row out."
    )


def _with_system(messages: Messages, system: Any) -> Messages:
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    if not isinstance(system, str):
        raise ValueError(
            f"has {str(system)[:80]!r} in the column 'system', which is not a text. Leave the column out."
        )
    said = [message["content"] for message in messages if message["role"] == "system"]
    if not said:
        return [{"role": "system", "content": system}, *messages]
    if said != [system]:
        raise ValueError(
            f"has two system messages: {system[:80]!r} in the column 'system', and {said[0][:80]!r} in its messages. Leave "
            "one out."
        )
    return messages


def _tools(tools: Any) -> list[dict[str, Any]]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise ValueError(f"has 'tools' that are not JSON: {tools[:80]!r}. {_TOOLS}") from None
    if tools is None:
        return []
    if isinstance(tools, list):  # some datasets have each tool as a text
        try:
            tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
        except ValueError:
            tools = str(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"has 'tools' that are not a list of JSON schemas: {str(tools)[:80]!r}. {_TOOLS}")
    return [_without_none(tool, of_template=True) for tool in tools]


_TOOLS = "Give the schemas that the chat template is to show, or leave the column out."


def _template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = row.get("chat_template_kwargs")
    if isinstance(kwargs, str):
        with contextlib.suppress(ValueError):
            kwargs = json.loads(kwargs) if kwargs.strip() else None
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise ValueError(
            f"has 'chat_template_kwargs' that are not a mapping: {str(kwargs)[:80]!r}. Leave the column out."
        )
    ours = sorted(_OURS & set(kwargs))
    if ours:
        raise ValueError(
            f"has {', '.join(map(repr, ours))} in 'chat_template_kwargs', which the trainer sets itself. Leave it out."
        )
    return dict(_without_none(kwargs, of_template=True))


def _without_none(value: Any, of_template: bool = False) -> Any:
    """Without what Arrow has filled in. Raises `ValueError` for a date that is an argument of the template."""
    if of_template and isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        raise ValueError(
            f"has {value!r} for its template, to which transformers gives the type alone. Write a text; those of a JSON "
            "file stay texts where the file itself is named."
        )
    if isinstance(value, dict):
        return {name: _without_none(item, of_template) for name, item in value.items() if item is not None}
    return [_without_none(item, of_template) for item in value] if isinstance(value, list) else value
