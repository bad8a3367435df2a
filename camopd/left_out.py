"""What a chat template leaves out of a prompt, and would never be seen by the model: messages, tools, keywords."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any


logger = logging.getLogger(__name__)

_warned: set[str] = set()  # of what has no effect, once


def check(row: Mapping[str, Any], text: str, template: str, names: Iterable[str]) -> None:
    """Raise `ValueError` for a message or a tool of a row that its rendered `text` does not have; warn, once for each, of
    `names` of keywords that the template does not read."""
    for message in row["prompt"]:  # of an assistant's it may leave thoughts out
        if message["role"] != "assistant" and not _is_in(message["content"], text):
            raise ValueError(
                f"has a {message['role']} message that the chat template leaves out: {message['content'][:80]!r}. The "
                "model would never see it. Change its role, or the template."
            )
    for tool in row.get("tools") or ():
        name = str(tool.get("function", tool).get("name", ""))
        if not _is_in(name, text):
            raise ValueError(
                f"has the tool {name[:80]!r} in 'tools', which the chat template leaves out. Write the tools into the "
                "system message, or use a template that knows tools."
            )
    for name in names:
        if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", template):
            _warn(f"chat_template_kwargs[{name!r}] has no effect: the chat template reads no such name.")


def check_calls(row: Mapping[str, Any], text: str, render: Callable[[Mapping[str, Any]], str]) -> None:
    """Raise `ValueError` where a row calls tools, and its rendered `text` is the same as without the calls."""
    if not any(message.get("tool_calls") for message in row["prompt"]):
        return
    without = [{name: value for name, value in message.items() if name != "tool_calls"} for message in row["prompt"]]
    try:
        same = render({**row, "prompt": without}) == text
    except Exception:  # whatever a template raises where a tool's result follows no call
        return
    if same:
        raise ValueError(
            "has 'tool_calls', which the chat template leaves out; some know them, and leave out one beside a content, be "
            "it an empty one. Write the calls into the contents of messages, or use a template that writes them."
        )


def warn_of_text(settings: Iterable[str]) -> None:
    """Warn, once for each, of `settings` of a run that have no effect on a prompt that is a text."""
    for name in settings:
        _warn(
            f"{name} has no effect on prompts that are texts: no chat template is used. Write the prompts as messages, or "
            "leave it out."
        )


def _warn(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        logger.warning("%s", text)


def _is_in(content: str, text: str) -> bool:
    """Whether a template has written a content, trimmed or with other quotes: all its words are there."""
    return content.strip() in text or all(word in text for word in set(re.findall(r"\w+", content)))
