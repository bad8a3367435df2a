"""Files of prompts are read as they are, exactly the one that is named, or refused with the way out."""

import ast
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pytest
from conftest import make_tokenizer
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from camopd.data.sources import Source, open_source
from camopd.errors import DataError
from camopd.files import file_type, json_lines, load_prompts
from camopd.messages import render
from camopd.prompts import PromptStream, check_prompts
from camopd.surroundings import columns_of


CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the answer"}]
ODD_NAMES = ["p[1].jsonl", "p*.jsonl", "p?.jsonl", "[ab]/x**y.jsonl", "p{a,b} é #1 %20.jsonl"]


def save(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def drawn(path, **more):
    """What a step gets of a file, as the template writes it."""
    stream = PromptStream(load_prompts({"path": path, **more}, "general"), "general", seed=0, shuffle=False)
    return [row["prompt"] for row in stream.draw(range(len(stream.dataset)))]


# --- which file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD_NAMES)
def test_file_that_is_named_is_read_and_no_other(tmp_path, name):
    path = save(tmp_path / name, '{"prompt": "right"}\n')
    for other in ("p1.jsonl", "pa.jsonl", "p.jsonl", "a/x1y.jsonl", "pa é #1 %20.jsonl"):
        save(tmp_path / other, '{"prompt": "wrong"}\n')
    assert drawn(path) == ["right"]
    source = Source("s", "nobody/s", ("prompt",))
    assert [row["prompt"] for row in open_source(source, path).rows()] == ["right"]


def test_folder_that_is_named_is_read_and_no_other(tmp_path):
    save(tmp_path / "f1" / "train.jsonl", '{"prompt": "wrong"}\n')
    path = save(tmp_path / "f[1]" / "train.jsonl", '{"prompt": "right"}\n')
    save(tmp_path / "f[1]" / "test-0.jsonl", '{"prompt": "other split"}\n')
    folder = str(Path(path).parent)
    assert drawn(folder) == drawn(path) == ["right"]
    assert drawn(folder, split="test") == ["other split"]
    save(tmp_path / "f[1]" / "README.md", "prompt\nx\n")  # of what `datasets` makes of it nothing is known
    with pytest.raises(ValueError, match=r"f\[1\]' .*only a folder without a README.* or rename the folder"):
        drawn(folder)


_STEMS = st.sampled_from(["math", "code", "a[1]", "train", "train-2", "test", "unit_test", "dev", "x/y"])
_TYPES = st.sampled_from([".jsonl", ".csv"])


@settings(max_examples=20, deadline=None)
@given(st.sets(st.tuples(_STEMS, _TYPES), min_size=1, max_size=4))
def test_every_file_of_a_folder_is_in_one_of_its_splits_or_the_folder_is_refused(names):
    with tempfile.TemporaryDirectory() as folder:
        for stem, kind in names:
            text = f"{stem}{kind}" if kind == ".csv" else json.dumps(f"{stem}{kind}")
            save(Path(folder) / f"{stem}{kind}", f"prompt\n{text}\n" if kind == ".csv" else f'{{"prompt": {text}}}\n')
        found = []
        for split in ("train", "test", "validation"):
            try:
                found += drawn(folder, split=split)
            except ValueError as error:
                if "it has the splits" not in str(error):
                    assert "belong to no split" in str(error) and "Rename the files, or name a list" in str(error)
                    return
        assert sorted(found) == sorted(f"{stem}{kind}" for stem, kind in names)


def test_part_of_a_split_is_of_the_whole_folder_or_saved_dataset(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "files" / f"{name}.jsonl", "".join(f'{{"prompt": "{name}{n}"}}\n' for n in range(3)))
    Dataset.from_dict({"prompt": [f"{name}{n}" for name in "ab" for n in range(3)]}).save_to_disk(tmp_path / "saved")
    for folder in ("files", "saved"):
        path = str(tmp_path / folder)
        first, rest = drawn(path, split="train[:4]"), drawn(path, split="train[4:]")
        assert (first, rest) == (["a0", "a1", "a2", "b0"], ["b1", "b2"]), folder
        assert drawn(path, split="train[-1:]+train[:1]") == ["b2", "a0"]
        assert drawn(path, split="train[2:]", limit=3) == ["a2", "b0", "b1"] and drawn(path, limit=4)[-1] == "b0"
        assert drawn(path, split="all") == drawn(path) == drawn(path, name="default")
        with pytest.raises(ValueError, match=r"it has the splits \['train'\]. Name one, or a part of one"):
            drawn(path, split="test")
        with pytest.raises(ValueError, match=r"no configuration with the name 'x'. Leave `name` out"):
            drawn(path, name="x")


def test_columns_that_differ_between_files_come_out_as_they_went_in(tmp_path):
    rows = [
        {"prompt": CHAT[:1]}, {"messages": CHAT}, {"prompt": [{**CHAT[0], "name": "n"}]}, {"prompt": "a text"},
        {"prompt": CHAT[:1], "tools": [{"name": "f", "since": "2024-01-01"}]},
        {"prompt": CHAT[:1], "tools": ['{"name": "g"}']},
    ]  # fmt: skip
    paths = [save(tmp_path / f"{n}.jsonl", json.dumps(row) + "\n") for n, row in enumerate(rows)]
    stream = PromptStream(load_prompts(paths, "general"), "general", seed=0, shuffle=False)
    found = list(stream.draw(range(len(rows))))
    assert [row["prompt"] for row in found] == [
        CHAT[:1], CHAT[:1], [{**CHAT[0], "name": "n"}], "a text", CHAT[:1], CHAT[:1],
    ]  # fmt: skip
    assert [row.get("tools") for row in found[4:]] == [[{"name": "f", "since": "2024-01-01"}], [{"name": "g"}]]


def test_texts_of_a_file_that_look_like_dates_stay_texts(tmp_path):
    row = {"prompt": CHAT[:1], "chat_template_kwargs": {"day": "2024-07-26", "inner": {"at": "2024-07-26T10:00:00"}}}
    path = save(tmp_path / "p.jsonl", json.dumps(row) + "\n")
    (found,) = PromptStream(load_prompts(path, "general"), "general", seed=0).draw(range(1))
    template = "{{ day }} {{ inner.at }} {{ messages[0].content }}"
    assert render(found, make_tokenizer(), chat_template=template) == "2024-07-26 2024-07-26T10:00:00 hello"
    assert drawn(save(tmp_path / "q.jsonl", '{"prompt": "2024-07-26"}\n')) == ["2024-07-26"]


def test_file_of_numbers_beside_the_prompts_is_none_of_them_and_named(tmp_path, caplog):
    save(tmp_path / "train.jsonl", '{"prompt": "a", "meta": {"made": "2024-07-26"}}\n')
    save(tmp_path / "stats.json", '{"rows": 1}')
    assert drawn(str(tmp_path)) == ["a"] and "stats.json is not read" in caplog.text
    save(tmp_path / "more.jsonl.gz", gzip.compress(b'{"prompt": "b"}\n'))
    with pytest.raises(ValueError, match=r"1 of its files belong to no split, 'more.jsonl.gz'"):
        drawn(str(tmp_path))


def test_images_of_a_file_are_refused_and_empty_columns_are_not(tmp_path):
    rows = [{"prompt": "x", "images": ["a.png"]}, {"prompt": "x", "images": []}]
    for row in rows:
        path = save(tmp_path / f"{len(row['images'])}.jsonl", json.dumps(row) + "\n")
        if not row["images"]:
            assert drawn(path) == ["x"]
            continue
        with pytest.raises(ValueError, match=r"branch 'general' have a column 'images': images are not supported"):
            check_prompts(load_prompts(path, "general"), "general")


def test_saved_datasets_are_read(tmp_path):
    whole = Dataset.from_dict({"prompt": ["a", "b"], "x": [1, 2]})
    whole.save_to_disk(tmp_path / "one[1]")
    assert drawn(str(tmp_path / "one[1]")) == ["a", "b"]
    assert drawn(str(tmp_path / "one[1]"), limit=1) == ["a"]
    named = Dataset.from_dict({"prompt": ["a", "b"]}, split="train_sft")
    named.save_to_disk(tmp_path / "named")
    for split in ("train", "train_sft", "train[:2]", "all"):
        assert drawn(str(tmp_path / "named"), split=split) == ["a", "b"], split
    datasets.DatasetDict({"train-a": whole}).save_to_disk(tmp_path / "dash")
    assert drawn(str(tmp_path / "dash"), split="train-a") == ["a", "b"]
    datasets.DatasetDict(train=whole, test=whole.select([1])).save_to_disk(tmp_path / "splits")
    assert drawn(str(tmp_path / "splits"), split="test") == ["b"]
    with pytest.raises(ValueError, match=r"it has the splits \['test', 'train'\]. Name one, .*\{path: .*, split"):
        drawn(str(tmp_path / "splits"), split="dev")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.text("abc", min_size=1), min_size=1, max_size=3), min_size=1, max_size=3), st.integers(1, 9)
)
def test_rows_of_several_files_come_one_after_the_other(tmp_path, parts, limit):
    paths = [
        save(tmp_path / f"{number}.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in part))
        for number, part in enumerate(parts)
    ]
    rows = [text for part in parts for text in part]
    assert drawn(paths) == rows
    assert drawn(paths, limit=limit) == rows[:limit]


@pytest.mark.parametrize("path", ["{}/p*.jsonl", "{}/gone", "~/gone.csv"])
def test_path_that_leads_nowhere_is_refused_and_not_taken_for_a_pattern(tmp_path, path):
    save(tmp_path / "p1.jsonl", '{"prompt": "wrong"}\n')
    with pytest.raises(
        ValueError, match=r"branch 'general' are named as .*there is no such file.*stand for themselves"
    ):
        load_prompts(path.format(tmp_path), "general")


def test_home_upper_case_and_packed_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "P.JSONL", '{"prompt": "right"}\n')
    assert drawn("~/P.JSONL") == ["right"]
    assert drawn(save(tmp_path / "p.jsonl.gz", gzip.compress(b'{"prompt": "right"}\n'))) == ["right"]
    assert drawn(save(tmp_path / "P.CSV.GZ", gzip.compress(b"prompt\n007\n"))) == ["007"]
    assert [file_type(name) for name in ("a.parquet", "a.txt", "a", "a.json.zst")] == ["parquet", None, None, "json"]


