"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number of things, whose plural ends in s: "1 step", "1,234 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
