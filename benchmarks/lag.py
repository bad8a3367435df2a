"""What `rollout_lag: 1` costs in quality: the demo's models, equal prompts, with and without it, several seeds.

    python benchmarks/lag.py [--rollout-server URL] [--demo demo-output] [--seeds 3] [--steps 8]

A LoRA adapter is trained, since vLLM on a CPU cannot be given all weights of a model with tied embeddings; the server has
the demo's specialised model, and takes adapters (`camopd serve --student`). Without a URL it is one in the same process,
which answers as vLLM does and runs the model with transformers in float32: on a CPU vLLM's adapters give 0.1 tokens a
second. Both runs of a seed draw the same prompts with the same seeds and score with the same teachers, in the process; only
the weights that completions are drawn with differ, by one update.
Held-out gaps are those of the same prompts before and after, so a difference between the two is paired by seed. A run is
one file in build/lag, and is not run again; writes benchmarks/results/lag.md, anew after each seed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import RESULTS, demo_trainer, in_fresh_process, metrics_of, run, versions, write_report
from testbed.signs import said, t_interval

from camopd import atomic


BRANCHES = ("general", "domain")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rollout-server", help="URL of a vLLM server")
    parser.add_argument("--demo", type=Path, default=Path("demo-output"), help="output folder of `camopd demo`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=12, help="of a step")
    parser.add_argument("--tokens", type=int, default=40, help="longest completion")
    parser.add_argument("--heldout", type=int, default=40, help="held-out prompts of each branch")
    parser.add_argument("--rate", type=float, default=4e-4, help="learning rate, of LoRA")
    parser.add_argument("--report", type=Path, default=RESULTS / "lag.md")
    parser.add_argument("--runs", type=Path, default=Path("build") / "lag", help="folder of what each run has found")
    options = parser.parse_args(argv)
    found: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for seed in range(options.seeds):
        for lag in (0, 1) if seed % 2 == 0 else (1, 0):
            job = {
                **{name: getattr(options, name) for name in ("steps", "prompts", "tokens", "heldout", "rate")},
                "server": options.rollout_server, "demo": str(options.demo), "seed": seed, "lag": lag,
            }  # fmt: skip
            found[lag].append(done_before(options.runs / f"{seed}-lag_{lag}.json", job))
            print(f"seed {seed}, lag {lag}:", found[lag][-1], flush=True)
        write_report(table(found, options), options.report)


def done_before(file: Path, job: dict[str, Any]) -> dict[str, float]:
    """What the run of that file has found, which is run where it is not there or was another one."""
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["job"] == job:
            found: dict[str, float] = kept["found"]
            return found
    found = in_fresh_process(__file__, job)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, json.dumps({"job": job, "found": found}) + "\n")
    return found


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Train once; held-out KL to both teachers before and after, and how far trainer and sampler are from each other."""
    from peft import LoraConfig

    demo = Path(job["demo"])
    models = {"general": str(demo / "general"), "domain": str(demo / "seed-0" / "specialised")}
    with tempfile.TemporaryDirectory() as folder, rollout_server(job["server"], models["domain"]) as server:
        trainer = demo_trainer(
            models["domain"], models, demo / "prompts", job["heldout"], output_dir=folder, seed=job["seed"],
            max_steps=job["steps"], prompts_per_step=job["prompts"], max_completion_length=job["tokens"],
            learning_rate=job["rate"], model_init_kwargs={"dtype": "float32"}, bf16=False, rollout_servers=[server],
            rollout_lag=job["lag"], diagnostics_steps=0, logging_steps=1,
            peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"),
        )  # fmt: skip
        before = trainer.evaluate()
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        after = trainer.evaluate()
        lines = metrics_of(folder)
        trainer.run.sampler.close()
    assert [line["rollout/lag"] for line in lines] == [0] + [job["lag"]] * (job["steps"] - 1)
    return {
        **{f"{branch} before": before[f"eval_{branch}_kl"] for branch in BRANCHES},
        **{f"{branch} after": after[f"eval_{branch}_kl"] for branch in BRANCHES},
        "log_ratio": statistics.fmean(line["importance/log_ratio"] for line in lines),
        "outside band": statistics.fmean(line["importance/outside_band"] for line in lines),
        "seconds": seconds,
    }


@contextlib.contextmanager
def rollout_server(url: str | None, model: str) -> Iterator[str]:
    """The URL, or that of a server in this process that has the model of a folder and is gone at the end."""
    if url is not None:
        yield url
        return
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from fake_rollouts import FakeRollouts
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = FakeRollouts(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        AutoTokenizer.from_pretrained(model),
        max_model_len=512,
    )
    with contextlib.closing(made) as server:
        yield server.url


def table(found: dict[int, list[dict[str, float]]], options: argparse.Namespace) -> list[str]:
    """The report: each run, and the differences between the two of a seed."""
    names = list(found[0][0])
    lines = [
        "# What a step ahead costs in quality",
        "",
        "Held-out sampled KL to the two teachers (nats per token) before and after; `log_ratio` and `outside band` are "
        "means of `importance/*` over the steps.",
        "",
        "| seed | lag | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for seed in range(len(found[0])):
        for lag, runs in found.items():
            lines.append(f"| {seed} | {lag} | " + " | ".join(f"{runs[seed][name]:.4f}" for name in names) + " |")
    for branch in BRANCHES:
        name = f"{branch} after"
        pairs = [ahead[name] - plain[name] for plain, ahead in zip(found[0], found[1], strict=True)]
        over_seeds = said(t_interval(pairs), "+") if len(pairs) > 1 else f"{pairs[0]:+.4f}, one seed"
        lines += ["", f"{name}, lag 1 minus lag 0, 95 % interval of Student's t over seeds: {over_seeds}"]
    lines += [
        "",
        f"{options.steps} steps of {options.prompts} prompts, completions of at most {options.tokens} tokens, "
        f"{options.heldout} held-out prompts of each branch, LoRA of rank 32, learning rate {options.rate:g}, "
        f"float32, CPU, rollouts by {'a vLLM server' if options.rollout_server else 'transformers behind HTTP'}, "
        f"{versions()}.",
    ]
    return lines


if __name__ == "__main__":
    run(main, measure)