def test_file_of_another_type_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"p\.txt' .*is a file, but of none of the types .jsonl, .json, .parquet, .csv"
    ):
        load_prompts(save(tmp_path / "p.txt", "hello\n"), "general")


# --- what is in it -----------------------------------------------------------------------------------------------

cell = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=10).filter(
    str.strip
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        cell | st.sampled_from(["007", "NA", "null", "3.10", "2024-01-01", "True", '"b"']), min_size=1, max_size=4
    )
)
def test_cells_of_a_csv_file_are_texts(tmp_path, cells):
    quoted = "".join('"{}","x, y"\n'.format(text.replace('"', '""')) for text in cells)
    path = save(tmp_path / f"{abs(hash(quoted))}.csv", "prompt,category\n" + quoted)
    dataset = load_prompts(path, "general")
    assert dataset["prompt"][:] == cells
    assert set(dataset["category"][:]) == {"x, y"}


# Any, and such of little else than the characters at which `str.splitlines()` ends a line.
TEXTS = st.text(st.characters(codec="utf-8")) | st.text('"a\u2028\u2029\x85\n\r\x0b\x0c\x1c\x1d\x1e')


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TEXTS), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_json_lines_are_as_many_as_were_written_and_the_same(tmp_path, texts, in_ascii, end):
    path = save(tmp_path / "p.jsonl", "".join(json.dumps(text, ensure_ascii=in_ascii) + end for text in texts))
    assert [json.loads(line) for line in json_lines(Path(path).read_text(encoding="utf-8"))] == texts


