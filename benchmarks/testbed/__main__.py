"""The whole testbed: models from nothing, learning rates, comparisons, tables and figures, and what is exploratory.

    make testbed                                       # or: OMP_NUM_THREADS=1 PYTHONPATH=benchmarks python -m testbed
    make testbed ARGS="--out build/testbed/again"      # from nothing, beside the results that are there
    make testbed ARGS="--only first second"            # the two comparisons that have a protocol
    make testbed ARGS="--tables"                       # tables and figures of the results that are there

One process, one run after the other: a fresh interpreter for each would cost as much as a run, and changes nothing, as
the part `sweep` shows of thirteen arms. A run is one file, written whole or not at all, and is not run again; so the same
command goes on after a kill. The order is such that what is there at any time is a table: all arms of a seed, then those
of the next.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from camopd import atomic

from . import explore, gradients, knobs, lag, sweep, tables
from .arms import FIRST, SECOND, Comparison, rates
from .jobs import ROOT, go_through
from .run import Bench, run


OUT = Path(__file__).resolve().parent.parent / "results" / "testbed"
PICTURE = ROOT / "docs" / "assets" / "testbed_plane.svg"  # what README and docs/testbed.md show


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="testbed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where results, tables and figures go")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "testbed", help="where models are kept")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to do; all without it")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument(
        "--seeds", type=int, help="how many of those that a part has; without it as many as are published"
    )
    parser.add_argument("--tables", action="store_true", help="run nothing")
    options = parser.parse_args()
    if options.seeds is not None and options.tables:
        parser.error("--seeds says how many seeds to run, and --tables runs nothing. Leave one of them out.")
    most = min(len(PARTS[name].seeds) for name in options.only)
    if options.seeds is not None and not 1 <= options.seeds <= most:
        parser.error(f"--seeds {options.seeds}: {' '.join(options.only)} has seeds for 1 to {most}.")
    until = time.monotonic() + options.seconds
    for name in options.only:
        part = PARTS[name]
        out = options.out / part.folder
        if not options.tables:
            part.work(out, options.models, until, part.seeds[: options.seeds or part.published])
        part.write(out)
    if options.out.resolve() == OUT and "second" in options.only:
        atomic.write(PICTURE, (OUT / "second" / "plane.svg").read_bytes())


def compare(comparison: Comparison, out: Path, models: Path, until: float, seeds: Sequence[int]) -> None:
    """Do the runs of a comparison that are not there, until a time of `time.monotonic`."""
    jobs = (
        (f"{stage}-{seed}-{arm}-{rate:g}", seed, partial(_run, stage, seed, arm, rate))
        for stage, seed, arm, rate in _in_order(comparison, out, seeds)
    )
    go_through(jobs, out, models, until)


def _run(stage: str, seed: int, arm: str, rate: float, bench: Bench) -> dict[str, Any]:
    return {"stage": stage, **run(bench, arm, rate, seed)}


def _in_order(comparison: Comparison, out: Path, seeds: Sequence[int]) -> Iterator[tuple[str, int, str, float]]:
    """Stage, seed, arm and learning rate of every run; those of the comparison once the tuning is done."""
    for seed in comparison.tuning_seeds:
        for place in range(5):
            yield from (("tuning", seed, arm, rates(arm)[place]) for arm in comparison.arms)
    chosen = tables.chosen_rates(tables.read(out))
    for seed in seeds:
        yield from (("comparison", seed, arm, chosen[arm]) for arm in comparison.arms)


class Part(NamedTuple):
    """One table or some, and the runs behind it."""

    folder: str  # of its results, in that of all
    seeds: Sequence[int]
    published: int  # how many of them the tables in the repository have
    work: Callable[[Path, Path, float, Sequence[int]], None]  # of results, of models, until when, seeds
    write: Callable[[Path], None]


SECOND_SAYS = {
    "protocol": "PROTOCOL_2.md", "reached": "As in the first protocol; nothing is claimed from it.",
    "matched": "The protocol's second budget.",
}  # fmt: skip
PARTS = {
    "first": Part("", FIRST.seeds, 12, partial(compare, FIRST), tables.write),
    "second": Part("second", SECOND.seeds, 12, partial(compare, SECOND), partial(tables.write, **SECOND_SAYS)),
    "sweep": Part("sweep", SECOND.seeds, 1, sweep.work, sweep.write),
    "settings": Part("exploratory", explore.SEEDS, 3, explore.work, explore.write),
    "gradients": Part("exploratory", FIRST.seeds, 3, gradients.work, gradients.write),
    "knobs": Part("exploratory/knobs", knobs.SEEDS, 5, knobs.work, knobs.write),
    "lag": Part("exploratory/lag", explore.SEEDS, 10, lag.work, lag.write),
}


if __name__ == "__main__":
    main()
