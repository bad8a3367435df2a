"""What is printed: numbers, commands, and lines that fit the terminal."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import textwrap
from pathlib import Path


WIDTH = 80  # columns where there is no terminal


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


def columns_of_terminal() -> int:
    """Its columns, or `WIDTH` where there is none; at least 40, so that there is room for a word."""
    return max(40, shutil.get_terminal_size((WIDTH, 24)).columns)


def wrapped(line: str) -> list[str]:
    """A line in lines that the terminal has room for, of which names and paths stay in one piece."""
    width = columns_of_terminal() - 1
    return textwrap.wrap(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


class LogLines(logging.Formatter):
    """A message of a log as the other lines of a run: wrapped, and a warning or an error with that word before it.

    A traceback behind it stays as it is.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The message of a record, in lines."""
        word = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return "\n".join(part for line in f"{word}{record.message}".splitlines() for part in wrapped(line) or [""])


def in_lines(handler: logging.Handler) -> logging.Handler:
    """The handler, whose messages are `LogLines` from now on."""
    handler.setFormatter(LogLines())
    return handler
