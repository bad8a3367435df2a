"""CoSER: read as a stream, the longest conversations reserved, cut where an assistant turn follows."""

import json
import tracemalloc

import pytest
from data_rows import CHARACTER, START, talk

from camopd.data import coser
from camopd.data.coser import build_roleplay, stream_list
from camopd.errors import DataError
from camopd.files import json_lines


ENVIRONMENT = "You are a world model for a role-playing game. Your task is to provide the environmental feedback: ..."
NEXT = "Your task is to predict the next speaker for a role-playing game. That is, ..."


@pytest.fixture
def make(tmp_path):
    def make(conversations, limit=1, seed=0, out="out", **options):
        path = tmp_path / "sft_conversations_sharegpt.json"
        path.write_text(conversations if isinstance(conversations, str) else json.dumps(conversations))
        build_roleplay(tmp_path / out, limit, seed, {"coser": str(path)}, "camopd data roleplay", **options)
        prompts, sft = (
            [json.loads(line) for line in json_lines((tmp_path / out / name).read_text())]
            for name in ("prompts.jsonl", "sft.jsonl")
        )
        return prompts, sft, (tmp_path / out / "README.md").read_text()

    return make


def ids(rows):
    return {row["id"] for row in rows}


def test_conversations_that_are_longest_are_prompts_and_the_rest_is_for_fine_tuning(make):
    prompts, sft, card = make([talk(n) for n in (5, 9, 3, 7, 11)], limit=2)
    assert ids(prompts) == {"coser-1", "coser-4"}
    assert ids(sft) == {"coser-0", "coser-2", "coser-3"}
    assert all(list(row) == ["prompt", "category", "source", "id"] for row in prompts)
    assert all(list(row) == ["messages", "category", "source", "id"] for row in sft)
    assert "| prompts | 5 | 2 |" in card
    assert "| sft | 5 | 3 | reserved as prompts: 2 |" in card
    assert "with 9 to 11 messages" in card


def test_length_counts_messages_but_the_systems_and_ties_go_to_the_first_in_the_file(make):
    without = {"conversations": talk(6)["conversations"][1:]}  # 6 messages with no system: more than 5 with one
    prompts, _, _ = make([talk(5), without, talk(6), talk(6)], limit=2)
    assert ids(prompts) == {"coser-1", "coser-2"}


@pytest.mark.parametrize("last", ["human", "assistant"])
def test_prompt_ends_with_the_last_human_turn_before_the_last_assistant_turn(make, last):
    conversation = talk(7, last=last)
    prompts, _, _ = make([conversation])
    turns = conversation["conversations"]
    end = len(turns) - (2 if last == "human" else 1)  # where the last assistant turn is behind
    assert [message["content"] for message in prompts[0]["prompt"]] == [turn["value"] for turn in turns[:end]]
    assert prompts[0]["prompt"][-1]["role"] == "user"
    assert prompts[0]["prompt"][0] == {"role": "system", "content": CHARACTER}


def test_assistant_turns_in_a_row_are_both_left_to_the_student(make):
    conversation = talk(4, last="assistant")
    conversation["conversations"].append({"from": "assistant", "value": "Anna: more"})
    prompts, _, _ = make([conversation])
    assert prompts[0]["prompt"][-1]["role"] == "user"
    assert len(prompts[0]["prompt"]) == 4


def test_first_turn_may_be_the_start_sign_alone_and_texts_keep_their_blank_lines(make):
    prompts, sft, _ = make([talk(2, last="assistant"), talk(1, last="assistant")])
    assert prompts[0]["prompt"][-1] == {"role": "user", "content": START}
    assert sft[0]["messages"][-1]["content"].endswith("\n\n")


def test_user_and_gpt_are_human_and_assistant(make):
    prompts, sft, _ = make([talk(5, roles=("user", "gpt")), talk(3, roles=("user", "gpt"))])
    assert [message["role"] for message in prompts[0]["prompt"]][-2:] == ["assistant", "user"]
    assert {message["role"] for message in sft[0]["messages"]} == {"system", "user", "assistant"}


