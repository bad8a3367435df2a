"""What the builders share: local copies and the Hub, errors that say what to do, outputs that are whole or not there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset
from fake_hub import SHA, FakeHub
from test_data_general import FEATURES, raw, tool
from test_data_medical import distill, m23k, medmcqa, medqa, medreason, medxpertqa
from test_data_roleplay import talk

from camopd import cli
from camopd.data import nemotron, sampling
from camopd.data.coser import build_roleplay
from camopd.data.nemotron import ROWS, build_general
from camopd.data.output import building, write_jsonl
from camopd.data.sampling import normalise, shorten
from camopd.data.sources import Opened, Source, explain, local_files, open_source
from camopd.errors import DataError


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- local copies --------------------------------------------------------------------------------------------------


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
def test_a_folder_gives_the_files_of_the_split(folder, there, changes, taken):
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
def test_a_folder_without_files_of_the_split_is_an_error(folder, there, message):
    with pytest.raises(ValueError, match=message):
        local_files(source(), folder(*there))


def test_a_file_of_another_type_is_an_error(folder):
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
def test_a_broken_file_is_an_error_with_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(open_source(source(), str(tmp_path / name)).rows())


def test_a_token_in_an_error_is_not_repeated():
    error = OSError("401 for https://user:hf_AbCdEf123@huggingface.co/datasets/o/x")
    for path in (None, "a.jsonl"):
        said = explain(error, Opened(source(), path, "", ""))
        assert "AbCdEf123" not in said
        assert "hf_...@huggingface.co" in said


def test_only_the_columns_that_are_asked_for_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines([{"question": "q", "answer": "gold"}]))
    assert list(open_source(source(), str(tmp_path / "a.jsonl")).rows()) == [{"question": "q"}]


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def coser_file(tmp_path):
    path = tmp_path / "coser.json"
    path.write_text(json.dumps([talk(5), talk(7), talk(3)]))
    return path


def fails(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", *words])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def keep_sigterm():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_the_command_builds_and_says_what(tmp_path, capsys, coser_file):
    cli.main(["data", "roleplay", "--out", str(tmp_path / "out"), "--limit", "1", "--source", f"coser={coser_file}"])
    assert capsys.readouterr().out == f"built {tmp_path / 'out'}: README.md, prompts.jsonl, sft.jsonl\n"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "camopd data roleplay --limit 1 --seed 0 --source=coser=coser.json\n" in card
    assert str(tmp_path) not in card  # no paths of this machine


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["roleplay", "--out", "x", "--limit", "0"], "--limit must be at least 1, got 0."),
        (["medical", "--out", "x", "--next-speaker"], "--next-speaker is for roleplay; medical has no such conversations"),
        (["medical", "--out", "x", "--source", "coser=a"], "with one of the sources of medical: medmcqa, medreason,"),
        (["medical", "--out", "x", "--source", "medmcqa"], "--source 'medmcqa' must be NAME=PATH"),
        (["medical", "--out", "x", "--source", "medqa=no/such"], "--source medqa: there is no 'no/such' on this machine"),
        (["medical", "--out", "x", "--source", "medqa=.", "--source", "medqa=.."], "--source names 'medqa' twice"),
        (["stem", "--out", "x"], "invalid choice: 'stem' (choose from "),
        (["medical"], "the following arguments are required: --out"),
        (["medical", "--out", "x", "--limit", "many"], "invalid int value: 'many'"),
    ],
)  # fmt: skip
def test_what_is_wrong_on_the_command_line_is_said(capsys, words, message):
    assert message in fails(capsys, *words)


def test_an_output_that_is_there_is_never_overwritten(tmp_path, capsys, coser_file):
    words = ["roleplay", "--limit", "1", "--source", f"coser={coser_file}", "--out"]
    (tmp_path / "out").mkdir()
    cli.main(["data", *words, str(tmp_path / "out")])  # an empty folder will do
    before = (tmp_path / "out" / "prompts.jsonl").read_bytes()
    assert f"'{tmp_path}/out' is there already, and no build overwrites it" in fails(
        capsys, *words, str(tmp_path / "out")
    )
    assert "is there already" in fails(capsys, *words, str(coser_file))
    assert (tmp_path / "out" / "prompts.jsonl").read_bytes() == before
    assert not (tmp_path / "out.partial").exists()


def test_the_help_of_camopd_names_data_and_imports_no_datasets():
    code = "import sys, camopd.commands.data; print({'datasets', 'huggingface_hub', 'torch'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "set()\n"
    found = subprocess.run(
        [sys.executable, "-m", "camopd.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "data " in found


# --- whole or not there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_build_that_fails_while_it_writes_leaves_nothing(tmp_path, error):
    def rows():
        yield {"id": "1"}
        raise error

    with pytest.raises(error), building(tmp_path / "deep" / "out") as build:
        write_jsonl(build.data / "prompts.jsonl", rows())
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_error_after_the_writing_of_one_file_leaves_nothing(tmp_path, coser_file, monkeypatch):
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
def test_an_interrupted_build_goes_on_and_gives_the_same(general, tmp_path, monkeypatch, capfd, stop_at):
    monkeypatch.setattr(sampling, "SAVE_EVERY", 20)
    general("whole")
    convert, calls = nemotron._convert, []

    def count(*arguments):
        calls.append(arguments)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return convert(*arguments)

    monkeypatch.setattr(nemotron, "_convert", count)
    with pytest.raises(KeyboardInterrupt):
        general("out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists() == (stop_at > 20)
    assert ("the same command goes on from there" in capfd.readouterr().err) == (stop_at > 20)
    assert not (tmp_path / "out.partial" / "data").exists()
    monkeypatch.setattr(nemotron, "_convert", convert)
    general("out")
    for name in ("prompts.jsonl", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_what_was_read_is_not_read_again(general, monkeypatch):
    monkeypatch.setattr(sampling, "SAVE_EVERY", 20)
    convert, calls = nemotron._convert, []

    def count(*arguments):
        calls.append(arguments)
        if len(calls) == 330:
            raise KeyboardInterrupt
        return convert(*arguments)

    monkeypatch.setattr(nemotron, "_convert", count)
    with pytest.raises(KeyboardInterrupt):
        general("out")
    general("out")
    assert len(calls) == 330 + 500 - 320  # from the last multiple of 20


def test_what_was_kept_for_other_settings_is_not_used(general, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "SAVE_EVERY", 20)
    general("whole", seed=1)
    monkeypatch.setattr(nemotron, "_look_up", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        general("out", seed=0)
    monkeypatch.undo()
    general("out", seed=1)
    assert (tmp_path / "out" / "prompts.jsonl").read_bytes() == (tmp_path / "whole" / "prompts.jsonl").read_bytes()


SLOW = """
import sys, time
from camopd.commands.data import data
from camopd.data import nemotron, sampling
sampling.SAVE_EVERY, convert = 20, nemotron._convert
nemotron._convert = lambda *arguments: (time.sleep(0.01), convert(*arguments))[1]
data(sys.argv[1:])
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_build_leaves_no_output_and_goes_on(general, tmp_path, sign):
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
    build = subprocess.Popen([sys.executable, "-c", SLOW, *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "out.partial" / "kept" / "code.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    build.send_signal(sign)
    assert build.wait(30) == (-9 if sign == signal.SIGKILL else 143)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "data").exists() == (sign == signal.SIGKILL)
    general("out")
    assert (tmp_path / "out" / "prompts.jsonl").read_bytes() == (tmp_path / "whole" / "prompts.jsonl").read_bytes()
    assert not (tmp_path / "out.partial").exists()


# --- texts ---------------------------------------------------------------------------------------------------------


def test_normalised_texts_differ_in_what_makes_another_question_only():
    assert normalise(" What\tIS\n\nx\u00b2? ") == "what is x2?"
    assert normalise("a b") != normalise("ab")
    assert normalise("1.5") != normalise("15")


def messages(*sizes):
    return [{"role": ("user", "assistant")[place % 2], "content": "x" * size} for place, size in enumerate(sizes)]


def test_shorten_takes_the_longest_run_of_last_turns_that_begins_with_the_user():
    system = {"role": "system", "content": "s" * 10}
    turns = messages(50, 50, 50, 50, 50)
    assert shorten([system, *turns], 260) == [system, *turns]
    assert shorten([system, *turns], 259) == [system, *turns[2:]]
    assert shorten([system, *turns], 159) == [system, *turns[4:]]
    assert shorten([system, *turns], 59) is None
    assert shorten(turns, 249) == turns[2:]
    calls = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [{"id": "y" * 50}]}]
    assert shorten([*calls, {"role": "tool", "content": "z"}], 40) is None  # the result would have lost its call


