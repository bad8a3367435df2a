"""The second comparison's arms through `camopd sweep`, beside the same runs in this process.

    make testbed ARGS="--only sweep"

The runs of the other parts go through `CaMOPDTrainer` in one process, as a program for each takes longer to start than to
train. Here the models are folders, the prompts files, and each arm a YAML file, and `camopd sweep` starts `camopd train`
for each of them, as a user does. What comes out is to be the same: the record has the accuracies of both and the largest
difference of a weight.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaForCausalLM

from camopd import atomic
from camopd.report.page import table as markdown_table

from . import tables
from .arms import ARMS, NAMES, SECOND
from .jobs import go_through, say
from .models import make_tokenizer
from .run import EVERY, STEPS, Bench, Watch, distil, recipe
from .tables import read


WORKPLACE = "sweep"  # folder of models, prompts, configs and runs, in that of the models


def work(out: Path, models: Path, until: float, seeds: Sequence[int]) -> None:
    """Do the runs that are not there, at the rates that the second comparison chose."""
    rates = tables.chosen_rates(read(out.parent / "second"))
    jobs = (
        (f"{seed}-{arm}", seed, partial(run, models / WORKPLACE / str(seed), arm, rates[arm], seed))
        for seed in seeds
        for arm in SECOND.arms
        if arm in rates
    )
    go_through(jobs, out, models, until)


def run(folder: Path, arm: str, rate: float, seed: int, bench: Bench, steps: int = STEPS) -> dict[str, Any]:
    """Train an arm twice. `points` has the accuracies at the end of the run of `camopd sweep`, as other runs have them."""
    started = time.perf_counter()
    student = copy.deepcopy(bench.specialised).requires_grad_(True)  # as a teacher it was frozen by the run before
    watch = Watch(bench, student, EVERY)
    stopped = distil(bench, student, watch, ARMS[arm], rate, seed, steps)["stopped"]
    here = time.perf_counter() - started
    name = f"{arm}/seed-{seed}"
    write_files(folder, bench, arm, rate, seed, steps)
    words = [sys.executable, "-m", "camopd.cli", "sweep", str(folder / f"{arm}.sweep.yaml")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number adds up in another order
    subprocess.run([*words, "--only", name], check=True, env={**os.environ, **threads})
    swept = folder / "runs" / name
    trained = LlamaForCausalLM.from_pretrained(swept)
    weights = zip(student.state_dict().items(), trained.state_dict().items(), strict=True)
    return {
        "arm": arm, "learning_rate": rate, "seed": seed, "stopped": stopped,
        "points": [{"step": steps, **bench.measure(trained)}], "in_one_process": bench.measure(student),
        "apart": max(float((one - other).abs().max()) for (_, one), (_, other) in weights),
        "seconds_here": round(here, 1), "seconds": round(time.perf_counter() - started - here, 1),
    }  # fmt: skip


def write_files(folder: Path, bench: Bench, arm: str, rate: float, seed: int, steps: int) -> None:
    """What `camopd sweep` needs for an arm, in a folder: models with their tokenizer, prompts, and the arm's YAML files."""
    models = {"general": bench.general, "domain": bench.specialised}
    prompts = {branch: folder / f"{branch}.jsonl" for branch in models}
    for branch, model in models.items():
        model.save_pretrained(folder / branch)
        make_tokenizer().save_pretrained(folder / branch)
        atomic.write(prompts[branch], "".join(json.dumps(row) + "\n" for row in bench.prompts[branch]))
    paths = {
        "model_name_or_path": str(folder / "domain"), "dtype": "float32",
        "teachers": {branch: str(folder / branch) for branch in models},
        "prompts": {branch: str(file) for branch, file in prompts.items()},
    }  # fmt: skip
    settings = recipe(str(folder / "run"), rate, seed, steps, ARMS[arm])
    sweep = {
        "output_dir": str(folder / "runs"), "configs": [str(folder / f"{arm}.yaml")], "seeds": [seed],
        "command": "{python} -m camopd.cli train {config} --seed {seed} --output_dir {output_dir} {resume}",
    }  # fmt: skip
    for name, content in {arm: {**paths, **settings}, f"{arm}.sweep": sweep}.items():
        atomic.write(folder / f"{name}.yaml", yaml.safe_dump(content, sort_keys=False))


def write(out: Path) -> None:
    """sweep.md, of the runs that are there."""
    runs = sorted(read(out), key=lambda run: (run["seed"], SECOND.arms.index(run["arm"])))
    if not runs:
        return say("there are no runs of camopd sweep yet; their learning rates are those of the second part")
    rows = [
        ["arm", "seed", "covered", "domain", "in one process: covered", "domain", "largest difference of a weight"]
    ]
    for each in runs:
        measured = (each["points"][-1], each["in_one_process"])
        values = (f"{of['report'][group]:.4f}" for of in measured for group in ("covered", "domain"))
        rows.append([NAMES[each["arm"]], str(each["seed"]), *values, f"{each['apart']:.1e}" if each["apart"] else "0"])
    alike = sum(each["apart"] == 0 for each in runs)
    before = {(one["arm"], one["seed"]): one["points"][-1]["report"]
              for one in read(out.parent / "second") if one["stage"] == "comparison"}  # fmt: skip
    again = sum(each["points"][-1]["report"] == before.get((each["arm"], each["seed"])) for each in runs)
    there, here = (sum(each[name] for each in runs) for name in ("seconds", "seconds_here"))
    text = (
        "# The same runs through `camopd sweep`\n\n"
        f'`make testbed ARGS="--only sweep"`: {len(runs)} runs of {STEPS} steps, each twice, accuracies at their ends. In '
        f"{alike} of them every weight is the same to its last bit, and {again} end with the accuracies that the second "
        "comparison has of them. Through `camopd sweep`, a program for each, they took "
        f"{there:.0f} s, in one process {here:.0f} s.\n\n{markdown_table(rows)}\n"
    )
    atomic.write(out / "sweep.md", text)
    print(text)
