"""What `diagnostics_steps` costs: camopd's demo with and without, on SmolLM2-135M-Instruct.

    python benchmarks/diagnostics.py [--rounds 3] [--steps 20] [--demo FOLDER]

Every measurement is a fresh process that makes the demo's steps; runs with and without alternate. The student is the
demo's specialised model, taken from the output folder of a demo or made first. Quotes the median of the seconds of a
step (rollout + score + train), and of `time/diagnostics` in steps that measure coherence and in the others. Writes
benchmarks/results/diagnostics.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measuring import (
    RESULTS,
    demo_folder,
    demo_trainer,
    in_fresh_process,
    metrics_of,
    run,
    temporary_folder,
    write_report,
)


INTERVAL = 10


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of a run; four have all that is quoted")
    parser.add_argument("--prompts", type=int, default=12, help="of a step")
    parser.add_argument("--tokens", type=int, default=40, help="of a completion, at most")
    parser.add_argument("--demo", type=Path, help="output folder of camopd demo")
    parser.add_argument("--report", type=Path, default=RESULTS / "diagnostics.md")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        demo = demo_folder(options.demo, Path(folder))
        found: dict[int, list[list[dict[str, Any]]]] = {0: [], INTERVAL: []}
        for number in range(options.rounds):
            for every in found:
                sizes = {"steps": options.steps, "prompts": options.prompts, "tokens": options.tokens}
                job = {"demo": str(demo), "every": every, **sizes}
                found[every].append(in_fresh_process(__file__, job))
                print(f"round {number + 1}, diagnostics_steps={every}: {summary(found[every][-1])}", flush=True)
    write_report(report(found, options), options.report)


def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of each step of the demo's recovery."""
    demo = Path(job["demo"])
    specialised = str(demo / "seed-0" / "specialised")
    trainer = demo_trainer(
        specialised, {"general": str(demo / "general"), "domain": specialised}, demo / "prompts", heldout=4,
        output_dir=temporary_folder(), bf16=False, max_steps=job["steps"], diagnostics_steps=job["every"], seed=0,
        prompts_per_step=job["prompts"], max_completion_length=job["tokens"], learning_rate=4e-5,
    )  # fmt: skip
    trainer.train()
    return metrics_of(trainer.args.output_dir)


def measured(line: dict[str, float]) -> bool:
    return any(name.startswith("coherence/") for name in line)


def summary(lines: list[dict[str, float]]) -> dict[str, float]:
    """Medians in seconds, and the share of all diagnostics in all steps."""
    lines = lines[1:]  # warm-up
    result = {"step": statistics.median(line["time/step"] for line in lines)}
    for name, some in (("coherence", True), ("conflict", False)):
        times = [line["time/diagnostics"] for line in lines if "time/diagnostics" in line and measured(line) == some]
        if times:
            result[name] = statistics.median(times)
    result["share"] = sum(line.get("time/diagnostics", 0) for line in lines) / sum(line["time/step"] for line in lines)
    return {name: round(value, 4) for name, value in result.items()}


def report(found: dict[int, list[list[dict[str, Any]]]], options: argparse.Namespace) -> list[str]:
    def median(every: int, name: str) -> float:
        return statistics.median(summary(lines)[name] for lines in found[every])

    step, coherence, conflict = median(INTERVAL, "step"), median(INTERVAL, "coherence"), median(INTERVAL, "conflict")
    # general:3,domain:1 is measured twice in ten steps
    share = (2 * coherence + 8 * conflict) / (10 * step)
    return [
        "# What the diagnostics cost",
        "",
        f"`python benchmarks/diagnostics.py`, {platform.machine()}, {os.cpu_count()} cores, medians of {options.rounds} "
        f"runs of {options.steps} steps, in turns. SmolLM2-135M-Instruct as in the demo: {options.prompts} prompts a step, "
        f"up to {options.tokens} tokens, float32 on CPU.",
        "",
        "| | seconds |",
        "|---|---|",
        f"| step without diagnostics | {median(0, 'step'):.2f} |",
        f"| step with, without the time of the diagnostics | {step:.2f} |",
        f"| diagnostics of a step that measures coherence and conflict | {coherence:.2f} |",
        f"| diagnostics of a step that measures conflict alone | {conflict:.2f} |",
        "",
        f"With `diagnostics_steps: {INTERVAL}`, two steps in ten measure coherence: **{100 * share:.1f} %** of the time of "
        "the steps.",
    ]


if __name__ == "__main__":
    run(main, measure)
