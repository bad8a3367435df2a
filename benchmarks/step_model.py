"""A model of the step: what streaming, a step ahead, more servers and selection bring, before anything is bought.

    python benchmarks/step_model.py RUN/metrics.jsonl                                  # what a step ahead would bring
    python benchmarks/step_model.py RUN/metrics.jsonl --against LAGGED/metrics.jsonl   # and what it has brought

Servers roll out, teachers and the student score, the trainer trains, the new weights go to the servers. `stages` makes
the seconds of one step from lengths and rates; `ends` puts steps one after the other, or one ahead. `scaling.py`
prices the paper's run with both.

What is simplified: rollout servers share one queue, in the order of the prompts, and what one decodes is shared
equally among its sequences, each at most at the speed of one alone; teachers are a pool that takes requests as they
come; the forward of the student and training cost as much for every token; steps of one run have the same rates.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Rates(NamedTuple):
    """Tokens a second, each with what it is of."""

    servers: int  # that roll out
    slots: int  # sequences that a server decodes at once
    single: float  # of a sequence alone
    server: float  # of all sequences of a server
    teacher: float  # scored by all teachers together
    student: float  # scored by the trainer; infinite where the engine's log-probs are taken
    train: float  # forward and backward, of the kept samples


class Stages(NamedTuple):
    """Seconds of a step, each stage on its own."""

    rollout: float  # until the last completion is there
    teacher: float  # from then until the teacher has scored all
    student: float  # from then until the student has
    train: float


def finish_times(completions: Sequence[int], rates: Rates) -> list[float]:
    """Seconds after which each completion is there, by its tokens.

    All sequences under way have the same speed, so that what each has decoded is one number for all that differs by
    when it came in. More servers never make a completion later: `tests/test_step_model.py`.
    """
    found = [0.0] * len(completions)
    now = done = 0.0  # seconds, and tokens of a sequence that has been there from the beginning
    active: list[tuple[float, int]] = []  # `done` at which it ends
    waiting = 0
    while waiting < len(completions) or active:
        while waiting < len(completions) and len(active) < rates.servers * rates.slots:
            heapq.heappush(active, (done + completions[waiting], waiting))
            waiting += 1
        until, place = heapq.heappop(active)
        speed = min(rates.single, rates.servers * rates.server / (len(active) + 1))
        now += (until - done) / speed
        done, found[place] = until, now
    return found


def scored_at(arrivals: Sequence[float], tokens: Sequence[int], rate: float) -> float:
    """Seconds at which a pool that scores `rate` tokens a second is done with requests that come at these times."""
    now = 0.0
    for arrival, count in sorted(zip(arrivals, tokens, strict=True)):
        now = max(now, arrival) + count / rate
    return now


def stages(
    prompts: Sequence[int],
    completions: Sequence[int],
    kept: float,
    rates: Rates,
    streaming: bool = False,
    idle_trainer: bool = False,
) -> Stages:
    """Of one step, from the tokens of each prompt and completion, and the share of tokens that selection keeps.

    With `streaming` a finished completion goes to the teacher while others decode, and where the trainer is idle then,
    to the student as well.
    """
    finished = finish_times(completions, rates)
    rollout = max(finished, default=0.0)
    tokens = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    teacher = scored_at(finished if streaming else [rollout] * len(tokens), tokens, rates.teacher)
    student = scored_at(finished if streaming and idle_trainer else [rollout] * len(tokens), tokens, rates.student)
    return Stages(rollout, max(0.0, teacher - rollout), max(0.0, student - rollout), kept * sum(tokens) / rates.train)


def ends(steps: Sequence[Stages], sync: float = 0.0, lag: int = 0, streaming: bool = False) -> list[float]:
    """Seconds at which each step of a run is trained; `sync` is what the new weights take to the servers.

    With `lag` 1 the servers write a step while the one before is scored and trained: they get the weights of the last
    update when the trainer takes up their completions, and go on. Teachers with `streaming` score in the meantime,
    too; otherwise when the trainer asks.
    """
    if lag not in (0, 1):
        raise ValueError(f"lag is 0 or 1, not {lag}")
    found: list[float] = []
    start = free = 0.0  # when the servers begin this step, and when the trainer is done with the one before
    for step in steps:
        there = start + step.rollout
        begin = max(there, free)
        scored_by_teacher = there + step.teacher if streaming else begin + step.teacher
        if lag:
            start = begin = begin + sync
            if not streaming:
                scored_by_teacher += sync
        free = max(begin + step.student, scored_by_teacher) + step.train
        if not lag:
            start = free + sync
        found.append(free)
    return found


def seconds_a_step(steps: Sequence[Stages], sync: float = 0.0, lag: int = 0, streaming: bool = False) -> float:
    """The mean after the first step, whose rollout nothing can hide; of a single step, as if it went on like that."""
    steps = list(steps) * (20 if len(steps) == 1 else 1)
    found = ends(steps, sync, lag, streaming)
    return (found[-1] - found[0]) / (len(found) - 1)


# ------------------------------------------------------------------------------------------------------------- of a
# run


def steps_of(metrics: Path, skip: int) -> list[dict[str, float]]:
    """The lines of a run's steps but the first `skip`, which warm up. Raises `ValueError` where not two are left."""
    with open(metrics, encoding="utf-8") as file:
        lines = [line for line in map(json.loads, file) if "time/train" in line][skip:]
    if len(lines) < 2:
        raise ValueError(f"{metrics} has {len(lines)} steps after the first {skip}; at least 2 are needed")
    return lines


