"""Outputs are whole or not there, and an interrupted build goes on."""

import json
import signal
import subprocess
import sys
import time

import pytest
from data_rows import FEATURES, raw, talk, tool
from datasets import Dataset

from camopd.commands.ctrl_c import STOPPED
from camopd.data import nemotron, sampling
from camopd.data.coser import build_roleplay
from camopd.data.nemotron import ROWS, build_general
from camopd.data.output import building, write_jsonl
from camopd.files import json_lines, load_prompts


def test_written_rows_with_line_ends_of_unicode_are_as_many_when_they_are_read(tmp_path):
    """In the file they are as they are."""
    texts = [f"a{mark}b" for mark in "\u2028\u2029\x85\n\r\x0b\x0c\x1c"]
    path = tmp_path / "prompts.jsonl"
    assert write_jsonl(path, [{"id": str(n), "prompt": text} for n, text in enumerate(texts)]) == len(texts)
    assert [json.loads(line)["prompt"] for line in json_lines(path.read_text(encoding="utf-8"))] == texts
    assert load_prompts(str(path), "general")["prompt"][:] == texts


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_build_that_fails_while_it_writes_leaves_nothing(tmp_path, error):
    def rows():
        yield {"id": "1"}
        raise error

    with pytest.raises(error), building(tmp_path / "deep" / "out") as build:
        write_jsonl(build.data / "prompts.jsonl", rows())
    assert list((tmp_path / "deep").iterdir()) == []


def test_error_after_the_writing_of_one_file_leaves_nothing(tmp_path, monkeypatch):
    coser_file = tmp_path / "coser.json"
    coser_file.write_text(json.dumps([talk(5), talk(7), talk(3)]))

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("camopd.data.coser.write_card", fail)
    with pytest.raises(OSError, match="No space left"):
        build_roleplay(tmp_path / "out", 1, 0, {"coser": str(coser_file)})
    assert [path.name for path in tmp_path.iterdir()] == ["coser.json"]


@pytest.fixture
def general(tmp_path):
    """A copy of Nemotron, and a build from it."""
    for split in ROWS:
        rows = [tool(n) if split == "tool_calling" else raw(split, n) for n in range(100)]
        for shard in range(2):
            path = tmp_path / "nemotron" / f"{split.removesuffix('_calling')}-{shard}.parquet"
            path.parent.mkdir(exist_ok=True)
            Dataset.from_list(rows[50 * shard : 50 * shard + 50], features=FEATURES).to_parquet(path)
    sources = {"nemotron": str(tmp_path / "nemotron"), "code_contests": "none", "codeforces": "none"}
    return lambda out, **options: build_general(tmp_path / out, 60, sources=sources, **options)


@pytest.mark.parametrize("stop_at", [1, 130, 260, 261, 399])
def test_interrupted_build_goes_on_and_gives_the_same(general, tmp_path, monkeypatch, capfd, stop_at):
    monkeypatch.setattr(sampling, "SAVE_EVERY", 20)
    general("whole")
    convert, calls = nemotron.convert_row, []

    def count(*arguments):
        calls.append(arguments)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return convert(*arguments)

    monkeypatch.setattr(nemotron, "convert_row", count)
    with pytest.raises(KeyboardInterrupt):
        general("out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists() == (stop_at > 20)
    assert ("the same command goes on from there" in capfd.readouterr().err) == (stop_at > 20)
    assert not (tmp_path / "out.partial" / "data").exists()
    monkeypatch.setattr(nemotron, "convert_row", convert)
    general("out")
    for name in ("prompts.jsonl", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_build_that_goes_on_does_not_read_again_what_was_read(general, monkeypatch):
    monkeypatch.setattr(sampling, "SAVE_EVERY", 20)
    convert, calls = nemotron.convert_row, []

    def count(*arguments):
        calls.append(arguments)
        if len(calls) == 330:
            raise KeyboardInterrupt
        return convert(*arguments)

    monkeypatch.setattr(nemotron, "convert_row", count)
    with pytest.raises(KeyboardInterrupt):
        general("out")
    general("out")
    assert len(calls) == 330 + 500 - 320  # from the last multiple of 20


def test_build_does_not_use_what_was_kept_for_other_settings(general, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "SAVE_EVERY", 20)
    general("whole", seed=1)
    monkeypatch.setattr(nemotron, "look_up", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        general("out", seed=0)
    monkeypatch.undo()
    general("out", seed=1)
    assert (tmp_path / "out" / "prompts.jsonl").read_bytes() == (tmp_path / "whole" / "prompts.jsonl").read_bytes()


SLOW = """
import sys, time
from camopd import cli
from camopd.data import nemotron, sampling
sampling.SAVE_EVERY, convert = 20, nemotron.convert_row
nemotron.convert_row = lambda *arguments: (time.sleep(0.01), convert(*arguments))[1]
cli.main(["data", *sys.argv[1:]])
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_build_leaves_no_output_and_goes_on(general, tmp_path, sign):
    general("whole")
    words = [
        "general",
        "--out",
        str(tmp_path / "out"),
        "--limit",
        "60",
        "--source",
        f"nemotron={tmp_path / 'nemotron'}",
    ]
    words += ["--source", "code_contests=none", "--source", "codeforces=none"]
    build = subprocess.Popen([sys.executable, "-c", SLOW, *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "out.partial" / "saved" / "code.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    build.send_signal(sign)
    _, said = build.communicate(timeout=30)
    assert build.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sign]
    assert "Traceback" not in said and said.endswith(f"{STOPPED}\n") == (sign == signal.SIGINT)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "data").exists() == (sign == signal.SIGKILL)
    general("out")
    assert (tmp_path / "out" / "prompts.jsonl").read_bytes() == (tmp_path / "whole" / "prompts.jsonl").read_bytes()
    assert not (tmp_path / "out.partial").exists()
