"""bfloat16 weights against float32 ones: what is learnt, how many weights move, and what it takes in memory.

    python benchmarks/bf16_weights.py [--steps 8] [--demo FOLDER] [--keep FOLDER]

The demo's recovery, SmolLM2-135M-Instruct, from one bfloat16 checkpoint, with the same seeds, prompts and batches, and
bfloat16 autocast throughout; what differs is the dtype of the weights and the optimizer. Every run is a fresh process. The
gaps before and after are those of the weights in float32, on the same held-out prompts with the same random numbers. The
student is the demo's specialised model, from the output folder of a demo, or one made with fewer steps. Writes
benchmarks/results/bf16_weights.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measuring import (
    RESULTS,
    demo_folder,
    demo_trainer,
    in_fresh_process,
    metrics_of,
    peak,
    reset_peak,
    run,
    write_report,
)


BRANCHES = ("general", "domain")
RATES = (2e-6, 4e-5)  # the paper's and the demo's
ARMS = {  # dtype of the weights, optim, optim_args
    "float32": ("float32", "adamw_torch", None),
    "bfloat16, rounded to nearest": ("bfloat16", "adamw_torch", None),
    "bfloat16, stochastic rounding": ("bfloat16", "torchao AdamW", None),
    "bfloat16, stochastic rounding, 8-bit Adam": ("bfloat16", "adamw_torch_8bit", "bf16_stochastic_round=True"),
}
HELDOUT, PROMPTS, TOKENS = 24, 8, 24


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--demo", type=Path, help="output folder of camopd demo")
    parser.add_argument("--keep", type=Path, help="folder for weights and numbers; what is there is not run again")
    parser.add_argument("--report", type=Path, default=RESULTS / "bf16_weights.md")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        work = options.keep or Path(folder)
        work.mkdir(exist_ok=True)
        finetune = {"finetune_steps": 6, "finetune_batch": 4, "finetune_learning_rate": 3e-4}
        demo = demo_folder(options.demo, work / "demo", **finetune)
        general, start = demo / "general", work / "start"
        as_bfloat16(demo / "seed-0" / "specialised", start)
        common = {
            "general": str(general), "start": str(start), "prompts": str(demo / "prompts"), "steps": options.steps,
        }  # fmt: skip
        found: dict[str, Any] = {"before": once({**common, "evaluate": str(start)}, work / "before.json")}
        for rate in RATES:
            for number, arm in enumerate(ARMS):
                name = f"{number}-{rate:g}"
                job = {**common, "arm": arm, "rate": rate, "out": str(work / name)}
                trained = once(job, work / f"{name}.json")
                ends = {"evaluate": str(work / name), "reference": str(work / f"0-{rate:g}")}
                found[name] = {**trained, **once({**common, **ends}, work / f"{name}-end.json")}
                print(arm, rate, found[name], flush=True)
    write_report(report(found, options.steps), options.report)


def once(job: dict[str, Any], path: Path) -> Any:
    """What a fresh process finds for a job, kept in a file."""
    if not path.exists():
        path.write_text(json.dumps(in_fresh_process(__file__, job)), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def as_bfloat16(source: Path, target: Path) -> None:
    """The checkpoint that all runs start from: float32 runs load these very weights, so that rounding them costs none."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not target.exists():
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
        AutoTokenizer.from_pretrained(source).save_pretrained(target)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    return evaluate(job) if "evaluate" in job else train(job)


def make_trainer(job: dict[str, Any], model: Any, output_dir: str, optimizer: Any = None, **settings: Any) -> Any:
    return demo_trainer(
        model, {"general": job["general"], "domain": job["start"]}, Path(job["prompts"]), HELDOUT, optimizer,
        output_dir=output_dir, max_steps=job["steps"], prompts_per_step=PROMPTS, max_completion_length=TOKENS,
        diagnostics_steps=0, **settings,
    )  # fmt: skip


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Share of changed weights per step, bytes, and peak memory of one run, whose weights are saved."""
    import torch
    from transformers import AutoModelForCausalLM

    class RoundsToNearest(torch.optim.AdamW):
        """torch's, which the trainer refuses for bfloat16 weights; of a class that it does not know it only warns."""

        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    dtype, optim, optim_args = ARMS[job["arm"]]
    model = AutoModelForCausalLM.from_pretrained(job["start"], dtype=getattr(torch, dtype))
    optimizer = None
    if optim == "torchao AdamW":
        from torchao.optim import _AdamW

        optimizer, optim = (
            _AdamW(model.parameters(), lr=job["rate"], weight_decay=0.0, bf16_stochastic_round=True),
            "adamw_torch",
        )
    if job["arm"] == "bfloat16, rounded to nearest":
        optimizer = RoundsToNearest(model.parameters(), lr=job["rate"], weight_decay=0.0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            job, model, folder, optimizer, learning_rate=job["rate"], bf16=True, optim=optim, optim_args=optim_args
        )
        sizes: dict[str, int] = {}

        def count(stepped: Any, *_: Any) -> None:  # before the gradients are cleared
            params = [param for group in stepped.param_groups for param in group["params"]]
            sizes["weights"] = sum(map(nbytes, params))
            sizes["gradients"] = sum(nbytes(param.grad) for param in params)
            sizes["optimizer"] = sum(
                nbytes(value)
                for state in stepped.state.values()
                for value in state.values()
                if isinstance(value, torch.Tensor)
            )

        trainer.create_optimizer().register_step_post_hook(count)
        loaded = reset_peak()
        trainer.train()
        grown = peak() - loaded
        steps = metrics_of(folder)
        trainer.model.save_pretrained(job["out"])
    return {
        "changed": [step["update/changed_share"] for step in steps],
        "seconds": [step["time/step"] for step in steps],
        "bytes": sizes,
        "peak": sizes["weights"] / 2**20 + grown,
    }


