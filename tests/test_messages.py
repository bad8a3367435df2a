"""What the model sees of a row is what the user wrote, through the chat template as transformers has it, or an error."""

import datetime
import json
import logging

import pytest
from conftest import make_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from camopd.messages import before_answer, read_row, render, tokenize
from camopd.prompts import PromptStream, named


TOKENIZER = make_tokenizer()
# Writes all it is given, with each message apart, as ChatML does; what is None would show.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}[{{ message.role }}|{{ message.content }}"
    "{% if message.tool_calls is defined %}|{{ message.tool_calls | tojson(sort_keys=true) }}{% endif %}"
    "{% if message.name is defined %}|{{ message.name }}{% endif %}]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant|{% if mood is defined %}{{ mood }}{% endif %}{% endif %}"
)
USER = {"role": "user", "content": "hello"}


def seen(row, **changes):
    return render(read_row(row), TOKENIZER, chat_template=TEMPLATE, **changes)


# --- properties: whatever form a conversation comes in, the model sees the same ------------------------------------

text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
shown = text.filter(str.strip)  # what a template that trims would not make nothing of
value = st.recursive(
    st.integers() | st.booleans() | text, lambda inner: st.dictionaries(text, inner, max_size=2), max_leaves=4
)


def make_call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def say(roles, content=shown, **more):
    return st.fixed_dictionaries({"role": st.sampled_from(roles), "content": content, **more})


calls = st.lists(st.builds(make_call, text, st.dictionaries(text, value, max_size=3)), min_size=1, max_size=2)
message = st.one_of(
    say(["user", "system", "assistant", "developer"]),
    say(["tool"], name=text),
    say(["assistant"], st.just(""), tool_calls=calls),
)
conversation = st.builds(lambda start, end: [*start, end], st.lists(message, max_size=4), say(["user"]))


def by_transformers(messages):
    return TOKENIZER.apply_chat_template(messages, chat_template=TEMPLATE, add_generation_prompt=True, tokenize=False)


def as_parts(messages):
    return [
        {**message, "content": [{"type": "text", "text": character} for character in message["content"]]}
        if message["content"]
        else {**message, "content": None}
        for message in messages
    ]


def with_none(messages):
    """As Arrow gives them back: every message has every key."""
    keys = sorted({"role", "content", "name", "tool_calls"}.union(*messages))
    return [{key: message.get(key) for key in keys} for message in messages]


FORMS = {
    "plain": lambda messages: messages,
    "json": json.dumps,
    "json with white space": lambda messages: f"\n {json.dumps(messages, indent=1, ensure_ascii=False)} ",
    "parts": as_parts,
    "keys of others": with_none,
    "parts in json": lambda messages: json.dumps(as_parts(messages)),
}


@settings(max_examples=60, deadline=None)
@given(conversation)
def test_model_sees_what_the_template_makes_of_the_messages_in_whatever_form_they_come(messages):
    expected = by_transformers(messages)
    for form, change in FORMS.items():
        assert seen({"prompt": change(messages)}) == expected, form
    assert read_row(read_row({"prompt": messages})) == read_row({"prompt": messages})


# What Arrow can hold: it knows no empty mapping, and one type for each argument.
plain_call = st.builds(make_call, text, st.dictionaries(st.sampled_from("abc"), text, min_size=1))
plain_message = say(["user", "system", "tool"]) | say(
    ["assistant"], st.just(""), tool_calls=st.lists(plain_call, min_size=1)
)
plain_conversation = st.builds(lambda start, end: [*start, end], st.lists(plain_message, max_size=2), say(["user"]))


@settings(max_examples=20, deadline=None)
@given(st.lists(plain_conversation, min_size=1, max_size=3))
def test_model_sees_the_same_after_a_dataset_has_held_the_rows(rows):
    dataset = Dataset.from_list([{"prompt": messages} for messages in rows])
    stream = PromptStream(dataset, "general", seed=0, shuffle=False)
    for messages, row in zip(rows, stream.draw(range(len(rows))), strict=True):
        assert render(row, TOKENIZER, chat_template=TEMPLATE) == by_transformers(messages)


@settings(max_examples=100, deadline=None)
@given(shown.filter(lambda text: text.strip()[0] not in "[{"))
def test_text_is_left_as_it_is(prompt):
    assert read_row({"prompt": prompt, "source": "x"}) == {"prompt": prompt, "source": "x"}
    assert tokenize(read_row({"prompt": prompt}), TOKENIZER) == TOKENIZER(prompt)["input_ids"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "system", "text", "hello", "human"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "from", "value", "tool_calls"]), inner),
    max_leaves=10,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(anything, st.sampled_from([None, "be kind"]), st.booleans())
