"""Peak memory of one update on long completions: camopd, TRL's DistillationTrainer, and plain logits.

    python benchmarks/memory.py [--tokens 2048] [--rows 1] [--rounds 3] [--model FOLDER]

All three take the same rollouts, student and teacher (SmolLM2-135M-Instruct from its wheel unless told otherwise), score
them and run forward and backward of the loss, without an optimizer. Each measurement is a fresh process; the three
alternate, and the table quotes medians of the peak above what was there before the step. `plain logits` is the textbook
form of the same loss as camopd's, with (B, T, V) logits. Writes benchmarks/results/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


CONTENDERS = ("camopd", "trl", "plain logits")
RESULT = Path(__file__).parent / "results" / "memory.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="completion tokens of each row")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if options.contender:
        print(json.dumps(measure(options.contender, options.model, options.rows, options.tokens)))
        return

    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            from camopd.demo import unpack_base_model

            options.model = unpack_base_model(Path(folder) / "model")
        # Without the Makefile's malloc settings, which keep freed pages.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for round_number in range(options.rounds):
            for name in CONTENDERS:
                command = [sys.executable, __file__, "--contender", name, "--model", options.model]
                command += ["--tokens", str(options.tokens), "--rows", str(options.rows)]
                run = subprocess.run(
                    command, capture_output=True, text=True, env=environment, check=False, encoding="utf-8"
                )
                if run.returncode:
                    sys.exit(f"{name} failed:\n{run.stderr[-3000:]}")
                found[name].append(json.loads(run.stdout.splitlines()[-1]))
                print(f"round {round_number + 1} {name}: {found[name][-1]}", flush=True)
    report(found, options)


def report(found: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    import torch
    import transformers
    import trl

    vocabulary = found["camopd"][0]["vocabulary"]
    full = options.rows * options.tokens * vocabulary * 4 / 2**20
    peaks = {name: statistics.median(row["peak_mib"] for row in rows) for name, rows in found.items()}
    lines = [
        "# Peak memory of one update",
        "",
        f"{options.rows} rows of {options.tokens} completion tokens, vocabulary of {vocabulary:.0f}, float32, on "
        f"{found['camopd'][0]['device']}: one (B, T, V) float32 tensor would be **{full:.0f} MiB**.",
        f"Medians of {options.rounds} alternating rounds, each in a fresh process. The peak is above what was there before",
        "the step (weights of student and teacher); it includes one copy of the gradients.",
        "",
        "| | peak above weights (MiB) | ratio to camopd |",
        "|---|---|---|",
    ]
    for name in CONTENDERS:
        lines.append(f"| {name} | {peaks[name]:.0f} | {peaks[name] / peaks['camopd']:.2f} |")
    lines += [
        "",
        f"Gradients alone are {found['camopd'][0]['gradients_mib']:.0f} MiB. torch {torch.__version__}, transformers "
        f"{transformers.__version__}, trl {trl.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} CPU cores.",
        "",
        f"Again: `python benchmarks/memory.py --tokens {options.tokens} --rows {options.rows} --rounds {options.rounds}`",
        "",
    ]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def measure(contender: str, model_path: str, rows: int, tokens: int) -> dict[str, float]:
    """Peak MiB above the weights of one scoring and update."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).to(device) for _ in range(2)
    )
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.01)
    teacher.eval().requires_grad_(False)
    prompts = [torch.randint(100, 10_000, (32,)).tolist() for _ in range(rows)]
    completions = [torch.randint(100, 10_000, (tokens,)).tolist() for _ in range(rows)]
    step = {"camopd": camopd_step, "trl": trl_step, "plain logits": plain_step}[contender](
        student, teacher, tokenizer, prompts, completions
    )
    before = reset_peak(device)
    step().backward()
    return {
        "peak_mib": peak(device) - before,
        "vocabulary": student.config.vocab_size,
        "gradients_mib": sum(p.grad.numel() * 4 for p in student.parameters() if p.grad is not None) / 2**20,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
    }


def settings(folder: str) -> dict:
    return {
        "output_dir": folder,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": True,
        "save_strategy": "no",
    }


def camopd_step(student, teacher, tokenizer, prompts, completions):
    import torch
    from datasets import Dataset

    from camopd import CaMOPDConfig, CaMOPDTrainer
    from camopd.metrics import ImportanceStats
    from camopd.trainer import Rollouts

    rows = Dataset.from_list([{"prompt": "x"}])
    trainer = CaMOPDTrainer(
        model=student,
        teachers={"general": teacher},
        args=CaMOPDConfig(
            prompts_per_step=len(prompts), per_device_train_batch_size=len(prompts), schedule="general:1",
            score_batch_size=len(prompts), selection=False, max_prompt_length=len(prompts[0]),
            max_completion_length=len(completions[0]), **settings(tempfile.mkdtemp()),
        ),
        train_dataset={"general": rows},
        processing_class=tokenizer,
    )  # fmt: skip
    student.gradient_checkpointing_enable()

    def step():
        rollouts = Rollouts(
            branch=["general"] * len(prompts),
            position=list(range(len(prompts))),
            token_ids=[prompt + completion for prompt, completion in zip(prompts, completions, strict=True)],
            prompt_len=[len(prompt) for prompt in prompts],
            mask=[torch.ones(len(completion), dtype=torch.bool) for completion in completions],
            length=[len(completion) for completion in completions],
            truncated=[True] * len(prompts),
            rollout_logps=None,
        )
        trainer._score(rollouts, ["general"])
        kept, num_kept = trainer._select(rollouts)
        (batch,) = trainer._to_micro_batches(rollouts, kept, num_kept)
        trainer._importance = ImportanceStats()
        student.train()
        return trainer.compute_loss(student, batch)

    return step


def trl_step(student, teacher, tokenizer, prompts, completions):
    import torch
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(per_device_train_batch_size=len(prompts), **settings(tempfile.mkdtemp())),
        train_dataset=Dataset.from_list([{"prompt": "x"}] * len(prompts)),
        processing_class=tokenizer,
    )
    student.gradient_checkpointing_enable()
    student.train()
    device = student.device

    def step():
        inputs = {
            "prompt_ids": torch.tensor(prompts, device=device),
            "prompt_mask": torch.ones(len(prompts), len(prompts[0]), dtype=torch.long, device=device),
            "completion_ids": torch.tensor(completions, device=device),
            "completion_mask": torch.ones(len(completions), len(completions[0]), dtype=torch.long, device=device),
            "num_items_in_batch": torch.tensor(float(sum(map(len, completions))), device=device),
        }
        return trainer.compute_loss(student, inputs)

    return step


def plain_step(student, teacher, tokenizer, prompts, completions):
    import torch

    student.gradient_checkpointing_enable()
    student.train()

    def step():
        ids = torch.tensor([p + c for p, c in zip(prompts, completions, strict=True)], device=student.device)
        start = len(prompts[0])

        def logps(model):
            logits = model(ids, use_cache=False).logits[:, start - 1 : -1]
            return logits.log_softmax(dim=-1).gather(-1, ids[:, start:, None]).squeeze(-1)

        with torch.no_grad():
            gaps = logps(teacher) - logps(student)
        return -(gaps * logps(student)).mean(dim=1).mean()

    return step


def reset_peak(device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="utf-8"
    )  # the kernel's high-water mark of resident memory starts over
    return peak(device)


def peak(device) -> float:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    (line,) = [
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
