"""What `diagnostics_steps` costs: camopd's demo with and without, on SmolLM2-135M-Instruct.

    python benchmarks/diagnostics.py [--rounds 3] [--steps 20] [--demo FOLDER]

Every measurement is a fresh process that makes the demo's steps; runs with and without alternate. The student is the
demo's specialised model, taken from the output folder of a demo or made first. Quotes the median of the seconds of a
step (rollout + score + train), and of `time/diagnostics` in steps that measure coherence and in the others. Writes
benchmarks/results/diagnostics.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


RESULT = Path(__file__).parent / "results" / "diagnostics.md"
INTERVAL = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--demo", type=Path, help="output folder of camopd demo")
    parser.add_argument("--every", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.every is not None:
        print(json.dumps(run(options.demo, options.steps, options.every)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.demo is None:
            from camopd import demo

            options.demo = Path(folder)
            (options.demo / "seed-0").mkdir()
            demo._specialise(
                options.demo / "seed-0", demo.unpack_base_model(options.demo / "general"), demo.DemoSettings()
            )
        found: dict[int, list[list[dict[str, float]]]] = {0: [], INTERVAL: []}
        for number in range(options.rounds):
            for every in found:
                found[every].append(in_a_process(options, every))
                print(f"round {number + 1}, diagnostics_steps={every}: {summary(found[every][-1])}", flush=True)
    report(found, options.rounds)


def in_a_process(options: argparse.Namespace, every: int) -> list[dict[str, float]]:
    command = [sys.executable, __file__, "--every", str(every), "--steps", str(options.steps)]
    command += ["--demo", str(options.demo)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    if process.returncode:
        sys.exit(process.stderr[-3000:])
    return json.loads(process.stdout.splitlines()[-1])


def run(models: Path, steps: int, every: int) -> list[dict[str, float]]:
    """The metrics of each step."""
    from camopd import demo

    with tempfile.TemporaryDirectory() as folder:
        general, specialised = str(models / "general"), str(models / "seed-0" / "specialised")
        settings = demo.DemoSettings(steps=steps)
        trainer = demo._trainer(specialised, general, specialised, Path(folder) / "run", settings)
        trainer.args.diagnostics_steps = every
        trainer.train()
        return [
            json.loads(line)
            for line in (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]


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


def report(found: dict[int, list[list[dict[str, float]]]], rounds: int) -> None:
    def median(every: int, name: str) -> float:
        return statistics.median(summary(lines)[name] for lines in found[every])

    step, coherence, conflict = median(INTERVAL, "step"), median(INTERVAL, "coherence"), median(INTERVAL, "conflict")
    # general:3,domain:1 is measured twice in ten steps
    share = (2 * coherence + 8 * conflict) / (10 * step)
    text = [
        "# What the diagnostics cost",
        "",
        f"`python benchmarks/diagnostics.py`, {platform.machine()}, {os.cpu_count()} cores, medians of {rounds} runs of "
        f"{len(found[0][0])} steps, in turns. SmolLM2-135M-Instruct with the demo's settings: 12 prompts a step, up to 40 "
        "tokens, float32 on CPU.",
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
        "",
    ]
    RESULT.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
