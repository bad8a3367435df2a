"""Scoring in the process by how many rows share a forward, for completions of log-normal length.

    python benchmarks/scoring_batches.py [--rounds 5] [--rows 24] [--median 16] [--cap 256] [--model FOLDER]

The lengths are those of benchmarks/step.py, the model is SmolLM2-135M from its wheel unless told otherwise. Every way to
cut the rows into forwards is timed in turn, in one process, after a round to warm up: so many rows each, as many forwards
as twice the root of the number of rows, and what `score_batches` chooses, without padding where that is less work. A
least-squares fit of their times by forwards and tokens gives what a forward costs beside its tokens (`FORWARD_COST` in
camopd/forward.py). Writes benchmarks/results/scoring_batches.md.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import (
    KEEP_PAGES,
    RESULTS,
    base_model,
    in_fresh_process,
    log_normal_lengths,
    run,
    versions,
    write_report,
)


PROMPT = 8
CHOSEN, ROOT = "chosen", "twice the root"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--median", type=int, default=16, help="tokens of a completion")
    parser.add_argument("--cap", type=int, default=256)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--report", type=Path, default=RESULTS / "scoring_batches.md")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        job = {name: getattr(options, name) for name in ("rounds", "rows", "median", "cap")}
        found = in_fresh_process(__file__, {**job, "model": base_model(options.model, folder)}, KEEP_PAGES)
    write_report(report(found, options), options.report)


# ------------------------------------------------------------------------------------------------------ one process


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each way to cut the rows: medians over the rounds."""
    import torch
    from transformers import AutoModelForCausalLM

    from camopd.balance import packing_is_less_work, score_batches
    from camopd.forward import FORWARD_COST, Forward

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).to("cuda" if on_gpu else "cpu").eval()
    forward = Forward(
        model,
        lambda function, *args, **_: function(model, *args),
        model,
        torch.no_grad,
        10**6,
        0,
        None,
        "the student",
    )
    may_pack, cost = forward.packed is None, forward.square_cost or 0.0
    lengths = [PROMPT + length for length in log_normal_lengths(job["rows"], job["median"], job["cap"])]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(100 % model.config.vocab_size, model.config.vocab_size, (length,), generator=generator).tolist()
            for length in lengths]  # fmt: skip
    order = sorted(range(len(rows)), key=lambda row: -lengths[row])
    ways = {str(size): chunks(order, size) for size in rows_per_forward(len(rows))}
    ways[ROOT] = [list(each) for each in torch.tensor(order).tensor_split(2 * math.isqrt(len(order)))]
    ways[CHOSEN] = score_batches(
        lengths, 10**6, None if may_pack else False, FORWARD_COST, square_cost=cost if may_pack else 0
    )

    def packs(name: str, batch: list[int]) -> bool:
        return may_pack and name == CHOSEN and packing_is_less_work([lengths[row] for row in batch], cost)

    def seconds(name: str, batches: list[list[int]]) -> tuple[float, float]:
        forward.packed = None if may_pack and name == CHOSEN else False
        started, cpu = time.perf_counter(), time.process_time()
        with torch.no_grad():
            for batch in batches:
                logps, _ = forward.logps([rows[row] for row in batch], [PROMPT] * len(batch), with_entropy=True)
                assert logps.cpu().isfinite().all()
        return time.perf_counter() - started, time.process_time() - cpu

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(1 + job["rounds"]):
        for name, batches in ways.items():
            taken = seconds(name, batches)
            found[name] += [taken] if number else []
    median = {
        name: [statistics.median(column) for column in zip(*taken, strict=True)] for name, taken in found.items()
    }
    return {
        "ways": {
            name: {
                "forwards": len(batches),
                "tokens": sum(
                    sum(lengths[row] for row in batch) if packs(name, batch)
                    else len(batch) * max(lengths[row] for row in batch)
                    for batch in batches
                ),
                "seconds": median[name][0], "CPU seconds": median[name][1],
            }
            for name, batches in ways.items()
        },
        "tokens": sum(lengths),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
    }  # fmt: skip


def rows_per_forward(rows: int) -> list[int]:
    return [size for size in (1, 2, 4, 8, 16, 64) if size < rows] + [rows]


def chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


# ----------------------------------------------------------------------------------------------------------- report


def report(found: dict[str, Any], options: argparse.Namespace) -> list[str]:
    import numpy as np

    ways = [way for name, way in found["ways"].items() if name != CHOSEN]  # whose tokens may cost more, in a square
    timed = "CPU seconds" if found["device"] == "CPU" else "seconds"  # these count where other work shares the cores
    work = np.array([(way["forwards"], way["tokens"]) for way in ways], dtype=float)
    (forward, token), *_ = np.linalg.lstsq(work, np.array([way[timed] for way in ways]), rcond=None)
    rows = [
        "# Rows that share a forward of scoring",
        "",
        f"{options.rows} rows of {found['tokens']} tokens together: a prompt of {PROMPT}, and a completion of log-normal "
        f"length (median {options.median}, sigma 1, at most {options.cap}).",
        "",
        "| rows of a forward | forwards | tokens, padding included | seconds | CPU seconds |",
        "|---|---|---|---|---|",
    ]
    for name, way in found["ways"].items():
        times = f"{way['seconds']:.3f} | {way['CPU seconds']:.3f}"
        rows.append(f"| {name} | {way['forwards']} | {way['tokens']} | {times} |")
    old, new = found["ways"][ROOT], found["ways"][CHOSEN]
    return [
        *rows,
        "",
        f"Chosen / twice the root, {timed}: {new[timed] / old[timed]:.2f}.",
        "",
        f"A fit through the others: {1000 * forward:.0f} ms a forward and {1000 * token:.2f} ms a token, so a forward "
        f"costs as much as {forward / token:.0f} tokens beside its own.",
        "",
        f"Medians of {options.rounds} rounds in turn. {found['device']}, {len(os.sched_getaffinity(0))} CPU cores, "
        f"{versions()}.",
    ]


if __name__ == "__main__":
    run(main, measure)
