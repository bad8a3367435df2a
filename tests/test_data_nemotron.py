"""General prompts of Nemotron: proportions, sampling, and one test for each trap of its rows."""

import functools
import io
import json
from collections import Counter
from pathlib import Path

import pytest
from data_rows import FEATURES, a_call, code, raw, tool, turn
from datasets import Dataset, load_dataset

from camopd.data import sampling
from camopd.data.nemotron import ROWS, build_general
from camopd.data.sampling import largest_remainder, normalise
from camopd.errors import DataError
from camopd.files import json_lines


NAMES = {split: split.removesuffix("_calling") for split in ROWS}  # the files of tool_calling are called tool-*


def parquet(rows) -> bytes:
    file = io.BytesIO()
    Dataset.from_list(rows, features=FEATURES).to_parquet(file)
    return file.getvalue()


@functools.cache  # they are the same in most builds, and take as long as one
def usual(split, shard, shards) -> bytes:
    rows = [tool(n) if split == "tool_calling" else raw(split, n) for n in range(150)]
    return parquet(rows[shard::shards])


@pytest.fixture
def make(tmp_path):
    """Write a copy of the dataset and of the questions, build from it, and return rows and card."""

    def make(limit=100, seed=0, out="out", questions=None, shards=1, **splits):
        folder = tmp_path / "nemotron" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        assert splits.keys() <= ROWS.keys()
        for split in ROWS:
            for shard in range(shards):
                content = parquet(splits[split][shard::shards]) if split in splits else usual(split, shard, shards)
                (folder / f"{NAMES[split]}-{shard:05}-of-{shards:05}.parquet").write_bytes(content)
        sources = {"nemotron": str(tmp_path / "nemotron"), "code_contests": "none", "codeforces": "none"}
        for name, rows in (questions or {}).items():
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            sources[name] = str(path)
        build_general(tmp_path / out, limit, seed, sources, "camopd data general")
        return read(tmp_path / out)

    return make


def read(folder: Path):
    rows = [json.loads(line) for line in json_lines((folder / "prompts.jsonl").read_text())]
    return rows, (folder / "README.md").read_text()


def users(rows, category):
    return {row["prompt"][-1]["content"] for row in rows if row["category"] == category}


def test_proportions_are_the_official_ones_by_largest_remainder():
    assert largest_remainder(ROWS, 10_000) == {
        "chat": 291,
        "code": 739,
        "math": 797,
        "stem": 8052,
        "tool_calling": 121,
    }
    assert sum(ROWS.values()) == 25_659_642
    for total in (1, 2, 7, 99, 1234):
        assert sum(largest_remainder(ROWS, total).values()) == total


def test_rows_are_prompts_with_category_source_and_id(make):
    rows, card = make(limit=100)
    assert Counter(row["category"] for row in rows) == largest_remainder(ROWS, 100)
    assert all(list(row) == ["prompt", "category", "source", "id"] for row in rows)
    assert {row["source"] for row in rows} == {"nvidia/Nemotron-Post-Training-Dataset-v1"}
    row = next(row for row in rows if row["category"] == "stem")
    number = row["id"].removeprefix("stem-uuid-")
    assert row["prompt"] == [{"role": "user", "content": f"stem question {number}"}]  # and no answer
    assert "| stem | 150 | 81 | - | - |" in card
    assert "seed 0" in card


def test_build_loads_as_a_prompt_dataset(make, tmp_path):
    from camopd.files import load_prompts

    make(limit=100)
    loaded = load_prompts(str(tmp_path / "out" / "prompts.jsonl"), "general")
    assert len(loaded) == 100
    assert load_dataset(str(tmp_path / "out"), split="train")[0]["prompt"]  # the card names the file


def test_seed_gives_the_same_rows_in_any_order_of_the_files(make, tmp_path):
    first, _ = make(limit=50, out="first")
    make(limit=50, out="again")
    assert (tmp_path / "first" / "prompts.jsonl").read_bytes() == (tmp_path / "again" / "prompts.jsonl").read_bytes()
    assert (tmp_path / "first" / "README.md").read_bytes() == (tmp_path / "again" / "README.md").read_bytes()
    other, _ = make(limit=50, out="other", seed=1)
    assert {row["id"] for row in other} != {row["id"] for row in first}
    for file in (tmp_path / "nemotron" / "data").iterdir():
        file.unlink()
    sharded, _ = make(limit=50, out="sharded", shards=3)
    assert sharded == first