def test_next_speaker_conversations_are_for_fine_tuning_only_unless_asked_for(make):
    conversations = [talk(11, NEXT), talk(9, ENVIRONMENT), talk(7), talk(5)]
    prompts, sft, card = make(conversations, limit=2)
    assert {row["id"]: row["category"] for row in prompts} == {"coser-1": "environment", "coser-2": "character"}
    assert {row["id"]: row["category"] for row in sft} == {"coser-0": "next_speaker", "coser-3": "character"}
    assert "assistant names the next speaker (stays in sft): 1" in card
    prompts, _, _ = make(conversations, limit=2, out="with", next_speaker=True)
    assert ids(prompts) == {"coser-0", "coser-1"}


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}]}, "no assistant turn"),
        ({"conversations": []}, "no assistant turn"),
        ({"conversations": "text"}, "no list of turns"),
        ({"conversations": ["text"]}, "no list of turns"),
        ({"conversations": [*talk(20)["conversations"], {"from": "narrator", "value": "x"}]},
         "a role that is none of system, human, user, assistant, gpt"),
        ({"conversations": [*talk(20)["conversations"], {"value": "x"}]}, "a role that is none of"),
        ({"conversations": [*talk(20)["conversations"], {"from": "gpt", "value": " \n"}]}, "a turn without text"),
        ({"conversations": [*talk(20)["conversations"], {"from": "gpt", "value": None}]}, "a turn without text"),
        ({"conversations": [*talk(20)["conversations"], {"from": "system", "value": "s"}]}, "a system message"),
    ],
)  # fmt: skip
def test_conversation_that_is_none_is_in_neither_file_and_counted(make, conversation, reason):
    prompts, sft, card = make([conversation, talk(5), talk(3)])
    assert (ids(prompts), ids(sft)) == ({"coser-1"}, {"coser-2"})
    assert reason in card.split("| prompts |")[1]


def test_system_beside_the_turns_is_the_first_message(make):
    plain, known = talk(7), talk(9)
    first = {**plain, "system": "You are Anna.", "conversations": plain["conversations"][1:]}
    same = {**known, "system": known["conversations"][0]["value"]}
    prompts, sft, card = make(
        [first, same, {**talk(11), "system": "Another."}, {**talk(11), "tools": "[]"}, talk(5)], limit=2
    )
    found = {row["id"]: row["prompt"] for row in prompts}
    assert found["coser-0"][0] == {"role": "system", "content": "You are Anna."}
    assert [message["role"] for message in found["coser-1"][:2]] == ["system", "user"]
    assert ids(prompts) | ids(sft) == {"coser-0", "coser-1", "coser-4"}
    assert "a system message that is not the first: 1" in card
    assert "tools, which the messages do not name: 1" in card


def test_conversation_that_opens_with_its_only_assistant_turn_is_no_prompt(make):
    opening = {"conversations": [{"from": "system", "value": "s"}, {"from": "assistant", "value": "a"},
                                 *({"from": "human", "value": f"h{n}"} for n in range(9))]}  # fmt: skip
    prompts, sft, card = make([opening, talk(3)])
    assert (ids(prompts), ids(sft)) == ({"coser-1"}, {"coser-0"})
    assert "no human turn before the last assistant turn (stays in sft): 1" in card


def test_long_prompt_keeps_the_system_message_and_loses_its_oldest_turns(make):
    conversation = talk(9)
    for turn in conversation["conversations"][1:]:
        turn["value"] = f"{turn['value']}{'x' * 4000}"
    prompts, _, card = make([conversation, talk(3)])
    contents = [message["content"] for message in prompts[0]["prompt"]]
    assert contents[0] == CHARACTER
    assert [message["role"] for message in prompts[0]["prompt"]] == ["system", "user", "assistant", "user"]
    assert (
        contents[-1]
        == conversation["conversations"][-2 if conversation["conversations"][-1]["from"] == "assistant" else -3][
            "value"
        ]
    )
    assert "oldest turns left out, for length: 1" in card


def test_prompt_too_long_without_its_oldest_turns_gives_its_place_to_the_next(make):
    prompts, sft, card = make([talk(9, CHARACTER + "x" * 20_000), talk(3)])
    assert (ids(prompts), ids(sft)) == ({"coser-1"}, {"coser-0"})
    assert "too long even without its oldest turns (stays in sft): 1" in card


