"""How noisy the gradient of one step is with real weights: the demo's pair, at weights that stand still.

    python benchmarks/real_gradients.py [--demo FOLDER] [--seeds 3] [--draws 12]

What `testbed.gradients` measures on 0.3M weights and 51 tokens, on SmolLM2-135M-Instruct and 49,152: each estimator's
gradient of the very same micro-batches, in steps that draw prompts and completions anew and have a learning rate of 0. The
student is the demo's specialised model, taken from the output folder of a demo or made first, and the teacher the general
one. A seed is one small file in benchmarks/results/real_gradients, and one that has its file is not measured again.
Writes real_gradients.md there.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, demo_folder, demo_trainer, run, versions, write_report
from real_weights import sha256
from testbed.gradients import LIKELIEST, Probe, losses_of, noise, table

from camopd import atomic


BRANCH = "general"  # that of the teacher which the student has to come back to


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--demo", type=Path, help="output folder of camopd demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=12, help="steps of a seed")
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--tokens", type=int, default=32, help="of a completion, at most")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_gradients")
    options = parser.parse_args(argv)
    sizes = {"draws": options.draws, "prompts": options.prompts, "tokens": options.tokens}
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        demo = demo_folder(options.demo, Path(folder))
        of = {"start": sha256(demo / "seed-0" / "specialised" / "model.safetensors"), **sizes}
        for path in sorted(options.out.glob("*.json")):
            if (other := _read(path)["of"]) != of:
                sys.exit(f"{path} is of {other}, and this would be of {of}: name another folder as --out.")
        for seed in range(options.seeds):
            path, started = options.out / f"{seed}.json", time.perf_counter()
            if not path.is_file():
                rows = measure({"demo": str(demo), "seed": seed, **sizes})
                found = {"of": of, "machine": platform.machine(), "versions": versions(), "rows": rows}
                atomic.write(path, json.dumps(found) + "\n")
                print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    write_report(report(options.out), options.out / "real_gradients.md")


def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each estimator, with the numbers of `noise`, of one seed's prompts and completions."""
    demo = Path(job["demo"])
    specialised = str(demo / "seed-0" / "specialised")
    with tempfile.TemporaryDirectory() as folder:
        trainer = demo_trainer(
            specialised, {BRANCH: str(demo / "general")}, demo / "prompts", heldout=1, output_dir=folder, bf16=False,
            max_steps=job["draws"], seed=job["seed"], prompts_per_step=job["prompts"], max_completion_length=job["tokens"],
            learning_rate=0.0, schedule=BRANCH, selection=False, scale=1, divergence="top_k", divergence_top_k=LIKELIEST,
            diagnostics_steps=0,
        )  # fmt: skip
        probe = Probe(trainer.model)
        probe.losses = losses_of(trainer.loss)
        trainer.add_callback(probe)
        before = [weight.detach().clone() for weight in trainer.model.parameters()]
        trainer.train()
        assert all(torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
    assert probe.draws.count == job["draws"]
    return [{"kind": kind, **found} for kind, found in noise(probe.draws).items()]


def report(out: Path) -> list[str]:
    """The table of the seeds that are there."""
    seeds = [_read(path) for path in sorted(out.glob("*.json"))]
    sizes, made_with = seeds[0]["of"], "; ".join(sorted({f"{seed['machine']}, {seed['versions']}" for seed in seeds}))
    return [
        "# How noisy the gradient of one step is with real weights",
        "",
        f"`python benchmarks/real_gradients.py`, {made_with}: the demo's pair, "
        f"SmolLM2-135M-Instruct, at the specialised model. {len(seeds)} seeds of {sizes['draws']} steps of "
        f"{sizes['prompts']} {BRANCH} prompts, completions of up to {sizes['tokens']} tokens, all samples, every estimator "
        "on the same completions; ± 95 % over seeds (Student's t), which share their weights. *Variance* is that of a "
        "step's gradient over prompts, completions and sampled tokens, summed over the weights.",
        "",
        table([seed["rows"] for seed in seeds]),
    ]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main, measure)