@given(TEXTS)
def test_json_lines_are_those_that_reading_line_by_line_gives(text):
    """Blank ones and one without an end, which a crash has cut, included."""
    assert json_lines(text) == [line.removesuffix("\n") for line in io.StringIO(text)]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
def test_prompts_with_line_ends_of_unicode_come_out_as_they_went_in(tmp_path, kind):
    texts = [f"a{mark}b" for mark in "\u2028\u2029\x85\x0b\x0c\x1c"]
    rows = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    content = {
        "jsonl": "".join(f"{row}\n" for row in rows), "json": f"[{','.join(rows)}]",
        "csv": "".join(f"{text}\n" for text in ("prompt", *texts)),
    }  # fmt: skip
    path = save(tmp_path / f"p.{kind}", content[kind])
    assert drawn(path) == texts
    assert columns_of(path) in (["prompt"], None)
    source = Source("s", "nobody/s", ("prompt",))
    assert [row["prompt"] for row in open_source(source, path).rows()] == texts


def test_byte_order_mark_is_no_part_of_the_text(tmp_path):
    mark = "\ufeff"
    assert drawn(save(tmp_path / "p.jsonl", mark + '{"prompt": "é"}\n')) == ["é"]
    assert drawn(save(tmp_path / "p.csv", mark + "prompt\né\n")) == ["é"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,prompt\na,b\n", r"more than one column 'prompt'"),
        ("prompt,category\nhi, you,chat\n", r"row 0 has 3 cells, and the header 2: .*needs quotes"),
        ("prompt,category\na,b\nhi\n", r"row 1 has 1 cells, and the header 2"),
    ],
)
def test_csv_file_whose_rows_do_not_fit_its_header_is_refused(tmp_path, text, said):
    with pytest.raises(ValueError, match=rf"'general', .*p\.csv' .*cannot be loaded: .*{said}"):
        load_prompts(save(tmp_path / "p.csv", text), "general")