def test_sample_is_uniform_over_the_stream(make):
    """30 of 150 rows, 40 seeds: a third of the stream gets a third of the draws (400, standard deviation 15)."""
    thirds = Counter()
    for seed in range(40):
        numbers = sorted(range(150), key=lambda n: sampling.priority(f"stem question {n}", seed))[:30]
        thirds.update(number // 50 for number in numbers)
    assert all(340 < thirds[third] < 460 for third in range(3)), thirds


def test_prompt_ends_before_the_final_assistant_turn(make):
    turns = [turn("user", "one"), turn("assistant", "two"), turn("user", "three"), turn("assistant", "gold")]
    rows, _ = make(limit=1, stem=[raw("stem", 0, *turns)])
    assert [message["content"] for message in rows[0]["prompt"]] == ["one", "two", "three"]


def test_row_with_no_assistant_turn_is_dropped_and_counted(make):
    rows, card = make(limit=2, stem=[raw("stem", 0, turn("user", "alone")), *(raw("stem", n) for n in (1, 2))])
    assert users(rows, "stem") == {"stem question 1", "stem question 2"}
    assert "no assistant turn: 1" in card


def test_row_that_begins_with_the_answer_is_dropped_and_counted(make):
    rows, card = make(limit=1, stem=[raw("stem", 0, turn("assistant", "gold")), raw("stem", 1)])
    assert users(rows, "stem") == {"stem question 1"}
    assert "no user turn before the last assistant turn: 1" in card


def test_code_rows_get_their_question_from_the_dataset_of_their_metadata(make):
    contests = [{"description": f"contest {n}", "solutions": "x"} for n in range(20)]
    forces = [
        {"description": f"force {n}", "input_format": "in", "output_format": "", "note": None, "title": "t",
         "examples": [{"input": "1", "output": "2"}]} for n in range(20)
    ]  # fmt: skip
    rows, card = make(
        limit=60, code=[*(code(n) for n in range(3)), *(code(n + 3, "open-r1/codeforces", index=n) for n in range(2))],
        questions={"code_contests": contests, "codeforces": forces},
    )  # fmt: skip
    texts = users(rows, "code")
    assert largest_remainder(ROWS, 60)["code"] == len(texts) == 4
    assert texts < {
        "contest 0", "contest 1", "contest 2",
        *(f"force {n}\n\nInput\n\nin\n\nExample input\n\n1\n\nExample output\n\n2" for n in range(2)),
    }  # fmt: skip
    assert all([message["role"] for message in row["prompt"]] == ["user"] for row in rows if row["category"] == "code")
    assert 'user text "-" looked up: 4' in card
    assert "| [deepmind/code_contests]" in card
    assert all("reference" not in row for row in rows)


def test_code_questions_come_from_the_split_that_the_metadata_name(make, tmp_path):
    folder = tmp_path / "contests"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / "0.jsonl").write_text(
            "".join(json.dumps({"description": f"{split} {n}"}) + "\n" for n in range(5))
        )
    rows = [code(0, split="test", index=3), code(1, split="train", index=3)]
    make(limit=1, code=rows, out="ignored")
    sources = {"code_contests": str(folder), "codeforces": "none", "nemotron": str(tmp_path / "nemotron")}
    build_general(tmp_path / "out2", 30, 0, sources)
    texts = users(read(tmp_path / "out2")[0], "code")
    assert texts == {"test 3", "train 3"}


