"""The whole testbed: models from nothing, learning rates, the comparison, tables and figures.

    make testbed                                       # or: PYTHONPATH=benchmarks python -m testbed
    make testbed ARGS="--out build/testbed/again"      # from nothing, beside the results that are there
    make testbed ARGS="--tables"                       # tables and figures of the results that are there

One process, one run after the other: a fresh interpreter for each would cost as much as a run. A run is one file in
`OUT/runs`, written whole or not at all, and is not run again; so the same command goes on after a kill. The order is such
that what is there at any time is a table: all arms of a seed, then those of the next.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from camopd import atomic

from . import tables
from .arms import ARMS, SEEDS, TUNING_SEEDS, rates
from .models import Size, load_or_make, make_general, specialise
from .run import Bench, run


ROOT = Path(__file__).parent.parent.parent
OUT = Path(__file__).parent.parent / "results" / "testbed"
Job = tuple[str, Any, Callable[[Bench], Mapping[str, Any]]]  # name of a run, its seed or key, and how it is made
PICTURE = ROOT / "docs" / "assets" / "testbed_plane.svg"  # what README and docs/testbed.md show


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="testbed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where results, tables and figures go")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "testbed", help="where models are kept")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of the comparison")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.tables:
        work(options.out, options.models, time.monotonic() + options.seconds, options.seeds)
    tables.write(options.out)
    if options.out == OUT:
        atomic.write(PICTURE, (OUT / "plane.svg").read_bytes())


def work(out: Path, models: Path, until: float, seeds: int) -> None:
    """Do the runs that are not there, until a time of `time.monotonic`."""
    jobs = (
        (f"{stage}-{seed}-{arm}-{rate:g}", seed, partial(_run, stage, seed, arm, rate))
        for stage, seed, arm, rate in _in_order(out, seeds)
    )
    go_through(jobs, out, models, until)


def _run(stage: str, seed: int, arm: str, rate: float, bench: Bench) -> dict[str, Any]:
    return {"stage": stage, **run(bench, arm, rate, seed)}


def go_through(
    jobs: Iterable[Job], out: Path, models: Path, until: float, kind: Callable[[Path], Any] | None = None
) -> None:
    """Do those of the jobs, in their order, whose run is not there, until a time of `time.monotonic`.

    `kind` makes what gives each key of a job its `Bench`, of the folder of models: `Benches`, by seed.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for folder in (out / "runs", models):
        folder.mkdir(parents=True, exist_ok=True)
    benches = (kind or Benches)(models)
    for name, key, run_on in jobs:
        path = out / "runs" / f"{name}.json"
        if path.is_file():
            continue
        if time.monotonic() > until:
            return say("the time is up; the same command goes on from here")
        found = run_on(benches.of(key))
        atomic.write(path, json.dumps(found) + "\n")
        last = found["points"][-1]["report"]
        say(f"{name}: {found['seconds']} s, covered {last['covered']:.2f}, domain {last['domain']:.2f}")


def _in_order(out: Path, seeds: int) -> Iterator[tuple[str, int, str, float]]:
    """Stage, seed, arm and learning rate of every run; those of the comparison once the tuning is done."""
    for seed in TUNING_SEEDS:
        for place in range(5):
            yield from (("tuning", seed, arm, rates(arm)[place]) for arm in ARMS)
    chosen = tables.chosen_rates(tables.read(out))
    for seed in SEEDS[:seeds]:
        yield from (("comparison", seed, arm, chosen[arm]) for arm in ARMS)


class Benches:
    """Models by seed, made when they are first asked for and kept on disk."""

    def __init__(self, folder: Path, size: Size = Size()):  # noqa: B008 - it is frozen
        self.folder, self.size = folder, size
        self._general = load_or_make(folder / "general", lambda: make_general(size, say))
        self._last: tuple[int, Bench] | None = None

    def of(self, seed: int) -> Bench:
        """What runs of a seed share. Each seed has a specialised model of its own; the general one is the same."""
        if self._last is None or self._last[0] != seed:
            specialised = load_or_make(
                self.folder / f"specialised-{seed}", lambda: specialise(self._general, self.size, seed, say)
            )
            self._last = seed, Bench.of(self._general, specialised, self.size.skills, self.size.domain)
        return self._last[1]


def say(text: str) -> None:
    """A line with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    main()
