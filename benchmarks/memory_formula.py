"""What a training step needs in memory: a formula, held to measured peaks of small models, and the table of docs/scale.md.

    python benchmarks/memory_formula.py [--rounds 1]     # measure and compare, then print the table
    python benchmarks/memory_formula.py --table          # the table alone

The formula counts, for a model of P weights with L layers, hidden size H, MLP size I, attention width A (query) and K (keys
and values, both), vocabulary V, and a micro-batch of N tokens, M of them of completions, with gradient checkpointing:

    weights + gradients + Adam     the bytes a weight of `RECIPES` and `SHARDED`, below
    checkpoints                    L N H c             inputs of the layers
    one layer, forward again       N (7 H + 2 A + 2 K + 4 I) c, and as much again for half of it in backward
    head                           M H (4 + c) + 2 x 4 V H + k min(M, 4096) W 4
    teacher in the process         its weights while it scores, before the step's activations; none for a server or an
                                   adapter

c is the bytes of a number of the forward, W the width of a vocabulary tile, k how many copies of a tile there are. Peaks
are those of small models with random weights, in float32, on a CPU, second update, each in a fresh process.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import memory
from measuring import RESULTS, in_fresh_process, make_tokenizer, reset_peak, run, write_report

from camopd.memory import Shape, activations


SMALL = (  # shape, prompt tokens, completion tokens
    (Shape(8, 512, 1536, 8, 4, 64, 16384, True), 32, 1024),
    (Shape(8, 512, 1536, 8, 4, 64, 16384, True), 32, 3072),
    (Shape(16, 512, 1024, 8, 8, 64, 8192, False), 64, 2048),
    (Shape(4, 1024, 4096, 16, 4, 64, 32768, True), 64, 1024),
    (Shape(4, 1024, 4096, 16, 4, 64, 32768, False), 512, 1536),
    (Shape(30, 576, 1536, 9, 3, 64, 49152, True), 24, 1024),  # SmolLM2-135M's
)
QWEN3_4B = Shape(36, 2560, 9728, 32, 8, 128, 151936, True)
QWEN3_8B = Shape(36, 4096, 12288, 32, 8, 128, 151936, False)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--report", type=Path, default=RESULTS / "memory_formula.md")
    options = parser.parse_args(argv)
    if options.table:
        print("\n".join(table()))
        return
    lines = ["# A formula for memory, and measured peaks", "", *compare(), "", *table(), ""]
    write_report([*lines, "Again: `python benchmarks/memory_formula.py`"], options.report)


def compare() -> list[str]:
    rows = [
        "| weights (M) | tokens | predicted (MiB) | measured (MiB) | predicted / measured |",
        "|---|---|---|---|---|",
    ]
    for shape, prompt, completion in SMALL:
        found = in_fresh_process(__file__, {"shape": asdict(shape), "prompt": prompt, "completion": completion})
        rows.append(row(shape, prompt, completion, on_cpu(shape, prompt, completion), found))
        print(rows[-1], flush=True)
    return rows


def on_cpu(shape: Shape, prompt: int, completion: int) -> float:
    """Bytes in float32: weights 4, gradients 4, Adam 8 a weight, and the teacher's weights, which stay where they are."""
    return 20 * shape.weights + activations(shape, prompt + completion, completion, 4, "cpu")


def on_gpu(shape: Shape, prompt: int, completion: int) -> float:
    """Bytes of float32 weights under bfloat16 autocast; the teacher is on the CPU by the time of the step's peak."""
    _, bytes_a_weight, number, _ = RECIPES[0]
    return bytes_a_weight * shape.weights + activations(shape, prompt + completion, completion, number, "cuda")