def test_question_that_is_found_twice_is_one_prompt(make):
    contests = [{"description": text} for text in ("one", "ONE ", "two", "chat question 0")]
    rows, card = make(
        limit=30, code=[code(n) for n in range(4)], chat=[raw("chat", 0)], questions={"code_contests": contests}
    )
    texts = [normalise(text) for text in users(rows, "code")]
    assert len(texts) == 2
    assert set(texts) <= {"one", "two", "chat question 0"}
    for seed in range(1, 6):
        rows, more = make(
            limit=30,
            code=[code(n) for n in range(3)],
            seed=seed,
            out=f"out{seed}",
            questions={"code_contests": contests},
        )
        assert {normalise(text) for text in users(rows, "code")} == {"one", "two"}
        card += more
    assert "duplicate of a row that is kept: 1" in card


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (code(0, "taco"), 'user text "-", and no copy of taco to look it up: 1'),
        (code(0, "elsewhere"), 'user text "-", and no copy of elsewhere to look it up: 1'),
        (raw("code", 0, turn("user", "-"), turn("assistant", "a"), metadata="{}"),
         'user text "-", and no question named in the metadata: 1'),
        (raw("code", 0, turn("user", "-"), turn("assistant", "a"), metadata="no json"),
         'user text "-", and no question named in the metadata: 1'),
        (code(0, index=77), 'user text "-", and no such question in the dataset it names: 1'),
        (code(0, index=1), 'user text "-", and no such question in the dataset it names: 1'),  # it has an empty one
    ],
)  # fmt: skip
def test_code_rows_whose_question_cannot_be_had_are_resampled_within_the_category(make, row, reason):
    cards = ""
    for seed in range(5):  # in some of them it is drawn before the others
        rows, card = make(
            limit=30, code=[row, *(raw("code", n) for n in range(1, 3))], seed=seed, out=f"out{seed}",
            questions={"code_contests": [{"description": "zero"}, {"description": ""}]},
        )  # fmt: skip
        assert users(rows, "code") == {"code question 1", "code question 2"}
        cards += card
    assert reason in cards


def test_placeholder_is_never_a_prompt(make):
    for split in ("chat", "stem"):
        for number, text in enumerate(("", "-", " \n")):
            held_back = raw(split, 0, turn("user", text), turn("assistant", "a"))
            rows, card = make(
                limit=60, out=f"{split}{number}", **{split: [held_back, *(raw(split, n) for n in range(1, 60))]}
            )
            assert f"{split}-uuid-0" not in {row["id"] for row in rows}
            assert "user text left out of the dataset: 1" in card


def test_duplicates_on_normalised_user_text_are_removed_before_sampling(make):
    same = ["What is a  mole?", "what is a mole?", "What is a mole?\n", "What is a mol\uff45?"]  # case, space, NFKC
    stem = [raw("stem", n, turn("user", text), turn("assistant", f"a{n}")) for n, text in enumerate(same)]
    rows, card = make(limit=2, stem=[*stem, raw("stem", 9)])
    assert {row["id"] for row in rows} == {"stem-uuid-0", "stem-uuid-9"}  # the first of them stands for all
    assert "duplicate of a row that is kept: 3" in card


def test_text_repeated_a_thousand_times_is_drawn_no_more_often_than_another(make):
    """Duplicates go before sampling: 1000 copies of one text among 150 others are 1 of 151 texts."""
    copies = [raw("stem", n + 1000, turn("user", "again"), turn("assistant", "a")) for n in range(1000)]
    drawn = sum(
        sampling.priority("again", seed)
        < sorted(sampling.priority(f"stem question {n}", seed) for n in range(150))[14]
        for seed in range(100)
    )  # of 15 drawn
    assert 2 <= drawn <= 22  # 10 expected
    rows, _ = make(limit=10, stem=[*copies, *(raw("stem", n) for n in range(150))])
    assert sum(row["prompt"][0]["content"] == "again" for row in rows) <= 1


def test_text_of_one_category_is_not_drawn_again_in_another(make):
    shared = [raw("math", n, turn("user", f"stem question {n}"), turn("assistant", "a")) for n in range(150)]
    rows, _ = make(limit=100, math=shared, stem=[*(raw("stem", n) for n in range(150))])
    texts = [row["prompt"][-1]["content"] for row in rows]
    assert len(set(texts)) == 100


def test_tools_of_the_metadata_stand_in_the_system_message(make):
    rows, _ = make(limit=100)
    row = next(row for row in rows if row["category"] == "tool_calling")
    assert row["prompt"][0]["role"] == "system"
    assert '{"type": "function", "name": "weather"}' in row["prompt"][0]["content"]


