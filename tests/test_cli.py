"""The command line: quick to start, and errors without tracebacks."""

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
    text = "model_name_or_path: nobody/nothing\nteachers: {general: nobody/a, domain: nobody/b}\n"
    Path(tmp_path, "run.yaml").write_text(text)
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
