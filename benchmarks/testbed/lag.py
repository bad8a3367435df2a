"""Exploratory, and of neither protocol: CaMOPD with completions of the weights of one update before, and without.

    make testbed ARGS="--only lag"

Models, task, budget and outcome are those of the protocol, seeds and learning rates those of explore.py. The two runs of a
seed and a rate see equal prompts, and draw with equal seeds from a rollout server in the same process, which runs the
model with transformers in float32; so all that differs is `rollout_lag`. A run is one file, and is not run again.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from camopd import atomic
from camopd.errors import CaMOPDError
from camopd.report.page import table as markdown_table
from camopd.report.read import read_run

from . import signs, tables
from .arms import ARMS
from .explore import EVERY, RATES
from .jobs import ROOT, go_through, say
from .models import make_tokenizer
from .run import STEPS, Bench, Watch, recipe, trainer_of
from .signs import said


LAGS = (0, 1)
GAPS = ("general gap, last third", "domain gap, last third")  # numbers of signs.py
METRICS = ("importance/log_ratio", "importance/outside_band")


def work(out: Path, models: Path, until: float, seeds: Sequence[int]) -> None:
    """Do the runs that are not there, all of a seed before the next."""
    jobs = (
        (f"{seed}-lag_{lag}-{rate:g}", seed, lambda bench, of=(rate, seed, lag): run(bench, *of))
        for seed in seeds
        for rate in RATES
        for lag in LAGS
    )
    go_through(jobs, out, models, until)


def run(bench: Bench, rate: float, seed: int, lag: int, steps: int = STEPS) -> dict[str, Any]:
    """Train once. The record has the `points` of every run of the testbed, and means over the steps of `METRICS`."""
    sys.path.append(str(ROOT / "tests"))
    from fake_rollouts import FakeRollouts

    started = time.perf_counter()
    student = bench.student()
    watch = Watch(bench, student, EVERY)
    made = FakeRollouts(bench.specialised, make_tokenizer())
    with contextlib.closing(made) as server, tempfile.TemporaryDirectory() as folder:
        settings = {**ARMS["camopd"], "rollout_servers": [server.url], "rollout_lag": lag, "diagnostics_steps": EVERY}
        trainer = trainer_of(bench, student, recipe(folder, rate, seed, steps, settings), watch)
        watch.rule = trainer.rule
        stopped = None
        try:
            trainer.train()
        except CaMOPDError as error:
            stopped = f"{type(error).__name__} in step {trainer.state.global_step + 1}: {error}"
        finally:
            trainer.run.sampler.close()
        frame = read_run(Path(folder) / "metrics.jsonl")[0]
    if stopped is None and frame["rollout/lag"].tolist() != [0] + [lag] * (steps - 1):
        raise RuntimeError(f"completions were of other weights than asked for: {frame['rollout/lag'].tolist()}")
    return {
        "arm": f"lag {lag}", "lag": lag, "learning_rate": rate, "seed": seed, "stopped": stopped, "points": watch.points,
        "general": bench.measure(bench.general), "signs": signs.numbers(frame),
        **{name: statistics.fmean(frame[name]) for name in METRICS}, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def write(out: Path) -> None:
    """lag.md, of the seeds that have all their runs."""
    seeds: dict[int, dict[tuple[float, int], Mapping[str, Any]]] = {}
    for each in tables.read(out):
        seeds.setdefault(each["seed"], {})[each["learning_rate"], each["lag"]] = each
    whole = [of for _, of in sorted(seeds.items()) if len(of) == len(RATES) * len(LAGS)]
    if not whole:
        return say("no seed has all runs yet")
    rows = [
        ["", *(f"lag {lag}, at {rate:g}" for rate in RATES for lag in LAGS), "lag 1 minus lag 0, mean of the rates"]
    ]
    for name, of in _numbers().items():
        found = {key: [of(seed[key]) for seed in whole] for key in whole[0]}
        minus = [statistics.fmean(found[rate, 1][i] - found[rate, 0][i] for rate in RATES) for i in range(len(whole))]
        means = (f"{statistics.fmean(found[rate, lag]):.4f}" for rate in RATES for lag in LAGS)
        rows.append([name, *means, said(signs.t_interval(minus), "+")])
    minutes = sum(run["seconds"] for of in whole for run in of.values()) / 60
    text = (
        "# What a step ahead costs in quality, on the testbed\n\n"
        f'Exploratory. `make testbed ARGS="--only lag"`: {len(whole)} seeds, {len(whole) * len(whole[0])} runs of '
        f"{STEPS} steps, {minutes:.0f} minutes. Differences are paired by seed, with 95 % intervals over seeds "
        "(Student's t). Recovery is that of the covered skills at the best measured step that keeps 95 % of the domain.\n\n"
        f"{markdown_table(rows)}\n"
    )
    atomic.write(out / "lag.md", text)
    print(text)


def _numbers() -> dict[str, Any]:
    return {
        "recovery": lambda run: tables.outcome(run).recovery,
        "recovery at the end": lambda run: tables.at(run, run["points"][-1]).recovery,
        "domain at the end": lambda run: tables.at(run, run["points"][-1]).preservation,
        **{name: lambda run, name=name: run["signs"][name] for name in GAPS},
        **{f"`{name}`": lambda run, name=name: run[name] for name in METRICS},
    }