@pytest.mark.parametrize("column", ["messages", "talk"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_messages_in_json_are_messages_without_the_answer(tmp_path, kind, column):
    path = str(tmp_path / f"p.{kind}")
    dataset = Dataset.from_list([{column: json.dumps(CHAT), "category": "c"}])
    {"csv": dataset.to_csv, "jsonl": dataset.to_json, "parquet": dataset.to_parquet}[kind](path)
    assert drawn(path, column=column) == [CHAT[:1]]


def test_messages_in_pythons_notation_are_refused_with_the_row(tmp_path):
    path = str(tmp_path / "p.csv")
    Dataset.from_list([{"messages": CHAT}]).to_csv(path)
    with pytest.raises(ValueError, match=r"row 0 of '.*p\.csv', prompts of branch 'domain': has the text .* not JSON"):
        load_prompts(path, "domain")


def test_rows_of_texts_and_messages_with_different_keys_come_out_as_they_went_in(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    rows = [
        {"messages": "a text"},
        {"messages": json.dumps(CHAT)},
        {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "2"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]}]},
    ]  # fmt: skip
    path = save(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert drawn(path) == ["a text", CHAT[:1], [*CHAT[:1], said, {"role": "tool", "content": "2"}], CHAT[:1]]


def test_system_tools_and_template_arguments_of_a_file_reach_the_template(tmp_path):
    row = {
        "messages": CHAT, "system": "be kind", "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "glad"},
        "other": 1,
    }  # fmt: skip
    path = save(tmp_path / "p.jsonl", json.dumps(row) + "\n")
    (found,) = PromptStream(load_prompts(path, "general"), "general", seed=0).draw(range(1))
    template = "{{ mood }}{{ tools[0].name }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    assert render(found, make_tokenizer(), chat_template=template) == "gladfsystem:be kind;user:hello;"
    assert found["row"] == f"row 0 of branch 'general' ({path})"


def test_row_and_the_file_are_named_where_a_prompt_is_wrong(tmp_path):
    path = save(tmp_path / "p.jsonl", '{"prompt": "a"}\n{"prompt": [{"role": "bard", "content": "x"}]}\n')
    with pytest.raises(ValueError, match=rf"row 1 of branch 'general' \({re.escape(path)}\) has the role 'bard'"):
        check_prompts(load_prompts(path, "general"), "general")


def test_prompt_is_taken_before_messages_and_that_is_said(tmp_path, caplog):
    path = save(tmp_path / "p.jsonl", json.dumps({"prompt": "a", "messages": CHAT}) + "\n")
    assert drawn(path) == ["a"]
    assert "have columns 'prompt' and 'messages': 'prompt' is taken" in caplog.text
    caplog.clear()
    assert drawn(path, column="messages") == [CHAT[:1]]
    assert drawn(path, column="prompt") == ["a"]
    assert not caplog.text


# --- what is wrong with it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.jsonl", b"", r"empty \(0 bytes\)"), ("p.json", b"", r"empty \(0 bytes\)"), ("p.csv", b"", r"empty \(0 bytes\)"),
        ("p.parquet", b"", r"empty \(0 bytes\)"),
        ("p.jsonl", b"\n\n", "no rows"), ("p.json", b"[]", "no rows"), ("p.csv", b"prompt\n", "no rows"),
        ("p.csv", b"\n", "no rows"), ("p.jsonl.gz", gzip.compress(b"", mtime=0), "no rows"),
        ("p.jsonl", '{"prompt": "caf\u00e9"}\n'.encode("latin-1"), r"not UTF-8 \(byte 0xe9\).*iconv -f LATIN1 -t UTF-8 "),
        ("p.csv", "prompt\ncaf\u00e9\n".encode("latin-1"), r"not UTF-8 \(byte 0xe9\).*iconv"),
        ("p.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "UTF-16, not UTF-8.*iconv -f UTF-16"),
        ("p.csv", "prompt\na\n".encode("utf-16"), "UTF-16, not UTF-8"),
    ],
)  # fmt: skip
def test_file_without_rows_or_of_another_encoding_is_refused_with_the_way_out(tmp_path, name, text, said):
    with pytest.raises(
        ValueError, match=rf"branch 'general', .*{name}' \(split 'train'\), cannot be loaded: .*{said}"
    ):
        load_prompts(save(tmp_path / name, text), "general")


