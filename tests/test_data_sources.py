"""Raw datasets in local copies: which files are taken, and errors that say what to do."""

import json

import pytest

from camopd.data.sources import Opened, Source, explain, local_files, open_source
from camopd.errors import DataError


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def source(**changes):
    return Source(**{"name": "x", "dataset": "o/x", "columns": ("question",), **changes})


@pytest.fixture
def folder(tmp_path):
    """Make a folder of empty files."""

    def folder(*names):
        for name in names:
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "copy" / name).touch()
        return tmp_path / "copy"

    return folder


@pytest.mark.parametrize(
    ("there", "changes", "taken"),
    [
        (["data/train-0.csv", "data/train-1.csv", "data/test-0.csv"], {}, ["data/train-0.csv", "data/train-1.csv"]),
        (["phrases_test.jsonl", "phrases_train.jsonl"], {"split": "test"}, ["phrases_test.jsonl"]),
        (["default/chat/0.parquet", "default/code/0.parquet"], {"split": "code"}, ["default/code/0.parquet"]),
        (["data/tool-0.csv", "data/chat-0.csv"], {"split": "tool_calling", "files": "tool"}, ["data/tool-0.csv"]),
        (["Text/test.jsonl", "MM/test.jsonl"], {"split": "test", "config": "Text"}, ["Text/test.jsonl"]),
        (["ours.jsonl", "README.md", ".cache/train.jsonl"], {}, ["ours.jsonl"]),  # one file need not say that it is train
        (["latest.jsonl", "test.jsonl"], {"split": "test"}, ["test.jsonl"]),
    ],
)  # fmt: skip
def test_folder_gives_the_files_of_the_split(folder, there, changes, taken):
    path = folder(*there)
    assert [str(file.relative_to(path)) for file in local_files(source(**changes), path)] == taken


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (["a.jsonl", "b.jsonl"], r"x='.*copy' must be a file, or .* 'train' in their names, .* only \['a\.jsonl', 'b"),
        (["README.md"], r"in their names, but there is none"),
        (["train.jsonl", "train.csv"], r"has files of the types \['\.csv', '\.jsonl'\]\. Give one type of \.parquet"),
    ],
)  # fmt: skip
def test_folder_without_files_of_the_split_is_an_error(folder, there, message):
    with pytest.raises(ValueError, match=message):
        local_files(source(), folder(*there))


def test_file_of_another_type_is_an_error(folder):
    with pytest.raises(ValueError, match=r"has files of the types \['\.txt'\]"):
        local_files(source(), folder("train.txt") / "train.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "a"', r"'o/x' cannot be read from the local copy 'a\.jsonl': .*\. Check --source x="),
        ("a.parquet", b"text", r"the local copy 'a\.parquet': .*Parquet"),
        ("a.csv", b'question\n"a', r"the local copy 'a\.csv': "),
        ("a.jsonl", b'{"question": "a"}\n{"question', r"the local copy 'a\.jsonl': "),
    ],
)  # fmt: skip
def test_broken_file_is_an_error_with_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(open_source(source(), str(tmp_path / name)).rows())


def test_token_in_an_error_is_not_repeated():
    error = OSError("401 for https://user:hf_AbCdEf123@huggingface.co/datasets/o/x")
    for path in (None, "a.jsonl"):
        said = explain(error, Opened(source(), path, "", ""))
        assert "AbCdEf123" not in said
        assert "hf_...@huggingface.co" in said


def test_columns_that_are_not_asked_for_are_not_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines([{"question": "q", "answer": "gold"}]))
    assert list(open_source(source(), str(tmp_path / "a.jsonl")).rows()) == [{"question": "q"}]