def row(shape: Shape, prompt: int, completion: int, predicted: float, found: dict[str, float]) -> str:
    """Of the table: bytes as predicted and what `measure` has found."""
    assert found["weights"] == shape.weights + shape.hidden, (found, shape.weights)  # the last norm
    predicted /= 2**20
    return (
        f"| {shape.weights / 1e6:.0f} | {prompt} + {completion} | {predicted:.0f} | {found['peak']:.0f} | "
        f"{predicted / found['peak']:.2f} |"
    )


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Peak MiB above the process before any model was made, in the second of two updates; float32 weights, and with `bf16`
    under autocast."""
    import torch

    import camopd.trainer  # noqa: F401 - its libraries take memory, too

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    before = reset_peak()
    shape = Shape(**job["shape"])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # where random numbers are drawn sooner
        student, teacher = make_llama(shape), make_llama(shape).eval().requires_grad_(False)
    lengths = {
        "prompt": job["prompt"],
        "tokens": job["completion"],
        "rows": 1,
        "steps": 2,
        "bf16": job.get("bf16", False),
    }
    trainer = memory.camopd_trainer(student, teacher, tokenizer, lengths)
    return {
        "peak": memory.peaks(trainer)[1]["whole"] - before,
        "weights": sum(p.numel() for p in student.parameters()),
    }


def make_llama(shape: Shape) -> Any:
    """A model of that shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.mlp, head_dim=shape.head_dim,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied, max_position_embeddings=16384, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# Bytes of a weight: the weight, its gradient, its float32 master where there is one, Adam's two moments. torchao keeps a
# float32 scale for every 256 numbers of a moment. Autocast keeps bfloat16 copies of float32 weights until a forward ends.
ADAM_8BIT, ADAM_4BIT = 2 * (1 + 4 / 256), 2 * (0.5 + 4 / 256)
RECIPES = (  # name, bytes of a weight, bytes of a number of the forward, whether the head has a gradient
    ("full, float32 weights, bf16 autocast", 4 + 4 + 8 + 2, 4, True),
    ("full, bf16 weights, stochastic rounding, 8-bit Adam", 2 + 2 + ADAM_8BIT, 2, True),
    ("full, bf16 weights, stochastic rounding, 4-bit Adam", 2 + 2 + ADAM_4BIT, 2, True),
    ("LoRA, bf16 weights", 2, 2, False),
)
SHARDED = (  # of N GPUs: bytes of a weight on each, with bf16: true
    ("ZeRO-2", lambda n: 2 + (2 + 4 + 8) / n),
    ("ZeRO-3, FSDP2", lambda n: (2 + 2 + 4 + 8) / n),
)


def table() -> list[str]:
    """Largest micro-batch (tokens of a sample of prompt and completion) that a GPU holds, in-process vLLM aside."""
    rows = [
        "| student | training on one GPU | weights, gradients, Adam (GiB) | tokens of a micro-batch on 80 GB | on 141 GB |",
        "|---|---|---|---|---|",
    ]
    students = (("Qwen3-4B", QWEN3_4B), ("Qwen3-8B", QWEN3_8B))
    for name, shape in students:
        for recipe, bytes_a_weight, number, trains_head in RECIPES:
            static = bytes_a_weight * shape.weights
            cells = [largest(shape, static, memory, number, trains_head) for memory in (80e9, 141e9)]
            rows.append(f"| {name} | {recipe} | {static / 2**30:.0f} | {cells[0]} | {cells[1]} |")
    rows += [
        "",
        "Full fine-tuning with float32 masters in shards, tokens of a micro-batch on each of N GPUs of 80 GB:",
        "",
        "| student | launched with | N = 1 | 2 | 4 | 8 |",
        "|---|---|---|---|---|---|",
    ]
    for name, shape in students:
        for launch, bytes_a_weight in SHARDED:
            cells = [largest(shape, bytes_a_weight(n) * shape.weights, 80e9, 2, True) for n in (1, 2, 4, 8)]
            rows.append(f"| {name} | {launch} | {' | '.join(cells)} |")
    return rows


def largest(shape: Shape, static: float, memory: float, number: int, trains_head: bool) -> str:
    room = 0.8 * memory - static  # the formula is up to 16 % low; CUDA takes some, too
    found = 0
    for tokens in range(1024, 131072 + 1, 1024):
        needed = activations(shape, tokens, tokens, number, "cuda")
        if not trains_head:
            needed -= 8 * shape.vocabulary * shape.hidden  # no gradient of the head
        if needed > room:
            break
        found = tokens
    more = " or more" if found == 131072 else ""  # where the search ends
    return f"{found:,}{more}" if found else "does not fit"


if __name__ == "__main__":
    run(main, measure)
