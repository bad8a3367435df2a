"""Exploratory, and of neither protocol: the testbed with one knob turned, and whether methods compare as before.

    make testbed ARGS="--only knobs"

Knobs are coverage (how many of the eight skills the proxy prompts hold), the lengths of their words, how far the domain
lies, how long specialisation went on, and the size of the model. Task, budget and outcome are those of the protocol, seeds
others, and the learning rates those of explore.py, both for every method. A run is one file, and is not run again.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from camopd import atomic
from camopd.report.page import table as markdown_table

from . import signs, tables
from .arms import NAMES
from .explore import RATES
from .jobs import go_through, say
from .models import WORDS, Size, load_or_make, make_general, specialise
from .run import Bench, run
from .signs import said
from .skills import COVERED, GENERAL, NEAR


@dataclass(frozen=True)
class Setting:
    """Where the knobs stand; the defaults are the protocol's."""

    size: Size = Size()  # noqa: RUF009 - it is frozen
    covered: tuple[str, ...] = COVERED
    proxy_words: tuple[int, int] = WORDS


BASE = "as in the protocol"
KNOBS = {
    BASE: Setting(),
    "2 of 8 skills covered": Setting(covered=COVERED[:2]),
    "7 of 8 skills covered": Setting(covered=GENERAL[:7]),
    "proxy words of 1 or 2 letters": Setting(proxy_words=(1, 2)),
    "specialised for 60 steps": Setting(Size(specialise_steps=60)),
    "specialised for 1000 steps": Setting(Size(specialise_steps=1000)),
    "near domain": Setting(Size(domain=NEAR)),
    "width 64": Setting(Size(width=64)),
    "width 160": Setting(Size(width=160)),
}
METHODS = ("camopd", "without_selection", "vanilla", "mixed_3_1")
SEEDS = tuple(range(301, 313))


def work(out: Path, models: Path, until: float, seeds: Sequence[int]) -> None:
    """Do the runs that are not there, all of a seed before the next."""
    jobs = (
        (f"{seed}-{slug(knob)}-{arm}-{rate:g}", (seed, knob), partial(_run, knob, arm, rate, seed))
        for seed in seeds
        for knob in KNOBS
        for arm in METHODS
        for rate in RATES
    )
    go_through(jobs, out, models, until, Benches)


def _run(knob: str, arm: str, rate: float, seed: int, bench: Bench) -> dict[str, Any]:
    return {"knob": knob, **run(bench, arm, rate, seed)}


class Benches:
    """What runs of a seed and a knob share. Models of one size and one kind of general training are made once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._last: tuple[tuple[int, str], Bench] | None = None

    def of(self, key: tuple[int, str]) -> Bench:
        """Of a seed and a knob."""
        if self._last is None or self._last[0] != key:
            self._last = key, self._make(*key)
        return self._last[1]

    def _make(self, seed: int, knob: str) -> Bench:
        setting = KNOBS[knob]
        size = setting.size
        usual = replace(size, specialise_steps=Size().specialise_steps)
        general = self._made("general", usual, lambda: make_general(size, say))
        started = self._made(f"specialised-{seed}", size, lambda: specialise(general, size, seed, say))
        return Bench.of(general, started, size.skills, size.domain, setting.covered, setting.proxy_words)

    def _made(self, name: str, size: Size, make: Callable[[], LlamaForCausalLM]) -> LlamaForCausalLM:
        knob = next(knob for knob, each in KNOBS.items() if each.size == size)
        folder = (
            self.folder if knob == BASE else self.folder / slug(knob)
        )  # of the protocol's size: the protocol's own
        folder.mkdir(parents=True, exist_ok=True)
        return load_or_make(folder / name, make)


def slug(name: str) -> str:
    """A knob's name in those of files."""
    return re.sub("[^a-z0-9]+", "_", name)


# -------------------------------------------------------------------------------------------------------------- tables


def write(out: Path) -> None:
    """knobs.md, of the seeds that have all their runs."""
    seeds: dict[int, dict[tuple[str, str, float], Mapping[str, Any]]] = {}
    for each in tables.read(out):
        seeds.setdefault(each["seed"], {})[each["knob"], each["arm"], each["learning_rate"]] = each
    whole = [of for _, of in sorted(seeds.items()) if len(of) == len(KNOBS) * len(METHODS) * len(RATES)]
    if not whole:
        return say("no seed has all runs yet")
    minutes = sum(run["seconds"] for of in whole for run in of.values()) / 60
    text = "\n".join([
        "# The testbed with one knob turned\n",
        f"Exploratory: in neither protocol, no hypothesis. `make testbed ARGS=\"--only knobs\"`; "
        f"{len(whole) * len(whole[0])} runs on {len(whole)} seeds, {minutes:.0f} minutes. Every number is a "
        f"mean over the learning rates {' and '.join(f'{rate:g}' for rate in RATES)}; "
        "brackets are 95 % intervals over seeds (Student's t).",
        "\n## Where the models stand before\n",
        _starts(whole),
        "\n## Recovery of the covered skills with 95 % of the domain kept\n",
        "CaMOPD's own, and the difference of each method to it, paired by seed.\n",
        _outcomes(whole, "recovery"),
        "\n## Recovery of the uncovered skills at the same step\n",
        _outcomes(whole, "uncovered"),
    ])  # fmt: skip
    atomic.write(out / "knobs.md", text + "\n")
    print(text)


def _starts(seeds: Sequence[Mapping[Any, Mapping[str, Any]]]) -> str:
    groups = ("covered", "uncovered", "domain")
    rows = [["knob", *(f"{group}, {who}" for group in groups for who in ("general", "specialised"))]]
    for knob in KNOBS:
        runs = [of[knob, METHODS[0], RATES[0]] for of in seeds]
        rows.append([knob, *(
            f"{statistics.fmean(of['report'][group] for of in models):.2f}"
            for group in groups
            for models in ([run["general"] for run in runs], [run["points"][0] for run in runs])
        )])  # fmt: skip
    return markdown_table(rows)


def _outcomes(seeds: Sequence[Mapping[Any, Mapping[str, Any]]], field: str) -> str:
    rows = [["knob", NAMES[METHODS[0]], *(f"{NAMES[arm]} minus it" for arm in METHODS[1:])]]
    for knob in KNOBS:
        found = {
            arm: [
                statistics.fmean(getattr(tables.outcome(of[knob, arm, rate]), field) for rate in RATES) for of in seeds
            ]
            for arm in METHODS
        }
        base = found[METHODS[0]]
        minus = ([mine - its for mine, its in zip(found[arm], base, strict=True)] for arm in METHODS[1:])
        rows.append([knob, said(signs.t_interval(base)), *(said(signs.t_interval(each), "+") for each in minus)])
    return markdown_table(rows)
