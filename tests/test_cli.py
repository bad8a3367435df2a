"""The command line: quick to start, and errors without tracebacks."""

import re
import subprocess
import sys

import pytest

import camopd
from camopd import cli


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
