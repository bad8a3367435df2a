"""How the cost of a step grows, and what that says about a run on 4 x 8 H100.

    python benchmarks/scaling.py

Measures all but the rollout of a step (scores, selection, forward and backward) on a small model with scripted
completions of log-normal length, while prompts, lengths and processes (CPU, one thread each) grow. Then it prices the
paper's run (512 prompts a step, 8B student, 32 GPUs) with a sum whose terms are marked *measured* (in this repository)
or *assumed*, and says with the model of `step_model.py` what comes of GPUs that do not wait for each other. Writes
benchmarks/results/scaling.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from measuring import (
    RESULTS,
    Scripted,
    in_fresh_process,
    log_normal_lengths,
    make_tokenizer,
    metrics_of,
    run,
    same_prompts,
    temporary_folder,
    write_report,
)
from step_model import Rates, seconds_a_step, stages


MODEL = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SETUPS = [
    *({"prompts": prompts, "median": 64, "processes": 1} for prompts in (16, 32, 64)),
    *({"prompts": 32, "median": median, "processes": 1} for median in (32, 128)),
    {"prompts": 32, "median": 64, "processes": 2},
]
PROMPT, CAP = 16, 1024
# Of the paper's run, all but the first two assumed: weights, prompts, operations a second of an H100 and shares of them;
# tokens a second that vLLM decodes for all sequences and for one, sequences at once, kept share, seconds of a weight sync.
WEIGHTS, PROMPTS, FLOPS, TRAIN_SHARE, SCORE_SHARE = 8.19e9, 512, 989e12, 0.40, 0.50
DECODE, ALONE, SLOTS, KEPT, SYNC = 2500, 60, 256, 0.7, 5.0


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--report", type=Path, default=RESULTS / "scaling.md")
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    lines = [
        "# How the cost of a step grows",
        "",
        "All but the rollout, a Llama of 4 layers and width 256, float32 on a CPU with one thread a process, completions",
        "of log-normal length (sigma 1), micro-batches of 4 samples, mass target 0.8; medians of 3 steps after one.",
        "",
        "| prompts | median tokens | processes | score (s) | forward and backward (s) | tokens of the kept | "
        "microseconds a trained token and process | padding | imbalance |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for setup in SETUPS:
        found = in_fresh_process(__file__, {**setup, "model": MODEL, "cap": CAP}, processes=setup["processes"])
        per_token = 1e6 * found["time/train"] * setup["processes"] / found["train/tokens"]
        lines.append(
            f"| {setup['prompts']} | {setup['median']} | {setup['processes']} | {found['time/score']:.2f} | "
            f"{found['time/train']:.2f} | {found['train/tokens']:.0f} | {per_token:.0f} | {found['train/padding']:.3f} | "
            f"{found['train/imbalance']:.3f} |"
        )
        print(lines[-1], flush=True)
    write_report([*lines, "", *price(), "", *price_servers()], options.report)


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Medians over three steps, after one, of what metrics.jsonl has."""
    import torch
    from accelerate.utils import broadcast_object_list
    from transformers import LlamaConfig, LlamaForCausalLM

    from camopd import CaMOPDConfig, CaMOPDTrainer

    def model(seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**job["model"]))

    args = CaMOPDConfig(
        output_dir=temporary_folder(), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        max_steps=4, prompts_per_step=job["prompts"], per_device_train_batch_size=4, schedule="general:1",
        max_prompt_length=PROMPT, max_completion_length=job["cap"], logging_steps=1000, importance_sampling_mode="none",
    )  # fmt: skip
    tokenizer = make_tokenizer()
    trainer = CaMOPDTrainer(
        model=model(1), teachers={"general": model(2)}, args=args, processing_class=tokenizer,
        train_dataset={"general": same_prompts(job["prompts"], PROMPT, tokenizer)},
    )  # fmt: skip
    lengths = log_normal_lengths(job["prompts"], job["median"], job["cap"])
    share = job["prompts"] // args.world_size
    mine = lengths[args.process_index * share :][:share]
    Scripted(mine, job["model"]["vocab_size"], seed=args.process_index).hand_out(trainer)
    trainer.train()
    (folder,) = broadcast_object_list([args.output_dir])  # whose file all processes read: that of the first
    steps = metrics_of(folder)[1:]
    return {
        name: statistics.median(step[name] for step in steps)
        for name in steps[0]
        if name.startswith(("time", "train"))
    }