def test_messages_of_any_other_form_are_read_or_refused_in_words_with_the_row(prompt, system, in_json):
    row = {"prompt": json.dumps(prompt) if in_json else prompt, "system": system, "row": "row 3 of branch 'x' (p.csv)"}
    try:
        found = named(read_row, row)
    except ValueError as error:
        assert str(error).startswith("row 3 of branch 'x' (p.csv) has ")
        return
    if isinstance(found["prompt"], str):
        assert found["prompt"] == row["prompt"]
    else:
        assert all(
            isinstance(message["content"], str) and isinstance(message["role"], str) for message in found["prompt"]
        )
        assert seen(found) == seen(row)


# --- the cases of the field, one by one ----------------------------------------------------------------------------


def test_prompt_that_ends_with_the_assistant_is_gone_on_with():
    row = {"prompt": [USER, {"role": "assistant", "content": "Sure, "}]}
    assert seen(row) == "[user|hello]\n[assistant|Sure, "
    own = make_tokenizer()
    expected = own.apply_chat_template(row["prompt"], continue_final_message=True)["input_ids"]
    assert tokenize(read_row(row), own) == expected


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"role": "assistant", "content": " "}, "ends with an empty assistant turn"),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}, "calls a tool"),
    ],
)
def test_assistant_turn_that_cannot_be_gone_on_with_is_refused(last, said):
    with pytest.raises(ValueError, match=said):
        read_row({"prompt": [USER, last]})


def test_sharegpt_turns_are_messages():
    senders = ["system", "human", "gpt", "user"]
    turns = [{"from": sender, "value": text} for sender, text in zip(senders, "sabc", strict=True)]
    assert [(m["role"], m["content"]) for m in read_row({"prompt": turns})["prompt"]] == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"message 0 from 'observation'; known are system, human"):
        read_row({"prompt": [{"from": "observation", "value": "a"}]})


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "no prompt"), ("", "no prompt"), ([], "no prompt"), ("  \n", r"the prompt '  \\n'"), (7, "the prompt '7'"),
        (["hello"], "'hello' in place of message 0"),
        ([{"role": "user", "content": None}], "no content in message 0"),
        ([{"role": "user"}], "no content in message 0"),
        ([{"role": "user", "content": []}], "no content in message 0"),
        ([{"role": "user", "content": 7}], "the content '7' in message 0"),
        ([{"content": "hello"}], "no role in message 0"),
        ([USER, {"role": "narrator", "content": "x"}], "the role 'narrator' in message 1 .* system, developer, user"),
        ([{"role": "user", "content": " "}], "messages without any text"),
        ([{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}], "type 'image' in message 0 .*images are"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}], "type 'image_url'"),
        ("[{'role': 'user', 'content': 'hello'}]", "seems to be messages, but is not JSON .*json.dumps"),
        ('[{"role": "user", "content": "hel', "seems to be messages, but is not JSON"),
        ('{"role": "user", "content": "hello"}', "an object in JSON. A conversation is a list"),
        ('{"messages": [{"role": "user", "content": "hello"}]}', "an object in JSON"),
    ],
)  # fmt: skip
def test_values_that_are_not_prompts_are_refused_with_what_they_are(prompt, said):
    with pytest.raises(ValueError, match=f"^has .*{said}"):
        read_row({"prompt": prompt})


@pytest.mark.parametrize(
    "prompt", ['[{"a": 1}]', "[1, 2, 3] sorted?", "{not json", "[]", '{"key": "value"}', "[x](y)"]
)
def test_texts_that_are_json_or_like_it_but_no_messages_stay_texts(prompt):
    assert read_row({"prompt": prompt}) == {"prompt": prompt}


def test_column_system_becomes_the_first_message():
    assert seen({"prompt": [USER], "system": "be kind"}) == "[system|be kind]\n[user|hello]\n[assistant|"
    both = [{"role": "system", "content": "be kind"}, USER]
    assert read_row({"prompt": both, "system": "be kind"})["prompt"] == both
    with pytest.raises(ValueError, match=r"two system messages: 'be rude' in the column 'system', and 'be kind'"):
        read_row({"prompt": both, "system": "be rude"})
    with pytest.raises(ValueError, match=r"'system', but its prompt is a text.*no effect.*leave the column out"):
        read_row({"prompt": "hello", "system": "be kind"})
    for nothing in (None, "", " "):
        assert read_row({"prompt": "hello", "system": nothing}) == {"prompt": "hello"}


