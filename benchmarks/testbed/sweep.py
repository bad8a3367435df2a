"""The second comparison's arms through `camopd sweep`, beside the same runs in this process.

    make testbed ARGS="--only sweep"

The runs of the other parts go through `CaMOPDTrainer` in one process, as a program for each takes longer to start than to
train. Here the models are folders, the prompts files, and each arm a YAML file, and `camopd sweep` starts `camopd train`
for each of them, as a user does. What comes out is to be the same: the record has the accuracies of both and the largest
difference of a weight.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
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


def work(out: Path, models: Path, until: float, seeds: Sequence[int]) -> None:
    """Do the runs that are not there, of the arms whose rate the second comparison has chosen."""
    tuned = read(out.parent / "second")
    rates, means = tables.chosen_rates(tuned), tables.rate_means(tuned)
    arms = [arm for arm in SECOND.arms if arm in means and not any(map(math.isnan, means[arm].values()))]
    jobs = ((f"{seed}-{arm}", seed, partial(run, arm, rates[arm], seed)) for seed in seeds for arm in arms)
    go_through(jobs, out, models, until)


def run(arm: str, rate: float, seed: int, bench: Bench, steps: int = STEPS) -> dict[str, Any]:
    """Train an arm twice. `points` has the accuracies at the end of the run of `camopd sweep`, as other runs have them;
    where it stopped, those of this process, and `apart` is `None`."""
    started = time.perf_counter()
    student = bench.student()
    watch = Watch(bench, student, EVERY)
    stopped = distil(bench, student, watch, ARMS[arm], rate, seed, steps)["stopped"]
    here = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as name:
        trained = swept(Path(name), bench, arm, rate, seed, steps)
    apart = None
    if trained is not None:
        weights = zip(student.state_dict().values(), trained.state_dict().values(), strict=True)
        apart = max(float((one - other).abs().max()) for one, other in weights)
    return {
        "arm": arm, "learning_rate": rate, "seed": seed, "stopped": stopped, "apart": apart,
        "points": [{"step": steps, **bench.measure(trained or student)}], "in_one_process": bench.measure(student),
        "seconds_here": round(here, 1), "seconds": round(time.perf_counter() - started - here, 1),
    }  # fmt: skip


def swept(folder: Path, bench: Bench, arm: str, rate: float, seed: int, steps: int) -> LlamaForCausalLM | None:
    """What `camopd sweep` has trained, in an empty folder; `None` where its run has stopped, of which it says why."""
    write_files(folder, bench, arm, rate, seed, steps)
    words = [sys.executable, "-m", "camopd.cli", "sweep", str(folder / "sweep.yaml")]
    # Another number adds up in another order.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    ended = subprocess.run([*words, "--only", f"{arm}/seed-{seed}"], check=False, env={**os.environ, **threads})
    return None if ended.returncode else LlamaForCausalLM.from_pretrained(folder / "runs" / arm / f"seed-{seed}")


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
    sweep = {"output_dir": str(folder / "runs"), "configs": [str(folder / f"{arm}.yaml")], "seeds": [seed]}
    for name, content in {arm: {**paths, **settings}, "sweep": sweep}.items():
        atomic.write(folder / f"{name}.yaml", yaml.safe_dump(content, sort_keys=False))


def _difference(apart: float | None) -> str:
    return "stopped" if apart is None else f"{apart:.1e}" if apart else "0"


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
        rows.append([NAMES[each["arm"]], str(each["seed"]), *values, _difference(each["apart"])])
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
