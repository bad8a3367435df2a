"""How long the command needs before it says anything: `--help`, and mistakes that need no torch.

    python benchmarks/startup.py [--rounds 5]

Every figure is of fresh processes, whose order turns by one in each round. Quotes the median of the CPU seconds and of the
seconds by the clock; the first round, in which Python compiles its modules, is left out. `python -c pass` says how fast the
machine is. Writes benchmarks/results/startup.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import RESULTS, write_report


LINES = (
    "--help",
    "train --help",
    "check --help",
    "serve --help",
    "eval --help",
    "report --help",
    "data --help",
    "sweep --help",
    "gaps --help",
    "demo --help",
    "train run.yaml --learning_rte 1",
    "train run.yaml --learning_rate -1",
    "train run.yaml --dtype flot32",
    "report empty",
)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", type=Path, default=RESULTS / "startup.md")
    options = parser.parse_args(argv)
    commands = {"python -c pass": ["-c", "pass"]} | {
        f"camopd {line}": ["-m", "camopd.cli", *line.split()] for line in LINES
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run.yaml").write_text(
            "model_name_or_path: a/b\nteachers: {general: a/b, domain: a/c}\nprompts: {general: a/b, domain: a/b}\n",
            encoding="utf-8",
        )
        (Path(folder) / "empty").mkdir()
        for number in range(options.rounds + 1):
            names = list(commands)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                taken = seconds(commands[name], folder)
                if number:
                    found[name].append(taken)
            print(f"round {number} of {options.rounds}", flush=True)
    write_report(report(found, options.rounds), options.report)


def seconds(words: list[str], folder: str) -> tuple[float, float]:
    """CPU seconds of a fresh Python with these words, and seconds by the clock."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    place = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, cwd=folder, env={**os.environ, **place}, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    says = b"usage: camopd" in done.stdout or b"camopd: " in done.stderr or words == ["-c", "pass"]
    if b"Traceback" in done.stderr or not says:
        raise RuntimeError(f"{words} failed: {done.stderr.decode(errors='replace')[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - started


def report(found: dict[str, list[tuple[float, float]]], rounds: int) -> list[str]:
    rows = [
        f"| `{name}` | {' | '.join(f'{statistics.median(each):.2f}' for each in zip(*taken, strict=True))} |"
        for name, taken in found.items()
    ]
    head = [
        "# How long the command needs before it says anything",
        "",
        f"`python benchmarks/startup.py --rounds {rounds}`: medians of {rounds} fresh processes, "
        f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}.",
        "",
        "| command | CPU s | s |",
        "|---|---|---|",
    ]
    return head + rows


if __name__ == "__main__":
    main(sys.argv[1:])