def nbytes(tensor: Any) -> int:
    """Bytes of a tensor; of the parts of one that torchao has quantised."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def evaluate(job: dict[str, Any]) -> dict[str, Any]:
    """Held-out gaps of weights, in float32 throughout; and how far they came along the way of the float32 run.

    That is <d, d32> / <d32, d32> of the ways d from the start; `differ` is the share of weights that are others at the end.
    """
    import torch
    from transformers import AutoModelForCausalLM

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(job[name], dtype=torch.float32)

    result: dict[str, Any] = {}
    if "reference" in job:
        start, end, reference = (dict(load(name).named_parameters()) for name in ("start", "evaluate", "reference"))
        both = own = changed = total = 0.0
        for name, weight in start.items():
            way, way32 = ((weights[name] - weight).detach().double() for weights in (end, reference))
            both, own = both + (way * way32).sum().item(), own + way32.square().sum().item()
            changed, total = changed + int((way != 0).sum()), total + way.numel()
        result = {"along": both / own, "differ": changed / total}
        del start, end, reference
    with tempfile.TemporaryDirectory() as folder:
        found = make_trainer(job, load("evaluate"), folder, bf16=False).evaluate()
    gaps = {branch: [found[f"eval_{branch}_kl"], found[f"eval_{branch}_kl_se"]] for branch in BRANCHES}
    return {**result, "gaps": gaps}


def report(found: dict[str, Any], steps: int) -> list[str]:
    before = found["before"]["gaps"]
    lines = [
        "# bfloat16 weights against float32 ones",
        "",
        f"SmolLM2-135M-Instruct as in the demo, {steps} steps of {PROMPTS} prompts and at most {TOKENS} tokens, from one",
        "bfloat16 checkpoint, the same seeds, bfloat16 autocast, one thread of a shared CPU. Gaps are sampled reverse KL",
        f"on {HELDOUT} held-out prompts a branch, nats per token (± standard error over prompts), of the weights in",
        "float32 with the same random numbers. *Changed* is `update/changed_share`, the least and the most of the steps.",
        "*Along* is the projection of the weights' way on that of the float32 run; 1 is as far in its direction.",
        "",
    ]
    for rate in RATES:
        lines += [
            f"## learning_rate {rate:g}",
            "",
            "| weights | general gap | domain gap | changed by a step | differ at the end | along |",
            "|---|---|---|---|---|---|",
            f"| before | {cell(before['general'])} | {cell(before['domain'])} | | | |",
        ]
        for number, arm in enumerate(ARMS):
            row = found[f"{number}-{rate:g}"]
            changed = row["changed"]
            lines.append(
                f"| {arm} | {cell(row['gaps']['general'])} | {cell(row['gaps']['domain'])} | "
                f"{min(changed):.2%} to {max(changed):.2%} | {row['differ']:.2%} | {row['along']:.2f} |"
            )
        lines.append("")
    lines += [
        "## Memory",
        "",
        "MiB of the tensors, counted, and bytes a weight. *Peak* is the most that the process held in the run, above the",
        "teachers and the libraries: weights, gradients, optimizer, activations, and what a step needs beside them.",
        "",
        "| weights | weights | gradients | optimizer | sum | bytes a weight | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, arm in enumerate(ARMS):
        row = found[f"{number}-{RATES[0]:g}"]
        sizes = row["bytes"]
        numbers = sizes["weights"] / (4 if arm == "float32" else 2)
        whole = sum(sizes.values())
        cells = [f"{sizes[name] / 2**20:.0f}" for name in ("weights", "gradients", "optimizer")]
        lines.append(
            f"| {arm} | {' | '.join(cells)} | {whole / 2**20:.0f} | {whole / numbers:.2f} | {row['peak']:.0f} |"
        )
    return [*lines, "", f"Again: `python benchmarks/bf16_weights.py --steps {steps}`"]


def cell(gap: list[float]) -> str:
    return f"{gap[0]:.4f} ± {gap[1]:.4f}"


if __name__ == "__main__":
    run(main, measure)
