"""Which branches an optimizer step takes: the schedule of Eq. 5, as a string.

    general:3,domain:1        three general steps, then one domain step, repeated     CaMOPD, "3-1"
    general:1+domain:1        every step mixes both, half and half                    Vanilla MOPD
    general:3+domain:1        every step mixes both, three quarters and one quarter   "w/o dec (3:1)"

A comma separates optimizer steps, a plus mixes branches inside one step. `name:n` is a number of steps when the branch
has its steps to itself and a share when it is mixed; `:1` may be left out. Numbers are written as `3`, `0.75` or `1e3`,
and a period has at most a million steps. Everything is a pure function of the optimizer step, counted from 0, so there is
no state to lose: after a resume, step `t` is what it would have been.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
MOST_STEPS = 1_000_000  # of a period; each takes memory
MOST_CHARACTERS = 65_536


@dataclass(frozen=True)
class Schedule:
    """A parsed schedule. `str(schedule)` gives the text back. Build it with [`Schedule.parse`]."""

    text: str
    # One period: per optimizer step the share of each branch; shares add up to 1.
    steps: tuple[dict[str, float], ...] = field(hash=False)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Parse a schedule.

        >>> schedule = Schedule.parse("general:3,domain:1")
        >>> [list(schedule.shares(step)) for step in range(5)]
        [['general'], ['general'], ['general'], ['domain'], ['general']]
        >>> Schedule.parse("general:3+domain:1").shares(0)
        {'general': 0.75, 'domain': 0.25}

        Raises `ValueError` that points at the offending part.
        """
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"schedule must be a text such as 'general:3,domain:1', got {short(text)}.")
        if len(text) > MOST_CHARACTERS:
            raise ValueError(
                f"schedule {text[:80]!r}... has {len(text)} characters, and {MOST_CHARACTERS} are the most. Write steps of "
                "the same branches as one part, 'general:300'."
            )
        steps: list[dict[str, float]] = []
        position = 0
        for group in text.split(","):
            parts: dict[str, float] = {}
            mixed = "+" in group
            for part in group.split("+"):
                name, count = _parse_part(text, part, position, whole_steps=not mixed)
                if name in parts:
                    raise _error(text, position, part, f"branch {name!r} is already in this step; add its shares up")
                parts[name] = count
                position += len(part) + 1  # the separator
            total = sum(parts.values())
            if not total < float("inf"):
                raise _error(text, position - len(group) - 1, group, "its shares add up to no finite number")
            more = 1 if mixed else int(total)
            if len(steps) + more > MOST_STEPS:
                reason = f"{total:g} steps make the period longer than {MOST_STEPS}, the most it may have"
                raise _error(text, position - len(group) - 1, group, reason)
            shares = {name: count / total for name, count in parts.items()}
            steps += [shares] * more
        return cls(text=text, steps=tuple(steps))

    def __str__(self) -> str:
        return self.text

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """Every branch, in order of appearance."""
        return tuple(dict.fromkeys(name for shares in self.steps for name in shares))

    def mismatches(self, name: str, mapping: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Branches that are visited and not in the setting `name`, or the other way round, each with the way out."""
        for branch in self.branches:
            if mapping.get(branch) is None:
                text = (
                    f"schedule {self.text!r} visits branch {branch!r}, but {name} has only {sorted(mapping)}. Add "
                    f"{name}.{branch} or take the branch out of the schedule."
                )
                yield branch, text
        for branch in mapping:
            if branch not in self.branches:
                text = (
                    f"{name} has {branch!r}, which schedule {self.text!r} never visits. Add it there or leave it out."
                )
                yield branch, text

    @property
    def period(self) -> int:
        """Optimizer steps until the schedule repeats."""
        return len(self.steps)

    @property
    def alternates(self) -> bool:
        """Whether some steps are of other branches than others."""
        return len({frozenset(dict(step)) for step in self.steps}) > 1

    def shares(self, step: int) -> dict[str, float]:
        """Share of each branch in optimizer step `step`, counted from 0: `{"general": 1.0}` for a pure step."""
        return dict(self.steps[step % self.period])

    def mixture(self, step: int) -> str:
        """Branches of optimizer step `step` as one name, the same however a mixed step orders them."""
        return "+".join(sorted(self.shares(step)))

    def rows(self, step: int, rows_per_step: int) -> dict[str, int]:
        """Rows of each branch in optimizer step `step`; they add up to `rows_per_step` (largest remainder).

        >>> Schedule.parse("a+b+c").rows(0, 512)
        {'a': 171, 'b': 171, 'c': 170}
        """
        exact = {name: share * rows_per_step for name, share in self.shares(step).items()}
        rows = {name: int(value) for name, value in exact.items()}
        missing = rows_per_step - sum(rows.values())
        for name in sorted(exact, key=lambda name: rows[name] - exact[name])[:missing]:
            rows[name] += 1
        return rows

    def rows_before(self, step: int, rows_per_step: int) -> dict[str, int]:
        """Rows of each branch that all steps before `step` have drawn: where its stream stands after a resume."""
        periods, rest = divmod(step, self.period)
        if rows_per_step not in self._stretches:
            self._stretches[rows_per_step] = self._of_period(rows_per_step)
        return {
            name: periods * _rows_until(self.period, stretches) + _rows_until(rest, stretches)
            for name, stretches in self._stretches[rows_per_step].items()
        }

    @cached_property
    def _stretches(self) -> dict[int, dict[str, list[tuple[int, int, int, int]]]]:
        return {}  # by rows per step

    def _of_period(self, rows_per_step: int) -> dict[str, list[tuple[int, int, int, int]]]:
        """For each branch the stretches of a period in which every step draws as much of it: the first step, the number of
        steps, the rows of it in each, and those before. The first one is empty."""
        found = {name: [(0, 0, 0, 0)] for name in self.branches}
        start = 0
        for _, steps in groupby(self.steps, key=id):  # `parse` has one mapping for steps that are written as one part
            length = sum(1 for _ in steps)
            for name, count in self.rows(start, rows_per_step).items():
                _, last, rows, before = found[name][-1]
                found[name].append((start, length, count, before + last * rows))
            start += length
        return found


def _rows_until(step: int, stretches: list[tuple[int, int, int, int]]) -> int:
    """Rows of a branch in the steps of a period before `step`."""
    place = bisect_left(stretches, step, key=lambda stretch: stretch[0]) - 1
    start, length, count, before = stretches[max(0, place)]
    return before + min(step - start, length) * count


def mapping_form(name: str, value: Any) -> str:
    """The message for a setting that has something for each branch, and is `value` where a mapping is needed."""
    noun, general, domain = (
        ("teacher", "Qwen/Qwen3-8B", "http://localhost:8002")
        if name == "teachers"
        else ("prompts", "general.jsonl", "domain.jsonl")
    )
    # Whole, where it is not a number: what hides passwords in it needs their ends.
    got = short(value) if isinstance(value, int) else repr(value)
    return (
        f"{name} must map each branch to its {noun}, got {got}. In YAML:\n{name}:\n  general: {general}\n  domain: "
        f'{domain}\nOn the command line it is a JSON object: --{name} \'{{"general": "{general}", ...}}\'.'
    )


def by_step(name: str, value: Any) -> dict[int, int]:
    """A number that may change in the course of a run: `2048`, or `{0: 2048, 40: 8192}` for 8192 from step 40 on.

    Steps are optimizer steps, counted from 0; keys may be text, as JSON has them. Returns `{step: value}` by rising step.
    Raises `ValueError` naming `name` for anything but whole numbers of at least 1 from step 0 on.
    """
    mapping = value if isinstance(value, dict) else {0: value}
    try:
        steps = {_whole(step): _whole(number) for step, number in mapping.items()}
    except ValueError:
        steps = {}
    if 0 not in steps or min(steps) < 0 or min(steps.values()) < 1:
        raise ValueError(
            f"{name} must be a whole number of at least 1, got {short(value)}. A mapping from optimizer steps to such "
            "numbers begins at step 0: {0: 2048, 40: 8192}."
        )
    return dict(sorted(steps.items()))


def short(value: Any) -> str:
    """A value in an error: not all of a long one."""
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to write out very long ones
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def value_at(steps: dict[int, int], step: int) -> int:
    """What `by_step` says for an optimizer step."""
    return steps[max(start for start in steps if start <= step)]


def number_of(text: str) -> float:
    """A number as people write it: `3`, `0.75`, `1e3`. `float` alone also takes `1_000` and the digits of every script.

    Raises `ValueError` for anything else.
    """
    if not text.isascii() or "_" in text:
        raise ValueError(f"{text[:80]!r} is not a number.")
    return float(text)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(value)
    if isinstance(value, str) and not re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
        raise ValueError(value)  # `int` also takes 1_000 and digits of every script
    if isinstance(value, int) and abs(value) >= 2**53:
        raise ValueError(value)
    return int(value)


def _parse_part(text: str, part: str, position: int, whole_steps: bool) -> tuple[str, float]:
    name, colon, count_text = (piece.strip() for piece in part.partition(":"))
    if not name and not colon:
        raise _error(text, position, part, "a branch is missing here")
    if not _NAME.fullmatch(name):
        raise _error(text, position, part, f"{name[:80]!r} is not a branch name (letters, digits, '_' and '-')")
    if not colon:
        return name, 1.0
    try:
        count = number_of(count_text)
    except ValueError:
        raise _error(text, position, part, f"{count_text[:80]!r} is not a number") from None
    if not count < float("inf"):
        raise _error(text, position, part, f"{count_text[:80]} is not a finite number")
    if count <= 0:
        raise _error(text, position, part, f"{count_text[:80]} must be above 0; leave the branch out instead")
    if whole_steps and count != int(count):
        raise _error(
            text, position, part, f"{count_text[:80]} is not a whole number of steps; use '+' to mix by share"
        )
    return name, count


_SHOWN = 100  # characters


def _error(text: str, position: int, part: str, reason: str) -> ValueError:
    start = position + len(part) - len(part.lstrip())
    shown = max(0, start - _SHOWN)  # of a long schedule, what stands around the part
    marker = " " * (start - shown) + "^" * min(max(1, len(part.strip())), _SHOWN)
    return ValueError(
        f"schedule cannot be read: {reason}.\n    {text[shown : start + _SHOWN]}\n    {marker}\n"
        "Write 'general:3,domain:1' for separate steps or 'general:3+domain:1' to mix inside each step."
    )