def price() -> list[str]:
    """The paper's step, 512 prompts on 32 GPUs, in seconds of GPU time, term by term."""
    weights, prompts, prompt, completion, gpus = WEIGHTS, PROMPTS, 500, 6000, 32
    kept, padding, imbalance = KEPT, 0.0, 0.03
    flops, train_share, score_share, decode = FLOPS, TRAIN_SHARE, SCORE_SHARE, DECODE
    rows = [
        ("prompts a step", prompts, "the paper"),
        ("tokens of a prompt, of a completion", f"{prompt}, {completion}", "assumed; the paper caps at 4096 and 32768"),
        ("kept share of the tokens", kept, "assumed; 0.6 to 0.8 at mass target 0.8 in the runs of this repository"),
        ("padding, imbalance", f"{padding}, {imbalance}", "0 without padding; imbalance measured, tests/test_balance.py"),
        ("operations a token: forward; forward, backward and recomputation", "2 x, 8 x weights", "counted"),
        ("peak of an H100, share of it in training, scoring", f"989 TFLOP/s, {train_share}, {score_share}", "assumed"),
        ("tokens a second and GPU that vLLM decodes", decode, "assumed"),
        ("bytes of a scored token from a vLLM teacher", "5.4 or 73", "measured, benchmarks/results/teacher_scoring.md"),
        ("bytes of a completion token that is rebalanced", 16, "counted: id, mask, gap, log mu of the engine"),
    ]  # fmt: skip
    tokens = prompts * (prompt + completion)
    rollout = prompts * completion / decode / gpus
    score = 2 * weights * tokens / (flops * score_share) / gpus
    teacher = score
    train = 8 * weights * tokens * kept * (1 + imbalance) / (flops * train_share) / gpus
    micro_batches = max(1, round(tokens * kept / gpus / 36864))
    gathers = 3 * 2 * weights * (31 / 32) * micro_batches / 50e9  # bytes over 400 Gbit/s a GPU
    rebalance = tokens * kept * 16 / gpus / 50e9
    wire = prompts * completion * 73 / 1.25e9
    terms = [
        ("rollout, all GPUs, the longest completion aside", rollout),
        ("student's log-probs for the gaps (0 with `student_logps: engine`)", score),
        ("teacher, on as many GPUs of its own; hidden behind the line above", teacher),
        ("teacher's answers as JSON over 10 Gbit/s; hidden, too", wire),
        ("forward and backward of the kept samples", train),
        (f"ZeRO-3's gathers, {micro_batches} micro-batches at 50 GB/s a GPU, if nothing hides them", gathers),
        ("rebalance of the kept samples", rebalance),
    ]
    return [
        "## The paper's step, priced",
        "",
        "| term | value | where from |",
        "|---|---|---|",
        *(f"| {name} | {value} | {source} |" for name, value, source in rows),
        "",
        "| | seconds of a step |",
        "|---|---|",
        *(f"| {name} | {seconds:.2f} |" for name, seconds in terms),
        "",
        f"Together, without what is hidden: {rollout + score + train + gathers + rebalance:.0f} s a step. The paper "
        "reports about 7 hours for 120 steps on 32 H100, 210 s a step, without saying how long completions were: in this "
        "sum the rollout waits for no straggler, and with a few completions at the cap it would take as long as those do "
        "(32,768 tokens at 60 a second are 546 s).",
        "Of these terms only the shares of the peak have been seen on a GPU, one H200 with a model of 0.6 billion weights",
        "([gpu.md](gpu.md)): 0.29 to 0.36 of 989 TFLOP/s in training and 0.27 to 0.36 in scoring,",
        "**less than is assumed here**.",
    ]


def price_servers() -> list[str]:
    """The same step with GPUs that roll out, score or train, as configs/medical.yaml has them, by the model of a step."""
    lengths = {"all of 6,000": [6000] * PROMPTS, "log-normal": log_normal_lengths(PROMPTS, 3640, 32768)}
    forward, trained = (
        FLOPS * SCORE_SHARE / (2 * WEIGHTS),
        FLOPS * TRAIN_SHARE / (8 * WEIGHTS),
    )  # tokens a second and GPU

    def cells(rollout: int, teacher: int, train: int, kept: float, lag: int, streaming: bool) -> str:
        rates = Rates(rollout, SLOTS, ALONE, DECODE, teacher * forward, train * forward, train * trained)
        found = []
        for completions in lengths.values():
            step = stages([500] * PROMPTS, completions, kept, rates, streaming, idle_trainer=streaming and not lag)
            seconds = seconds_a_step([step], SYNC, lag, streaming)
            found.append(
                f"{step.rollout:.0f} | {max(step.teacher, step.student):.0f} | {step.train:.0f} | {seconds:.0f}"
            )
        return " | ".join(found)

    rows = (
        ("one after the other, selection off", 8, 8, 16, 1.0, 0, False),
        ("one after the other", 8, 8, 16, KEPT, 0, False),
        ("streaming", 8, 8, 16, KEPT, 0, True),
        ("one step ahead", 8, 8, 16, KEPT, 1, False),
        ("one step ahead, streaming", 8, 8, 16, KEPT, 1, True),
        ("the same, 12 roll out, 4 score", 12, 4, 16, KEPT, 1, True),
        ("the same, 20 roll out, 4 score, 8 train", 20, 4, 8, KEPT, 1, True),
    )
    longest, mean = max(lengths["log-normal"]), sum(lengths["log-normal"]) / PROMPTS
    columns = " | ".join(f"{what} ({name})" for name in lengths for what in ("rollout", "then score", "train", "step"))
    return [
        "## The same with servers, and what is left when nobody waits",
        "",
        "16 GPUs train, 8 roll out and 8 score, as in configs/medical.yaml; the model of `benchmarks/step_model.py`, with",
        f"the rates above and, *assumed*: {ALONE} tokens a second of a sequence alone, {SLOTS} sequences a server at once,",
        f"{SYNC:.0f} s a weight sync. Lengths are *assumed*, too: all 6,000 tokens, or log-normal (sigma 1, median 3,640,",
        f"cut at the paper's 32,768; mean {mean:,.0f}). Seconds; selection keeps {KEPT} of the tokens. *Then score* is",
        "what is left of scoring when the last completion is there.",
        "",
        f"| | {columns} |",
        "|---" * (1 + 4 * len(lengths)) + "|",
        *(f"| {name} | {cells(*settings)} |" for name, *settings in rows),
        "",
        "One step ahead hides scoring and training behind the rollout, or the other way round; nothing hides the longest",
        f"completion, which alone takes {longest / ALONE:.0f} s here, whatever the number of servers: then a step ahead",
        "and streaming bring little, and shorter completions (`max_completion_length`) bring most.",
        "**No rate of this table has been measured on a GPU**; `benchmarks/step_model.py` holds the model to the",
        "metrics.jsonl of real runs.",
    ]


if __name__ == "__main__":
    run(main, measure)
