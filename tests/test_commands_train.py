"""`camopd train`: the run of a file, with prompts, teachers and checkpoints as it says."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import VOCAB, make_model, make_prompts, make_tokenizer
from trainers import SETTINGS
from transformers import AutoModelForCausalLM

from camopd import cli
from camopd.run import SERVED_TEACHERS


@pytest.mark.parametrize("command", ["check", "train"])
def test_served_teacher_that_is_gone_is_an_error_that_names_the_file(command, run, tmp_path, start_server, capsys):
    server = start_server()
    server.close()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SERVED_TEACHERS).write_text(json.dumps({"general": [server.url]}))
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, run])
    assert stopped.value.code == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert "does not answer" in said
    assert "_teachers.json', which `camopd serve` has written; start it again, or delete the file." in said


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with a student and two teachers, the domain's being the student's own start."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 0), ("general", 1), ("domain", 0)):
        make_model(seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(models, tmp_path, write):
    """The YAML file of a run of two steps, one for each branch, with teachers in the process."""
    for branch in ("general", "domain"):
        make_prompts(branch).to_json(tmp_path / f"{branch}.jsonl")
    return write({
        **SETTINGS, "model_name_or_path": str(models / "student"), "output_dir": str(tmp_path / "out"),
        "prompts": {branch: str(tmp_path / f"{branch}.jsonl") for branch in ("general", "domain")},
        "teachers": {branch: str(models / branch) for branch in ("general", "domain")},
        "schedule": "general:1,domain:1", "max_steps": 2, "prompts_per_step": 2, "max_completion_length": 4,
        "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 1,
    })  # fmt: skip


def steps(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_train_trains_as_the_file_says_and_saves_the_model(run, models, tmp_path):
    cli.main(["train", run])
    out = tmp_path / "out"
    assert [step["branch"] for step in steps(out)] == ["general", "domain"]
    record = json.loads((out / "checkpoint-2" / "camopd.json").read_text())
    assert record["teachers"] == {branch: branch for branch in ("general", "domain")}  # the names of their folders
    assert record["learning_rate"] == 0.1
    saved, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, models / "student"))
    assert saved.dtype == torch.float32
    assert not torch.equal(saved.lm_head.weight, start.lm_head.weight)


def test_train_takes_overrides_of_the_file(run, tmp_path):
    out = tmp_path / "elsewhere"
    cli.main(["train", run, "--max_steps", "1", "--schedule=domain:1,general:1", "--output-dir", str(out)])
    assert [step["branch"] for step in steps(out)] == ["domain"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model_name_or_path", "nobody/nothing"], "the student 'nobody/nothing' cannot be loaded: "),
        (["--model_name_or_path", "./nowhere"], "the student './nowhere' cannot be loaded: "),
        (
            ["--model_name_or_path", "no_weights"],
            "the student 'no_weights' cannot be loaded: its folder has no weights",
        ),
        (
            ["--resume", "nowhere"],
            "resume_from_checkpoint='nowhere' is neither a folder here nor owner/name on the Hub.",
        ),
    ],
)
def test_train_names_what_is_not_there(words, said, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(1).config.save_pretrained("no_weights")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", run, *words])
    assert stopped.value.code == 2 and f"camopd: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["true", "path"])
def test_train_goes_on_from_a_checkpoint(run, tmp_path, where):
    out = tmp_path / "out"
    cli.main(["train", run, "--max_steps", "1"])
    assert [step["step"] for step in steps(out)] == [1]
    cli.main(["train", run, "--resume_from_checkpoint", "true" if where == "true" else str(out / "checkpoint-1")])
    assert [(step["step"], step["branch"]) for step in steps(out)] == [(1, "general"), (2, "domain")]
    assert not (out / "metrics-1.jsonl").exists()  # where a run from the beginning would have put the first one's


def test_train_refuses_a_used_folder_before_anything_is_loaded(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1}\n')
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr("camopd.files.load_all", None)
        cli.main(["train", run])
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "has the files of another run: metrics.jsonl. Go on with that run by `--resume auto`" in said
    cli.main(["train", run, "--resume", "auto"])
    assert [step["step"] for step in steps(tmp_path / "out")] == [1, 2]
    cli.main(["train", run, "--overwrite_output_dir", "true", "--max_steps", "1"])
    assert not (tmp_path / "out" / "checkpoint-2").exists() and (tmp_path / "out" / "checkpoint-1").exists()


def test_train_asks_the_teachers_that_camopd_serve_has_started(run, tmp_path, start_server, models):
    server = start_server(name="served-general", root=str(models / "general"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SERVED_TEACHERS).write_text(json.dumps({"general": [server.url]}))
    cli.main(["train", run])
    asked = ["".join(VOCAB[token] for token in ids) for ids in server.sequences]
    assert (
        sum(text.startswith("general ") for text in asked) == 2
    )  # the prompts of the step; others were scored before it
    record = json.loads((tmp_path / "out" / "checkpoint-2" / "camopd.json").read_text())
    assert record["teachers"] == {"general": "served-general", "domain": "domain"}


def test_train_measures_held_out_prompts(run, tmp_path):
    held_out = json.dumps(
        {name: {"path": str(tmp_path / f"{name}.jsonl"), "limit": 2} for name in ("general", "domain")}
    )
    cli.main(["train", run, "--eval_prompts", held_out, "--eval_strategy", "steps", "--eval_steps", "2"])
    history = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    prompts = {key: value for line in history for key, value in line.items() if key.endswith("_prompts")}
    assert prompts == {"eval_general_prompts": 2, "eval_domain_prompts": 2}


@pytest.mark.parametrize("given", [None, ["general.jsonl"]])
def test_train_without_prompts_is_an_error_that_shows_the_form(run, capsys, given):
    settings = yaml.safe_load(Path(run).read_text())
    Path(run).write_text(yaml.safe_dump({**settings, "prompts": given}))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", run])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert (
        f"camopd: prompts must map each branch to its prompts, got {given!r}. In YAML:\nprompts:\n  general: " in said
    )


@pytest.mark.slow
def test_train_survives_a_day_of_signals_and_ends_as_if_undisturbed(run, tmp_path, python):
    """Ctrl-C, SIGTERM, and kill -9 in a save, each followed by the same command."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    words = ["--max_steps", "24", "--save_steps", "2", "--resume", "auto", "--output_dir"]

    def start(folder: Path) -> subprocess.Popen:
        command = [python, "-m", "camopd.cli", "train", run, *words, str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def lines_of(folder: Path) -> list[dict]:
        path = folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""  # the last line may be half written yet
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    said, code = start(undisturbed).communicate(timeout=300), 0
    assert len(lines_of(undisturbed)) == 24, said
    for number, done, expected in (
        (signal.SIGINT, 3, 75), (signal.SIGTERM, 9, 75), (signal.SIGKILL, 15, -signal.SIGKILL), (0, 24, 0),
    ):  # fmt: skip
        process = start(out)
        end = time.monotonic() + 300
        while number and process.poll() is None and time.monotonic() < end:
            # Killed in a save, as far as this process can see one.
            if len(lines_of(out)) >= done and (number != signal.SIGKILL or (out / "_saving").exists()):
                process.send_signal(number)
                break
        stdout, stderr = process.communicate(timeout=300)
        code = process.returncode
        assert code == expected, stderr
        assert "Traceback" not in stderr
        # Which checkpoint it is, and what is left out of it, in one line.
        chosen = [line for line in (stdout + stderr).splitlines() if "going on from" in line]
        assert len(chosen) == (number != signal.SIGINT), stdout + stderr
        if code == 75:
            name = signal.Signals(number).name
            assert f"{name}: stopped; the weights" in stderr and "--resume auto" in stderr
    keys = ("step", "branch", "loss", "grad_norm")
    assert [[line[key] for key in keys] for line in lines_of(out)] == [
        [line[key] for key in keys] for line in lines_of(undisturbed)
    ]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, undisturbed)]
    assert weights[0] == weights[1]
