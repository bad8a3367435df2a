"""Numbers and commands in what is printed."""

import subprocess
import sys

import pytest

from camopd.words import command, counted


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
