"""How many steps each gradient of the loss needs for a given recovery, with real weights: the demo's pair.

    OMP_NUM_THREADS=1 python benchmarks/real_steps.py [--demo FOLDER] [--seeds 3] [--steps 12] [--at-once 2]

The student is the demo's specialised model, taken from the output folder of a demo or made first; CaMOPD as in the paper,
and with the three gradients of docs/methods.md, each over the same seeds, prompts and held-out prompts, measured after each
step. A run is one small file in benchmarks/results/real_steps, and one that has its file is not done again. Writes
real_steps.md there.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import RESULTS, demo_folder, demo_trainer, in_fresh_process, run, versions, write_report
from real_weights import over_seeds, sha256

from camopd import atomic
from camopd.measured import HELD_OUT, lines_of
from camopd.report.page import table as markdown_table


GRADIENTS: dict[str, dict[str, Any]] = {
    "sampled gap": {}, "`divergence: full`": {"divergence": "full"}, "`divergence: top_k`": {"divergence": "top_k"},
    "`baseline: kl`": {"baseline": "kl"},
}  # fmt: skip
SHARES = (0.5, 0.7)  # of the general gap that are to be gone
BRANCHES = ("general", "domain")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--demo", type=Path, help="output folder of camopd demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--tokens", type=int, default=32, help="of a completion, at most")
    parser.add_argument("--heldout", type=int, default=16, help="prompts of each branch")
    parser.add_argument("--at-once", type=int, default=1, help="runs beside each other")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_steps")
    options = parser.parse_args(argv)
    sizes = {name: getattr(options, name) for name in ("steps", "prompts", "tokens", "heldout")}
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        demo = demo_folder(options.demo, Path(folder), heldout=options.heldout)
        of = {"start": sha256(demo / "seed-0" / "specialised" / "model.safetensors"), **sizes}
        for path in sorted(options.out.glob("*.json")):
            if (other := _read(path)["of"]) != of:
                sys.exit(f"{path} is of {other}, and this would be of {of}: name another folder as --out.")

        def work(job: tuple[int, int]) -> None:
            seed, place = job
            path, gradient = options.out / f"{seed}-{place}.json", [*GRADIENTS][place]
            if path.is_file():
                return
            kls = in_fresh_process(__file__, {"demo": str(demo), "seed": seed, "gradient": gradient, **sizes})
            found = {"of": of, "seed": seed, "gradient": gradient, "machine": platform.machine(),
                     "versions": versions(), "kl": kls}  # fmt: skip
            atomic.write(path, json.dumps(found) + "\n")
            print(f"seed {seed}, {gradient}: general {kls['general'][0]:.3f} to {kls['general'][-1]:.3f}", flush=True)

        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(work, [(seed, place) for seed in range(options.seeds) for place in range(len(GRADIENTS))]))
    write_report(report(options.out), options.out / "real_steps.md")


def measure(job: dict[str, Any]) -> dict[str, list[float]]:
    """The held-out KL to each branch's teacher in nats per token, before the first step and after each."""
    demo = Path(job["demo"])
    specialised = str(demo / "seed-0" / "specialised")
    with tempfile.TemporaryDirectory() as folder:
        trainer = demo_trainer(
            specialised, {"general": str(demo / "general"), "domain": specialised}, demo / "prompts",
            heldout=job["heldout"], output_dir=folder, bf16=False, max_steps=job["steps"], seed=job["seed"],
            prompts_per_step=job["prompts"], max_completion_length=job["tokens"], learning_rate=4e-5, diagnostics_steps=0,
            eval_strategy="steps", eval_steps=1, eval_on_start=True, **GRADIENTS[job["gradient"]],
        )  # fmt: skip
        trainer.train()
        lines = lines_of(Path(folder) / HELD_OUT)
    found = {branch: [line["kl"] for line in lines if line["branch"] == branch] for branch in BRANCHES}
    assert {len(kls) for kls in found.values()} == {job["steps"] + 1}
    return found


def steps_to(share: float, kls: list[float]) -> int:
    """The first step after which so much of the gap is gone; one more than there are where none is."""
    return next((step for step, kl in enumerate(kls) if kl <= (1 - share) * kls[0]), len(kls))


def report(out: Path) -> list[str]:
    """The table of the seeds that have all gradients."""
    seeds: dict[int, dict[str, Any]] = {}
    for path in sorted(out.glob("*.json")):
        found = _read(path)
        seeds.setdefault(found["seed"], {})[found["gradient"]] = found
    whole = [seeds[seed] for seed in sorted(seeds) if len(seeds[seed]) == len(GRADIENTS)]
    if not whole:
        return ["# Steps to a given recovery with real weights", "", "No seed has all runs yet."]
    of, first = whole[0]["sampled gap"]["of"], "sampled gap"
    numbers: dict[str, Callable[[dict[str, list[float]]], float]] = {
        **{f"steps to {share:.0%}": lambda kl, share=share: steps_to(share, kl["general"]) for share in SHARES},
        **{f"{branch}, at the end": lambda kl, branch=branch: kl[branch][-1] for branch in BRANCHES},
    }
    rows = [["gradient", *(text for name in numbers for text in (name, "minus the sampled gap's"))]]
    for name in GRADIENTS:
        row = [name]
        for number in numbers.values():
            mine, its = ([number(seed[which]["kl"]) for seed in whole] for which in (name, first))
            row += [
                over_seeds(mine),
                "" if name == first else over_seeds([a - b for a, b in zip(mine, its, strict=True)], "+"),
            ]
        rows.append(row)
    before = statistics.fmean(seed[name]["kl"]["general"][0] for seed in whole for name in GRADIENTS)
    made_with = "; ".join(sorted({f"{run['machine']}, {run['versions']}" for seed in whole for run in seed.values()}))
    return [
        "# Steps to a given recovery with real weights",
        "",
        f"`python benchmarks/real_steps.py`, {made_with}: the demo's pair, SmolLM2-135M-Instruct. {len(whole)} seeds of "
        f"{of['steps']} steps of {of['prompts']} prompts, completions of up to {of['tokens']} tokens, 4e-5; sampled KL to "
        f"the general teacher on {of['heldout']} held-out prompts after each step, {before:.3f} before the first. *Steps "
        f"to* is the first after which that share of it is gone, {of['steps'] + 1} where none is, and so a floor; brackets "
        "are 95 % over seeds (Student's t), where there are several that differ, and not corrected for their number. "
        "The steps are what the runs were made for; the differences at the end were added when they were there.",
        "",
        markdown_table(rows),
        "",
        "Each seed; *there* is the first step after which the general gap is what the sampled gap ends with, or less. KL "
        "of the domain in nats per token.",
        "",
        markdown_table(_each(whole)),
    ]


def _each(seeds: list[dict[str, Any]]) -> list[list[str]]:
    rows = [
        [
            "seed",
            "gradient",
            *(f"steps to {share:.0%}" for share in SHARES),
            "there",
            "domain there",
            "domain, at the end",
        ]
    ]
    for seed in seeds:
        aim = seed["sampled gap"]["kl"]["general"][-1]
        for name in GRADIENTS:
            general, domain = (seed[name]["kl"][branch] for branch in BRANCHES)
            there = next((step for step, kl in enumerate(general) if kl <= aim), None)
            rows.append([str(seed[name]["seed"]), name, *(str(steps_to(share, general)) for share in SHARES),
                         "-" if there is None else str(there), "-" if there is None else f"{domain[there]:.3f}",
                         f"{domain[-1]:.3f}"])  # fmt: skip
    return rows


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main, measure)