def of_run(metrics: Path, skip: int = 1) -> list[Stages]:
    """What the steps of a run have taken. Scoring is one number there, the student's beside the teachers'; a rollout is
    what the servers took to write, where that is not what the trainer waited for it."""
    return [
        Stages(line.get("time/rollout/writing", line["time/rollout"]), 0.0, line["time/score"], line["time/train"])
        for line in steps_of(metrics, skip)
    ]


def measured(metrics: Path, skip: int = 1) -> float:
    """The mean of the same steps that `seconds_a_step` speaks of: what the trainer waited, scored and trained."""
    lines = steps_of(metrics, skip)[1:]
    return sum(line[f"time/{name}"] for line in lines for name in ("rollout", "score", "train")) / len(lines)


def compare(run: Path, against: Path | None, sync: float, skip: int) -> list[str]:
    """Of a run without lag: what a step takes, would take one step ahead, and has taken in another run."""
    steps = of_run(run, skip)
    rollout, _, score, train = (math.fsum(column) / len(steps) for column in zip(*steps, strict=True))
    ahead = seconds_a_step(steps, sync, lag=1)
    rows = [
        f"{len(steps)} steps of {run}: rollout {rollout:.2f} s, score {score:.2f} s, train {train:.2f} s",
        "",
        "| | seconds a step |",
        "|---|---|",
        f"| one after the other, measured | {measured(run, skip):.2f} |",
        f"| one step ahead, predicted | {ahead:.2f} |",
        f"| the longer of rollout, score + train | {max(rollout, score + train):.2f} |",
    ]
    if against is not None:
        found, own = measured(against, skip), seconds_a_step(of_run(against, skip), sync, lag=1)
        rows += [
            f"| one step ahead, measured in {against} | {found:.2f} |",
            f"| the same, predicted from its own stages | {own:.2f} |",
            "",
            f"measured / predicted: {found / ahead:.3f}; by its own stages {found / own:.3f}",
        ]
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="metrics.jsonl of a run with rollout_lag 0")
    parser.add_argument("--against", type=Path, help="metrics.jsonl of the same run with rollout_lag 1")
    parser.add_argument(
        "--sync", type=float, default=0.0, help="seconds of a weight sync that the rollout's do not have"
    )
    parser.add_argument("--skip", type=int, default=1, help="first steps to leave out")
    options = parser.parse_args(argv)
    print("\n".join(compare(options.run, options.against, options.sync, options.skip)))


if __name__ == "__main__":
    main()