# --- the Hub -------------------------------------------------------------------------------------------------------


def parquet(rows, path):
    Dataset.from_list(rows).to_parquet(path)
    return Path(path).read_bytes()


@pytest.fixture
def hub(tmp_path):
    """The medical sources and CoSER as the Hub has them, in the files and configurations it has them in."""
    config = "---\nlicense: mit\nconfigs:\n- config_name: {}\n  data_files:\n  - split: {}\n    path: {}\n---\n"
    mcqa = {
        split: parquet([medmcqa(first + n) for n in range(40)], tmp_path / f"{split}.parquet")
        for first, split in ((0, "train"), (100, "test"))
    }
    served = FakeHub({
        "openlifescienceai/medmcqa": {f"data/{split}-00000-of-00001.parquet": file for split, file in mcqa.items()},
        "UCSC-VLAA/MedReason": {"ours.jsonl": lines(medreason(n) for n in range(40)).encode()},
        "FreedomIntelligence/Medical-R1-Distill-Data": {
            "README.md": config.format("en", "train", "en.json").encode(),
            "en.json": json.dumps([distill(n) for n in range(40)]).encode(), "zh.json": b'[{"question": "zh"}]',
        },
        "UCSC-VLAA/m23k-tokenized": {"train.jsonl": lines(m23k(n) for n in range(40)).encode()},
        "GBaker/MedQA-USMLE-4-options": {
            "phrases_train.jsonl": lines([medqa("mcq 1?")]).encode(),
            "phrases_test.jsonl": lines([medqa("mcq 2?")]).encode(),
        },
        "TsinghuaC3I/MedXpertQA": {
            "README.md": config.format("Text", "test", "Text/test.jsonl").encode(),
            "Text/test.jsonl": lines([medxpertqa("reason 3?")]).encode(),
        },
        "Neph0s/CoSER": {"train/sft_conversations_sharegpt.json": json.dumps([talk(5), talk(7)]).encode()},
    })  # fmt: skip
    yield served
    served.close()


