"""`camopd data`: what it builds, from local files and from the Hub, what it sends there, and what it says of mistakes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_rows import distill, m23k, medmcqa, medqa, medreason, medxpertqa, talk
from datasets import Dataset
from fake_hub import SHA, FakeHub
from trainers import refused

from camopd import cli
from camopd.files import json_lines


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def coser_file(tmp_path):
    path = tmp_path / "coser.json"
    path.write_text(json.dumps([talk(5), talk(7), talk(3)]))
    return path


def fails(capsys, *words):
    return refused(capsys, "data", *words)


@pytest.fixture(autouse=True)
def keep_sigterm():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_command_builds_and_says_what(tmp_path, capsys, coser_file):
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
def test_command_line_that_is_wrong_is_refused_with_the_reason(capsys, words, message):
    assert message in fails(capsys, *words)


def test_output_that_is_there_is_never_overwritten(tmp_path, capsys, coser_file):
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


def test_help_of_camopd_names_data_and_imports_no_datasets():
    code = "import sys, camopd.commands.data; print({'datasets', 'huggingface_hub', 'torch'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "set()\n"
    found = subprocess.run(
        [sys.executable, "-m", "camopd.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "data " in found


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
    rows = [json.loads(line) for line in json_lines((tmp_path / "out" / "prompts.jsonl").read_text())]
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


def test_dataset_is_sent_to_a_private_repository(hub, camopd_data, tmp_path):
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
def test_dataset_that_is_refused_is_named_with_the_setting_and_what_to_download(
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
def test_hub_that_cannot_be_reached_or_is_switched_off_is_said(camopd_data, tmp_path, builder, environment, message):
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
def test_push_that_could_not_be_sent_is_said_before_the_build(camopd_data, tmp_path, coser_file, environment, why):
    words = ["roleplay", "--limit", "1", "--source", f"coser={coser_file}", "--push-to-hub", "me/made"]
    done = camopd_data("http://127.0.0.1:9", *words, **environment)
    assert done.returncode == 2
    assert "cannot be sent to 'me/made': " in done.stderr
    assert why in done.stderr
    assert "hf_secret" not in done.stderr
    assert not (tmp_path / "out").exists()
