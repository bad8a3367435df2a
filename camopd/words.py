"""Numbers and commands in what is printed."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def counted(number: int, noun: str) -> str:
    """A number of things, whose plural ends in s: "1 step", "1,234 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def command() -> str:
    """What to type for this environment's `camopd`: its path where the shell would not find it, as after `make demo`."""
    own = Path(sys.executable).with_name("camopd")  # without `resolve`, which leads out of the environment
    found = shutil.which("camopd")
    if not own.exists() or (found and Path(found).samefile(own)):
        return "camopd"
    near = own.is_relative_to(Path.cwd())
    return shlex.quote(os.path.relpath(own) if near else str(own))
