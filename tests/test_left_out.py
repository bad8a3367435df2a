"""What a chat template leaves out of a prompt (camopd/left_out.py)."""

import logging

import pytest

from camopd import left_out
from camopd.messages import read_row, render, tokenize


USER = {"role": "user", "content": "How warm is it in Rome?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "get_weather", "arguments": {"place": "Rome"}}}]}  # fmt: skip
RESULT = {"role": "tool", "content": "31 degrees"}
CONTENTS = "{% for m in messages %}{{ m.content }}|{% endfor %}"
WITH_CALLS = (
    "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}|{% endfor %}"
)


@pytest.mark.parametrize(
    "tools", [None, [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]]
)
def test_call_of_a_tool_that_a_template_leaves_out_is_an_error(tokenizer, tools):
    """As of SmolLM2: the tool's result would follow an empty turn. The tool's own description has its name, too."""
    row = read_row({"prompt": [USER, CALL, RESULT, USER], **({"tools": tools} if tools else {})})
    head = "{{ tools | tojson if tools else '' }}"
    assert "get_weather" in render(row, tokenizer, chat_template=head + WITH_CALLS)
    with pytest.raises(ValueError, match=r"has 'tool_calls', which the chat template leaves out"):
        render(row, tokenizer, chat_template=head + CONTENTS)
    strict = "{% if not messages[1].tool_calls %}{{ raise_exception('no call') }}{% endif %}"
    assert render(row, tokenizer, chat_template=strict + head + WITH_CALLS)


@pytest.mark.parametrize(
    ("name", "template", "warned"),
    [
        ("thinking", "{% if enable_thinking %}t{% endif %}", True),  # a part of another name
        ("enable_thinking", "{% if enable_thinking is defined %}t{% endif %}", False),
        ("thinking", "{% if not thinking is defined %}{% set thinking = false %}{% endif %}", False),
    ],
)
def test_keyword_that_is_a_part_of_another_has_no_effect_and_is_warned_of(name, template, warned, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="camopd.left_out"):
        render(
            read_row({"prompt": [USER]}), tokenizer, chat_template=template + CONTENTS, template_kwargs={name: False}
        )
    assert [f"chat_template_kwargs['{name}'] has no effect" in record.getMessage() for record in caplog.records] == (
        [True] * warned
    )


def test_settings_for_the_template_are_warned_of_where_prompts_are_texts(tokenizer, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, logger="camopd.left_out"):
        for _ in range(2):
            left_out.warn_of_text(["of_this_test"])
    (record,) = caplog.records
    assert record.getMessage().startswith("of_this_test has no effect on prompts that are texts")
    told = []
    monkeypatch.setattr(left_out, "warn_of_text", told.append)
    text = read_row({"prompt": "a text"})
    tokenize(text, tokenizer, [print], None, {"enable_thinking": False})
    tokenize(text, tokenizer)
    tokenize(read_row({"prompt": [USER]}), tokenizer, template_kwargs={"of_no_template": 1})
    assert told == [["tools", "chat_template_kwargs"], []]
