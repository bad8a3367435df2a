"""Peak memory of one update on long completions: camopd, TRL's DistillationTrainer, and plain logits.

    python benchmarks/memory.py [--tokens 2048] [--rows 1] [--rounds 3] [--model FOLDER]

All three take the same completions, student and teacher (SmolLM2-135M-Instruct from its wheel unless told otherwise), score
them and run forward and backward of the loss; the measurement ends before the optimizer's first step. Each is a fresh
process; the three alternate, and the table quotes medians of the peak above what was there before the step. `plain logits`
is the textbook form of the same loss as camopd's, with (B, T, V) logits. Writes benchmarks/results/memory.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measuring import (
    RESULTS,
    Scripted,
    base_model,
    in_fresh_process,
    peak,
    reset_peak,
    run,
    same_prompts,
    temporary_folder,
    versions,
    write_report,
)


CONTENDERS = ("camopd", "trl", "plain logits")
PROMPT = 32  # tokens


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="completion tokens of each row")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--report", type=Path, default=RESULTS / "memory.md")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        job = {"model": base_model(options.model, folder), "rows": options.rows, "tokens": options.tokens}
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for round_number in range(options.rounds):
            for name in CONTENDERS:
                found[name].append(in_fresh_process(__file__, {**job, "contender": name}))
                print(f"round {round_number + 1} {name}: {found[name][-1]}", flush=True)
    write_report(report(found, options), options.report)


def report(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> list[str]:
    vocabulary = found["camopd"][0]["vocabulary"]
    full = options.rows * options.tokens * vocabulary * 4 / 2**20
    medians = {name: statistics.median(row["peak_mib"] for row in rows) for name, rows in found.items()}
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
        lines.append(f"| {name} | {medians[name]:.0f} | {medians[name] / medians['camopd']:.2f} |")
    return [
        *lines,
        "",
        f"Gradients alone are {found['camopd'][0]['gradients_mib']:.0f} MiB. {versions()}, {os.cpu_count()} CPU cores.",
        "",
        f"Again: `python benchmarks/memory.py --tokens {options.tokens} --rows {options.rows} --rounds {options.rounds}`",
    ]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Peak MiB above the weights of one scoring and update."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).to(device) for _ in range(2)
    )
    with torch.no_grad():
        # The student's, too, so that its pages are read from the file by now.
        for model, factor in ((student, 1.0), (teacher, 1.01)):
            for parameter in model.parameters():
                parameter.mul_(factor)
    teacher.eval().requires_grad_(False)
    if job["contender"] == "plain logits":
        peak_mib = plain_peak(student, teacher, tokenizer, job)
    else:
        trainer = {"camopd": camopd_trainer, "trl": trl_trainer}[job["contender"]]
        peak_mib = peaks(trainer(student, teacher, tokenizer, job))[0]["until the optimizer"]
    return {
        "peak_mib": peak_mib,
        "vocabulary": student.config.vocab_size,
        "gradients_mib": sum(p.numel() * 4 for p in student.parameters() if p.requires_grad) / 2**20,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
    }


def peaks(trainer: Any) -> list[dict[str, float]]:
    """Of each step of a run, MiB at its peak above what was there when it began, and the peak itself."""
    from transformers import TrainerCallback

    steps: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.before = reset_peak()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            steps.append({"until the optimizer": peak() - self.before})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps[-1]["whole"] = peak()

    trainer.add_callback(Watch())
    trainer.train()
    return steps


def settings(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {
        "output_dir": temporary_folder(), "bf16": job.get("bf16", False), "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000,
        "max_steps": job.get("steps", 1), "per_device_train_batch_size": job["rows"],
        "max_completion_length": job["tokens"],
    }  # fmt: skip


def camopd_trainer(student: Any, teacher: Any, tokenizer: Any, job: dict[str, Any]) -> Any:
    from camopd import CaMOPDConfig, CaMOPDTrainer

    prompt = job.get("prompt", PROMPT)
    trainer = CaMOPDTrainer(
        model=student,
        teachers={"general": teacher},
        args=CaMOPDConfig(
            prompts_per_step=job["rows"], schedule="general:1", score_tokens=10**6, selection=False,
            max_prompt_length=prompt, importance_sampling_mode="none", diagnostics_steps=0,
            **settings(job),
        ),
        train_dataset={"general": same_prompts(job["rows"], prompt, tokenizer)},
        processing_class=tokenizer,
    )  # fmt: skip
    Scripted([job["tokens"]] * job["rows"], student.config.vocab_size).hand_out(trainer)
    return trainer


def trl_trainer(student: Any, teacher: Any, tokenizer: Any, job: dict[str, Any]) -> Any:
    from trl import DistillationConfig, DistillationTrainer

    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(**settings(job)),
        train_dataset=same_prompts(job["rows"], PROMPT, tokenizer),
        processing_class=tokenizer,
    )
    Scripted([job["tokens"]] * job["rows"], student.config.vocab_size).hand_out(trainer)
    return trainer


def plain_peak(student: Any, teacher: Any, tokenizer: Any, job: dict[str, Any]) -> float:
    """MiB of the step without a trainer."""
    import torch

    student.gradient_checkpointing_enable()
    student.train()
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in same_prompts(job["rows"], PROMPT, tokenizer)]
    completions = Scripted([job["tokens"]] * job["rows"], student.config.vocab_size).generate(prompts)[1]
    before = reset_peak()
    ids = torch.tensor([p + c for p, c in zip(prompts, completions, strict=True)], device=student.device)
    start = len(prompts[0])

    def logps(model: Any) -> torch.Tensor:
        logits = model(ids, use_cache=False).logits[:, start - 1 : -1]
        return logits.log_softmax(dim=-1).gather(-1, ids[:, start:, None]).squeeze(-1)

    with torch.no_grad():
        gaps = logps(teacher) - logps(student)
    (-(gaps * logps(student)).mean(dim=1).mean()).backward()
    return peak() - before


if __name__ == "__main__":
    run(main, measure)