def test_order_hangs_on_the_seed_and_the_choice_does_not(make, tmp_path):
    conversations = [talk(n) for n in range(2, 60)]
    first, _, _ = make(conversations, 20, out="a")
    make(conversations, 20, out="b")
    for name in ("prompts.jsonl", "sft.jsonl", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other, _, _ = make(conversations, 20, out="c", seed=1)
    assert ids(other) == ids(first)
    assert other != first


def test_conversations_that_are_too_few_are_an_error_with_the_counts(make, tmp_path):
    with pytest.raises(
        DataError, match=r"prompts has 1 prompt, and 3 are wanted\. Dropped of 2 rows:\n    assistant names the next"
    ):
        make([talk(5), talk(9, NEXT)], limit=3)
    assert [path.name for path in tmp_path.iterdir()] == ["sft_conversations_sharegpt.json"]


def test_card_loads_both_files(make, tmp_path):
    from datasets import load_dataset

    make([talk(n) for n in range(3, 9)], 2)
    assert load_dataset(str(tmp_path / "out"), split="train").num_rows == 2  # prompts, by default
    assert load_dataset(str(tmp_path / "out"), "sft", split="train").column_names == [
        "messages",
        "category",
        "source",
        "id",
    ]


# --- the file ------------------------------------------------------------------------------------------------------


def test_rows_of_another_form_are_an_error_with_the_row_and_its_columns(make):
    with pytest.raises(
        DataError, match=r"row 1 of '.*' has no column 'conversations', only \['messages'\]\. Give train/sft_conv"
    ):
        make([talk(3), {"messages": []}])
    with pytest.raises(DataError, match=r"row 0 of '.*' has no column 'conversations', only str"):
        make(["text"])


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
def test_list_is_read_in_chunks_of_any_size(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(coser, "CHUNK", chunk)
    elements = [{"a": 'quo"te, ] } \\', "b": ["é", "\U0001f600", {}]}, {}, [], "text", {"n": 1.5, "t": True}]
    path = tmp_path / "list.json"
    for layout in ({}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}):
        path.write_text(f" \n{json.dumps(elements, **layout)}\n", encoding="utf-8")
        assert list(stream_list(path)) == elements
    path.write_text("[ ]")
    assert list(stream_list(path)) == []
    path.write_text("[{}]", encoding="utf-8-sig")  # with a byte order mark
    assert list(stream_list(path)) == [{}]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it begins with ''"), ("[", "parse error: premature EOF, after element 0"),
        ('[{"a": 1}', "parse error: premature EOF, after element 1"), ('[{"a": 1}, ', "parse error: premature EOF"),
        ('{"a": 1}', r"it begins with '\{\"a\": 1\}'"), ('[{"a": 1} {}]', "parse error: after array element.*element 1"),
        ('[{"a": 1', "parse error: premature EOF, after element 0"), ('[{"a" 1}]', "parse error: .*separated by a colon"),
        ('[{"a": NaN}]', "lexical error: invalid char in json text, after element 0"),
        ("version https://git-lfs.github.com/spec/v1", "it begins with 'version https://git-'"),
    ],
)  # fmt: skip
def test_file_that_is_no_list_is_an_error_with_the_place(tmp_path, text, why):
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"list\.json' is not a JSON list: {why}(.|\n)*Check the download"):
        list(stream_list(path))


def test_bytes_that_are_no_utf_8_are_an_error(tmp_path):
    (tmp_path / "list.json").write_bytes(b'[{"a": "\xff\xfe"}]')
    with pytest.raises(
        DataError, match=r"list\.json' is not a JSON list: .*invalid bytes in UTF8 string, after element 0"
    ):
        list(stream_list(tmp_path / "list.json"))


def test_folder_is_searched_for_the_file_and_its_licence(tmp_path):
    (tmp_path / "copy" / "train").mkdir(parents=True)
    (tmp_path / "copy" / "README.md").write_text("---\nlicense: mit\n---\n# CoSER\n")
    with pytest.raises(
        ValueError, match=r"--source coser='.*copy': there is no file '.*train/sft_conversations_sharegpt\.json'"
    ):
        build_roleplay(tmp_path / "out", 1, 0, {"coser": str(tmp_path / "copy")})
    (tmp_path / "copy" / coser.FILE).write_text(json.dumps([talk(3)]))
    build_roleplay(tmp_path / "out", 1, 0, {"coser": str(tmp_path / "copy")})
    assert "| the local copy 'copy' | mit |" in (tmp_path / "out" / "README.md").read_text()


def test_element_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(coser, "CHUNK", 1000)
    monkeypatch.setattr(coser, "LONGEST", 10_000)
    path = tmp_path / "list.json"
    path.write_text('[{"a": 1}, {"a": "' + "x" * 10_000_000)
    elements = stream_list(path)
    assert next(elements) == {"a": 1}
    tracemalloc.start()
    with pytest.raises(DataError, match=r"is not a JSON list: an element of more than 10,000 bytes, after element 1"):
        next(elements)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_list_behind_many_blanks_is_read(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(" \n" * 500 + '[{"a": 1}]')
    assert list(stream_list(path)) == [{"a": 1}]