def test_tool_calls_and_results_before_the_final_turn_are_kept(make):
    turns = [turn("system", "Be brief."), turn("user", "Weather?"), turn("assistant", None, [a_call()]),
             turn("tool", "rain"), turn("assistant", "It rains.")]  # fmt: skip
    rows, _ = make(limit=100, tool_calling=[tool(0, *turns)])
    prompt = next(row for row in rows if row["category"] == "tool_calling")["prompt"]
    assert [message["role"] for message in prompt] == ["system", "user", "assistant", "tool"]
    assert prompt[0]["content"].startswith("Be brief.\n\nYou can call these tools:\n")
    assert prompt[2] == {"role": "assistant", "content": "", "tool_calls": [a_call()]}
    assert "tool_calls" in rows[0]["prompt"][2]  # the first row tells datasets that there are calls


@pytest.mark.parametrize("metadata", ["{}", "", None, "no json", '{"tools": []}', '{"tools": "weather"}', "[1]"])
def test_tool_row_without_tools_is_dropped_and_counted(make, metadata):
    rows, card = make(limit=100, tool_calling=[raw("tool_calling", 5, metadata=metadata), tool(6)])
    assert {row["id"] for row in rows if row["category"] == "tool_calling"} == {"tool_calling-uuid-6"}
    assert "no tools in the metadata: 1" in card


def test_long_conversation_loses_its_oldest_turns_and_a_long_question_is_dropped(make):
    long = "x" * 10_000
    turns = [
        turn("system", "S"),
        turn("user", long),
        turn("assistant", "a"),
        turn("user", long),
        turn("assistant", "b"),
    ]
    rows, card = make(limit=1, stem=[
        raw("stem", 0, *turns), raw("stem", 1, turn("user", long * 2), turn("assistant", "a"))
    ])  # fmt: skip
    assert [message["content"] for message in rows[0]["prompt"]] == ["S", long]
    assert "too long: 1" in card
    assert "oldest turns left out, for length: 1" in card


def test_reasoning_flag_makes_no_other_prompt(make):
    pair = [
        raw("stem", n, turn("user", "same"), turn("assistant", "a"), reasoning=flag)
        for n, flag in enumerate(("on", "off"))
    ]
    rows, card = make(limit=1, stem=pair)
    assert len(rows) == 1
    assert "duplicate of a row that is kept: 1" in card


def test_rows_that_are_too_few_are_an_error_with_the_counts(make, tmp_path):
    with pytest.raises(
        DataError, match=r"stem has 1 prompt, and 8 are wanted. Dropped of 2 rows:\n    no assistant turn: 1"
    ):
        make(limit=10, stem=[raw("stem", 0), raw("stem", 1, turn("user", "alone"))])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nemotron"]


def test_prompt_set_that_is_too_long_throughout_is_an_error(make):
    with pytest.raises(DataError, match=r"stem has 0 prompts, and 1 are wanted. Dropped of 1 row:\n    too long: 1"):
        make(limit=1, stem=[raw("stem", 0, turn("user", "x" * 20_000), turn("assistant", "a"))])


def test_id_that_comes_twice_is_an_error_with_its_row(make, tmp_path):
    with pytest.raises(
        DataError, match=r"the id 'stem-uuid-5' comes twice, the second time in row \d of prompts\.jsonl"
    ):
        make(limit=2, stem=[raw("stem", 5), {**raw("stem", 6), "uuid": "stem-uuid-5"}])
    assert not (tmp_path / "out").exists()


def test_missing_column_is_named_with_those_that_are_there(make, tmp_path):
    make(limit=1)
    file = tmp_path / "nemotron" / "data" / "stem-00000-of-00001.parquet"
    Dataset.from_list([raw("stem", 0)], features=FEATURES).rename_column("messages", "turns").to_parquet(file)
    with pytest.raises(
        DataError, match=r"Nemotron.* has no column 'messages' in the first row, only \['category', .*'turns'"
    ):
        build_general(tmp_path / "out3", 1, 0, {"nemotron": str(tmp_path / "nemotron")})
    assert not (tmp_path / "out3").exists()


def test_file_in_place_of_the_folder_of_nemotron_is_refused(tmp_path):
    (tmp_path / "stem.parquet").touch()
    with pytest.raises(
        ValueError, match=r"nemotron='.*stem\.parquet' must be a folder with the files of the splits \['chat'"
    ):
        build_general(tmp_path / "out", 1, 0, {"nemotron": str(tmp_path / "stem.parquet")})
