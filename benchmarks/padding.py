"""Rows of one forward with padding, and one after the other in a masked square of all tokens, by their lengths.

    python benchmarks/padding.py [--rounds 2] [--longest 256] [--model FOLDER]

SmolLM2-135M from its wheel unless told otherwise, with `sdpa`; a few completion tokens for each row, so that the output
head counts little. Both ways in turn, in one process, after one to warm up. Says what they take of each other, and what
`packing_is_less_work` of camopd/balance.py takes them for. Writes benchmarks/results/padding.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import KEEP_PAGES, RESULTS, base_model, in_fresh_process, run, versions, write_report


COMPLETION = 4  # tokens
SHARES = ((1, 1, 1, 1), (1, 0.75, 0.55, 0.37), (1, 0.5, 0.3, 0.2))  # of the longest row: no padding, a third, a half


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest row")
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--report", type=Path, default=RESULTS / "padding.md")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        job = {"rounds": options.rounds, "longest": options.longest, "model": base_model(options.model, folder)}
        found = in_fresh_process(__file__, job, KEEP_PAGES)
    write_report(report(found, options), options.report)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds with and without padding of each batch, of scoring and of training: medians over the rounds."""
    import torch
    from transformers import AutoModelForCausalLM

    from camopd.balance import square_cost
    from camopd.logprobs import completion_logps

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(0)

    def seconds(rows: list[list[int]], packed: bool, train: bool) -> float:
        model.zero_grad(set_to_none=True)
        starts = [len(row) - COMPLETION for row in rows]
        started = time.perf_counter()
        with torch.set_grad_enabled(train):
            logps, _ = completion_logps(model, rows, starts, 0, padding_free=packed)
            if train:
                logps.sum().backward()
        assert logps.isfinite().all()
        return time.perf_counter() - started

    batches = []
    for longest in (job["longest"] // 8, job["longest"] // 4, job["longest"] // 2, job["longest"]):
        for shares in SHARES:
            lengths = [max(1 + COMPLETION, round(share * longest)) for share in shares]
            rows = [
                torch.randint(model.config.vocab_size, (length,), generator=generator).tolist() for length in lengths
            ]
            batch: dict[str, Any] = {"lengths": lengths}
            for train in (False, True):
                taken: dict[bool, list[float]] = {True: [], False: []}
                for number in range(1 + job["rounds"]):
                    for packed, times in taken.items():
                        once = seconds(rows, packed, train)
                        times += [once] if number else []
                batch["train" if train else "score"] = [statistics.median(taken[packed]) for packed in (True, False)]
            batches.append(batch)
            print(batch, flush=True)
    return {"batches": batches, "square cost": square_cost(model)}


def report(found: dict[str, Any], options: argparse.Namespace) -> list[str]:
    from camopd.balance import MASKED_ATTENTION, masked_work, packing_is_less_work

    cost = found["square cost"]
    rows = [
        "# Rows with padding, and without in a masked square",
        "",
        "Time without padding by that with it, of a forward and of a forward and backward; what the operations predict, "
        f"where those of attention count {MASKED_ATTENTION // 2} times; and whether the trainer leaves the padding out.",
        "",
        "| lengths | forward | forward and backward | predicted | without padding |",
        "|---|---|---|---|---|",
    ]
    for batch in found["batches"]:
        lengths = batch["lengths"]
        ratios = [packed / with_padding for packed, with_padding in (batch["score"], batch["train"])]
        predicted = masked_work(1, sum(lengths), cost) / masked_work(len(lengths), max(lengths), cost)
        cells = [*(f"{ratio:.2f}" for ratio in ratios), f"{predicted:.2f}"]
        cells += ["yes" if packing_is_less_work(lengths, cost) else "no"]
        rows.append(f"| {', '.join(map(str, lengths))} | " + " | ".join(cells) + " |")
    return [
        *rows,
        "",
        f"{COMPLETION} tokens of each row are its completion. Medians of {options.rounds} rounds in turn. CPU, "
        f"{len(os.sched_getaffinity(0))} CPU cores, {versions()}.",
    ]


if __name__ == "__main__":
    run(main, measure)