@pytest.mark.parametrize("tools", [[{"type": "function", "function": {"name": "look_up"}}], [{"name": "look_up"}]])
@pytest.mark.parametrize("form", [lambda x: x, json.dumps, lambda x: [json.dumps(tool) for tool in x]])
def test_row_brings_tools_and_template_arguments_of_its_own(tools, form):
    row = {"prompt": [USER], "tools": form(tools), "chat_template_kwargs": {"mood": "kind", "other": None}}
    assert seen(row) == f"{json.dumps(tools)}[user|hello]\n[assistant|kind"
    assert seen({**row, "tools": None}, template_kwargs={"mood": "rude"}) == "[user|hello]\n[assistant|kind"
    assert seen({"prompt": [USER]}, template_kwargs={"mood": "rude"}) == "[user|hello]\n[assistant|rude"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tools": "look_up"}, "'tools' that are not JSON"),
        ({"tools": [7]}, "'tools' that are not a list of JSON schemas"),
        ({"tools": {"name": "f"}}, "'tools' that are not a list of JSON schemas"),
        ({"chat_template_kwargs": "no"}, "'chat_template_kwargs' that are not a mapping: 'no'"),
        (
            {"chat_template_kwargs": {"add_generation_prompt": False}},
            "'add_generation_prompt' in 'chat_template_kwargs'",
        ),
    ],
)
def test_tools_and_template_arguments_that_cannot_be_used_are_refused(more, said):
    with pytest.raises(ValueError, match=said):
        read_row({"prompt": [USER], **more})


def test_tools_and_template_arguments_of_a_text_are_refused():
    with pytest.raises(ValueError, match=r"'tools' and 'chat_template_kwargs', but its prompt is a text"):
        read_row({"prompt": "hello", "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "kind"}})


def test_message_or_tool_that_the_template_leaves_out_is_refused(tokenizer):
    knows_users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    row = read_row({"prompt": [{"role": "developer", "content": "be kind"}, USER]})
    with pytest.raises(ValueError, match=r"has a developer message that the chat template leaves out: 'be kind'"):
        render(row, tokenizer, chat_template=knows_users)
    with pytest.raises(ValueError, match=r"has the tool 'look_up' in 'tools', which the chat template leaves out"):
        render(read_row({"prompt": [USER], "tools": [{"name": "look_up"}]}), tokenizer)
    with pytest.raises(ValueError, match="the chat template makes an empty prompt"):
        render(read_row({"prompt": [USER]}), tokenizer, chat_template="{{ '' }}")


def test_template_that_raises_is_quoted_with_the_roles(tokenizer):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"template says: TemplateError: roles must alternate. Roles: user, user"):
        render(read_row({"prompt": [USER, USER]}), tokenizer, chat_template=template)


def test_template_may_trim_quote_and_leave_the_thoughts_of_the_assistant_out(tokenizer):
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim | tojson }}{% endfor %}"
    prompt = [
        {"role": "user", "content": ' say "é"\n\tand ünd '},
        {"role": "assistant", "content": "<think>unseen</think> yes"},
        {"role": "user", "content": "go"},
    ]
    assert "unseen" not in render(read_row({"prompt": prompt}), tokenizer, chat_template=template)


def test_template_argument_that_no_template_reads_is_warned_about(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="camopd.left_out"):
        for _ in range(2):
            render(read_row({"prompt": [USER], "chat_template_kwargs": {"never_read": 1}}), tokenizer)
    assert [record.getMessage() for record in caplog.records] == [
        "chat_template_kwargs['never_read'] has no effect: the chat template reads no such name."
    ]


def test_template_argument_of_the_run_that_no_template_reads_is_warned_about(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="camopd.left_out"):
        render(read_row({"prompt": [USER]}), tokenizer, template_kwargs={"mistyped": False})
        template = "{% if known %}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
        render(read_row({"prompt": [USER]}), tokenizer, chat_template=template, template_kwargs={"known": 1})
    assert ["mistyped" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chat_template_kwargs": {"day": datetime.date(2026, 1, 1)}},
        {"prompt": [USER], "tools": [{"name": "f", "since": [datetime.datetime(2026, 1, 1)]}]},
    ],
)
def test_date_that_transformers_would_write_as_its_type_is_refused(row):
    assert read_row({"prompt": [{**USER, "sent": datetime.date(2026, 1, 1)}]})  # which no template reads
    with pytest.raises(ValueError, match=r"has datetime.*2026.* gives the type alone. Write a text"):
        read_row(row)


def test_tools_of_the_trainer_and_what_does_not_go_with_them_is_refused(tokenizer):
    goes_on = {"prompt": [USER, {"role": "assistant", "content": "a"}]}
    for row in ({"prompt": [USER], "tools": [{"name": "f"}]}, goes_on):
        with pytest.raises(ValueError, match="cannot be used together with the `tools` of the trainer"):
            render(read_row(row), tokenizer, [print])


def test_text_without_a_token_is_refused(tokenizer):
    class Silent:
        def __call__(self, **_):
            return {"input_ids": []}

    with pytest.raises(ValueError, match="the tokenizer makes no token"):
        tokenize({"prompt": "\u200b"}, Silent())


def test_answer_is_left_out_of_json_and_sharegpt_too():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "the answer"}]
    assert before_answer(turns) == before_answer(json.dumps(turns)) == turns[:1]
    messages = [USER, {"role": "assistant", "content": "the answer"}]
    assert before_answer(json.dumps(messages)) == [USER]
    assert before_answer("a text") == "a text"
