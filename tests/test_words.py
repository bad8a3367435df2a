"""Numbers and commands in what is printed."""

import io
import logging
import subprocess
import sys

import pytest

from camopd.words import command, counted, in_lines


def test_counted_is_singular_for_one_alone():
    assert [counted(number, "step") for number in (0, 1, 2, 1234)] == ["0 steps", "1 step", "2 steps", "1,234 steps"]


@pytest.mark.parametrize("place", ["here", "elsewhere", "on the path", "nowhere"])
def test_command_runs_this_environment_s_camopd_as_typed(place, tmp_path, monkeypatch):
    own, other = tmp_path / "my env" / "bin" / "camopd", tmp_path / "other" / "camopd"
    for path in (own, other):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho {path.parent.name}\n")
        path.chmod(0o755)
    if place == "nowhere":
        own.unlink()
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away" if place == "elsewhere" else tmp_path)
    monkeypatch.setattr(sys, "executable", str(own.with_name("python")))
    monkeypatch.setenv("PATH", f"{own.parent if place == 'on the path' else other.parent}:/usr/bin:/bin")
    typed = command()
    assert (typed == "camopd") == (place in ("on the path", "nowhere"))
    assert typed.startswith("'my env/bin") == (place == "here")  # short where it can be
    said = subprocess.run(["sh", "-c", typed], capture_output=True, text=True, encoding="utf-8", check=True).stdout
    assert said == ("other\n" if place == "nowhere" else "bin\n")


@pytest.fixture
def log(monkeypatch):
    """A log in lines, and what it has written."""
    written = io.StringIO()
    log = logging.Logger("of its own")
    log.addHandler(in_lines(logging.StreamHandler(written)))
    monkeypatch.setenv("COLUMNS", "60")
    return log, written


def test_log_names_a_warning_and_wraps_it(log):
    log, written = log
    log.warning("teacher %r, initial KL: 1.042 nats per token over 480 tokens of the student's own", "general")
    log.info("going on from out/checkpoint-4")
    log.error("no")
    assert written.getvalue().splitlines() == [
        "warning: teacher 'general', initial KL: 1.042 nats per", "  token over 480 tokens of the student's own",
        "going on from out/checkpoint-4", "error: no",
    ]  # fmt: skip


def test_log_keeps_paths_and_lines_in_one_piece(log):
    log, written = log
    path = "/a-folder/" + "x-" * 40
    log.warning("a table:\n  1  2\n  3  4 in %s", path)
    assert written.getvalue().splitlines() == ["warning: a table:", "  1  2", "  3  4 in", f"  {path}"]


def test_log_leaves_a_traceback_as_it_is(log):
    log, written = log
    try:
        raise ValueError("of a length that is more than the columns there are, and is not wrapped all the same")
    except ValueError:
        log.exception("it failed")
    assert written.getvalue().startswith("error: it failed\nTraceback (most recent call last):\n")
    assert written.getvalue().splitlines()[-1].endswith("is not wrapped all the same")