@pytest.fixture
def camopd_data(tmp_path):
    """Run the command in a process of its own, with a Hub at `url`."""

    def run(url, *words, **environment):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **environment,
        }
        command = [sys.executable, "-m", "camopd.cli", "data", *words, "--out", str(tmp_path / "out")]
        return subprocess.run(
            command, env={**clean, **settings}, capture_output=True, text=True, timeout=300, check=False
        )

    return run


def test_medical_sources_are_read_from_the_hub_at_one_commit(hub, camopd_data, tmp_path):
    done = camopd_data(hub.url, "medical", "--limit", "80")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == 80
    found = {row["id"] for row in rows}
    assert not {"medmcqa-uuid-2", "medreason-3"} & found  # in the tests of MedQA and MedXpertQA
    assert not any(
        name.startswith("medmcqa-uuid-1") and len(name) == 17 for name in found
    )  # nothing of the split test
    card = (tmp_path / "out" / "README.md").read_text()
    assert "in the test split of medqa: 1" in card
    assert "in the test split of medxpertqa: 1" in card
    assert f"| train | the Hub, commit `{SHA}` | mit |" in card


def test_a_dataset_is_sent_to_a_private_repository(hub, camopd_data, tmp_path):
    done = camopd_data(hub.url, "roleplay", "--limit", "1", "--push-to-hub", "me/made", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"sent to {hub.url}/datasets/me/made\n")
    assert [(made["name"], made["type"], made["visibility"]) for made in hub.created] == [
        ("made", "dataset", "private")
    ]
    assert hub.committed == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("builder", "refuse", "token", "message"),
    [
        ("roleplay", (403, "GatedRepo"), None,
         "it is gated, and this machine has no token; accept its terms at https://huggingface.co/datasets/{0}, then"),
        ("medical", (403, "GatedRepo"), "hf_secret", "it is gated, and the token of this machine has no access; accept"),
        ("medical", (401, "RepoNotFound"), None,
         "the Hub knows no such dataset, or it is private, and this machine has no token; check the name, or set HF_TOKEN"),
        ("roleplay", (404, "RepoNotFound"), "hf_secret",
         "the Hub knows no such dataset, or it is private, and the token of this machine has no access"),
        ("medical", (403, ""), "hf_secret",
         "the Hub answers with status 403, and the token of this machine has no access; set HF_TOKEN"),
        ("roleplay", (418, ""), None, "the Hub answers with status 418; try again later"),
    ],
)  # fmt: skip
def test_a_dataset_that_is_refused_is_named_with_the_setting_and_what_to_download(
    hub, camopd_data, tmp_path, builder, refuse, token, message
):
    name, source, file = {
        "medical": ("openlifescienceai/medmcqa", "medmcqa", ""),
        "roleplay": ("Neph0s/CoSER", "coser", " train/sft_conversations_sharegpt.json"),
    }[builder]  # fmt: skip
    hub.refuse[name] = refuse
    done = camopd_data(hub.url, builder, **({"HF_TOKEN": token} if token else {}))
    assert done.returncode == 2
    assert f"camopd: '{name}' cannot be fetched: {message.format(name)}" in done.stderr
    assert (
        f"    hf download {name}{file} --repo-type dataset --local-dir DIR\n    camopd data ... --source {source}=DIR\n"
        in done.stderr
    )
    assert "hf_secret" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("builder", ["general", "medical", "roleplay"])
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "the Hub cannot be reached; check network, proxy and HF_ENDPOINT"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it where there is a network"),
    ],
)  # fmt: skip
def test_no_network_and_offline_are_said(camopd_data, tmp_path, builder, environment, message):
    done = camopd_data("http://127.0.0.1:9", builder, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert "hf download" in done.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("environment", "why"),
    [({}, "this machine has no token. Set HF_TOKEN"),
     ({"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_secret"}, "HF_HUB_OFFLINE is set"),
     ({"HF_TOKEN": "hf_secret"}, "the Hub cannot be reached")],
)  # fmt: skip
def test_what_could_not_be_sent_is_said_before_the_build(camopd_data, tmp_path, coser_file, environment, why):
    words = ["roleplay", "--limit", "1", "--source", f"coser={coser_file}", "--push-to-hub", "me/made"]
    done = camopd_data("http://127.0.0.1:9", *words, **environment)
    assert done.returncode == 2
    assert "cannot be sent to 'me/made': " in done.stderr
    assert why in done.stderr
    assert "hf_secret" not in done.stderr
    assert not (tmp_path / "out").exists()