def test_folder_with_a_file_in_latin_1_is_refused_with_the_way_out(tmp_path):
    """`datasets` reads it without a word; the text would fail where its row is read."""
    (tmp_path / "folder").mkdir()
    save(tmp_path / "folder" / "train.jsonl", '{"prompt": "caf\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"branch 'general', .*train.jsonl' .*cannot be loaded: .*not UTF-8.*iconv -f LATIN1"
    ):
        load_prompts(str(tmp_path / "folder"), "general")


def test_source_in_latin_1_is_refused_with_the_way_out(tmp_path):
    path = save(tmp_path / "p.jsonl", '{"prompt": "caf\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"'nobody/s' cannot be read from .*not UTF-8 .*iconv .*Check --source s=PATH"):
        open_source(Source("s", "nobody/s", ("prompt",)), path)


def test_cache_that_cannot_be_written_is_named_with_the_setting(tmp_path, monkeypatch):
    path = save(tmp_path / "p.jsonl", '{"prompt": "a"}\n')
    save(tmp_path / "no_folder", "")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "no_folder" / "cache")
    with pytest.raises(ValueError, match=r"the cache '.*no_folder/cache' cannot be written: .*Set HF_DATASETS_CACHE"):
        load_prompts(path, "general")


def test_ascii_locale_changes_nothing(tmp_path):
    config = save(
        tmp_path / "run.yaml", "run_name: é\nprompts: {general: p.csv}\n"
    )  # a path of ASCII: the system wants it
    save(tmp_path / "p.csv", "prompt\né\n")
    code = (
        "import sys, locale; from camopd.files import load_prompts; from camopd.run import read_settings\n"
        "assert locale.getpreferredencoding() != 'UTF-8'\n"
        f"path = {config!a}; settings = read_settings(path, [])\n"
        "print(ascii([settings['run_name'], load_prompts(path[:-8] + settings['prompts']['general'], 'x')[0]['prompt']]))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert found.stdout == ascii(["é", "é"]) + "\n", found.stderr[-2000:]


def without_encoding(tree: ast.AST):
    """Calls that read or write text in whatever encoding the machine has."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or "encoding" in {word.arg for word in node.keywords}:
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        words = [ast.unparse(item) for item in (*node.args, *(word.value for word in node.keywords))]
        binary = any(re.fullmatch("'[rwax+]*b[rwax+]*'", word) for word in words)
        as_text = any(word.arg == "text" for word in node.keywords)
        if (
            name in ("read_text", "write_text")
            or (name == "open" and not binary and ast.unparse(node.func) != "os.open")  # a descriptor: bytes
            or (name in ("run", "Popen", "check_output") and as_text)
        ):
            yield ast.unparse(node)


def test_text_files_are_all_opened_as_utf_8():
    root = Path(__file__).parents[1]
    files = [file for folder in ("camopd", "examples", "benchmarks") for file in sorted((root / folder).rglob("*.py"))]
    assert len(files) > 30
    found = {file.name: list(without_encoding(ast.parse(file.read_text(encoding="utf-8")))) for file in files}
    assert {name: calls for name, calls in found.items() if calls} == {}
    for call in ("open(x)", "x.open('w')", "x.read_text()", "run(x, text=True)"):
        assert list(without_encoding(ast.parse(call)))


# Functions that cut a text at all line ends that Unicode knows, and what it is. JSON Lines are cut by `json_lines`.
CUT = {
    "commands/check_run.py _free_memory": "/proc/meminfo",
    "commands/sweep.py _do": "the end of a log, shown",
    "eval/cage.py into": "what a program has said last, shown",
    "eval/jobs.py last_error": "a log, of which one line is shown",
    "report/page.py quote": "an answer that is shown: a page must not take any of it for its own line",
    "report/page.py to_html": "what `quote` gave",
    "threads.py _threads_of_torch": "/proc/self/task/*/status",
    "words.py formatMessage": "a line of the log, shown",
}


def test_no_function_cuts_json_lines_at_line_ends_of_unicode():
    root, found = Path(__file__).parents[1] / "camopd", set()
    for file in sorted(root.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        name = file.relative_to(root).as_posix()
        owners = [(node.name, node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "splitlines":
                around = [owner for owner, body in owners if body.lineno <= node.lineno <= body.end_lineno]
                found.add(f"{name} {around[0] if around else ''}".strip())
    assert found == set(CUT)
