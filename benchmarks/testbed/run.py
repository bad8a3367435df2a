"""One run of the testbed: from a specialised model to a row of accuracies along the way."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib.metadata
import itertools
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from camopd import CaMOPDConfig, CaMOPDTrainer
from camopd.errors import CaMOPDError
from camopd.prompts import PromptStream
from camopd.report.read import read_run
from camopd.schedule import Schedule
from camopd.step import Step, StepCallback

from .arms import ARMS, SFT
from .models import END, VOCABULARY, WORDS, answer_loss, make_tokenizer, right
from .signs import numbers
from .skills import COVERED, Item, mixture


# accelerate reads the metadata of its optional packages several times a forward, which takes longer than a tiny one.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)  # type: ignore[assignment]

STEPS, PROMPTS, EVERY = 40, 32, 8  # optimizer steps, prompts of each, and steps between two measurements
PER_SKILL = 40  # items that a skill is measured on; the domain on four times as many
LONGEST = 10  # tokens of a completion: eight letters, an end, and one too many
POOL = 1024  # prompts of each branch
HALVES = ("choose", "report")
_OFF = ("degenerate", "truncated", "zero_gap", "entropy")  # guards: a rate that is too high is a result here


@dataclass
class Bench:
    """What the runs of a seed share."""

    general: LlamaForCausalLM
    specialised: LlamaForCausalLM
    prompts: dict[str, Dataset]
    items: list[Item]
    covered: tuple[str, ...]

    @classmethod
    def of(
        cls,
        general: LlamaForCausalLM,
        specialised: LlamaForCausalLM,
        skills: tuple[str, ...],
        domain: tuple[str, ...],
        covered: tuple[str, ...] = COVERED,
        proxy_words: tuple[int, int] = WORDS,
    ) -> Bench:
        """`proxy_words` are the lengths of words in the prompts that are trained on; those that measure have `WORDS`."""
        prompts = {
            branch: Dataset.from_dict({"prompt": [item.prompt for item in items]})
            for branch, items in (
                ("general", mixture(covered, domain, proxy_words, seed=2, count=POOL)),
                ("domain", mixture(("domain",), domain, WORDS, seed=3, count=POOL)),
            )
        }
        items = [
            item
            for skill in (*skills, "domain")
            for item in mixture((skill,), domain, WORDS, seed=4, count=PER_SKILL * (4 if skill == "domain" else 1))
        ]
        return cls(general, specialised, prompts, items, covered)

    def student(self) -> LlamaForCausalLM:
        """A copy of the specialised model, to train."""
        return copy.deepcopy(self.specialised).requires_grad_(True)  # as a teacher it was frozen by the run before

    def measure(self, model: LlamaForCausalLM) -> dict[str, dict[str, float]]:
        """Accuracy on each half of the items: covered skills, uncovered ones, and the domain, each a mean over skills."""
        found: dict[str, dict[str, list[bool]]] = {half: {} for half in HALVES}
        for place, (item, is_right) in enumerate(zip(self.items, right(model, self.items), strict=True)):
            found[HALVES[place % 2]].setdefault(item.skill, []).append(is_right)
        return {half: self._groups({name: sum(of) / len(of) for name, of in skills.items()})
                for half, skills in found.items()}  # fmt: skip

    def _groups(self, accuracy: dict[str, float]) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        for skill, value in accuracy.items():
            group = "domain" if skill == "domain" else "covered" if skill in self.covered else "uncovered"
            groups.setdefault(group, []).append(value)
        return {group: sum(values) / len(values) for group, values in groups.items()}


class Watch(StepCallback):
    """Measures every so many steps, and counts prompts and trained tokens."""

    def __init__(self, bench: Bench, model: LlamaForCausalLM, every: int):
        self.bench, self.model, self.every = bench, model, every
        self.prompts = self.tokens = 0
        self.rule: Any = None  # of the trainer, which is made after this
        self.points = [self._point(0)]

    def on_step_closed(self, step: Step) -> None:
        """Count, and measure where it is time."""
        self.count(
            len(step.summaries),
            sum(self.rule.tokens_in_loss(row) for row in step.summaries if row.position in step.kept),
            step.number + 1,
        )

    def count(self, prompts: int, tokens: int, step: int) -> None:
        """`tokens` are those that have gone through the loss with a weight of their own."""
        self.prompts += prompts
        self.tokens += tokens
        if step % self.every == 0:
            self.points.append(self._point(step))

    def _point(self, step: int) -> dict[str, Any]:
        return {"step": step, "prompts": self.prompts, "tokens": self.tokens, **self.bench.measure(self.model)}


def run(
    bench: Bench,
    arm: str,
    rate: float,
    seed: int,
    steps: int = STEPS,
    every: int = EVERY,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train an arm. `points` has the accuracies along the way, `stopped` says why a run ended early.

    `settings` are laid over what all runs share in place of the arm's. With `diagnostics_steps` among them the record has
    `signs`, the numbers of signs.py.
    """
    gc.collect()
    gc.freeze()  # accelerate collects garbage as `train` begins, a second among all that has been imported
    started = time.perf_counter()
    student = bench.student()
    watch = Watch(bench, student, every)
    if arm == SFT:
        found = _sft(bench, student, watch, rate, seed, steps)
    else:
        found = distil(bench, student, watch, ARMS[arm] if settings is None else settings, rate, seed, steps)
    return {
        "arm": arm, "learning_rate": rate, "seed": seed, **found, "general": bench.measure(bench.general),
        "points": watch.points, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def recipe(folder: str, rate: float, seed: int, steps: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a run that writes into a folder: `settings` of `CaMOPDConfig` over those that all runs share."""
    shared = {
        "max_completion_length": LONGEST, "diagnostics_steps": 0, "guards": dict.fromkeys(_OFF),
        "prompts_per_step": PROMPTS, "per_device_train_batch_size": PROMPTS,
    }  # fmt: skip
    return {
        "output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "gradient_checkpointing": False, "max_steps": steps, "max_prompt_length": 20,
        "logging_steps": 10**6, "seed": seed, "learning_rate": rate, **shared, **settings,
    }  # fmt: skip


def trainer_of(
    bench: Bench, student: LlamaForCausalLM, settings: Mapping[str, Any], callback: StepCallback
) -> CaMOPDTrainer:
    """A trainer of a student; `settings` as `recipe` gives them."""
    args = CaMOPDConfig(**settings)
    branches = Schedule.parse(args.schedule).branches
    teachers = {"general": bench.general, "domain": bench.specialised}
    return CaMOPDTrainer(
        model=student, teachers={branch: teachers[branch] for branch in branches}, args=args,
        train_dataset={branch: bench.prompts[branch] for branch in branches}, processing_class=make_tokenizer(),
        callbacks=[callback],
    )  # fmt: skip


def distil(
    bench: Bench,
    student: LlamaForCausalLM,
    watch: Watch,
    settings: Mapping[str, Any],
    rate: float,
    seed: int,
    steps: int,
) -> dict[str, Any]:
    """Train a student in place. Why it stopped early, None where it did not, and `signs` where there are diagnostics."""
    stopped = None
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(bench, student, recipe(folder, rate, seed, steps, settings), watch)
        watch.rule = trainer.rule
        try:
            with contextlib.redirect_stdout(None):
                trainer.train()
        except CaMOPDError as error:
            stopped = f"{type(error).__name__} in step {trainer.state.global_step + 1}: {error}"
        if not settings.get("diagnostics_steps"):
            return {"stopped": stopped}
        return {"stopped": stopped, "signs": numbers(read_run(Path(folder) / "metrics.jsonl")[0])}


def _sft(bench: Bench, student: LlamaForCausalLM, watch: Watch, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Cross-entropy on the general teacher's answers, drawn at temperature 1; no prompt is of the domain."""
    torch.manual_seed(seed)
    tokenizer, stream = make_tokenizer(), PromptStream(bench.prompts["general"], "general", seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        prompts = [row["prompt"] for row in stream.draw(range(step * PROMPTS, (step + 1) * PROMPTS))]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        drawn = bench.general.generate(**inputs, max_new_tokens=LONGEST, do_sample=True, top_k=0)
        answers = [_until_end(row) for row in drawn[:, inputs["input_ids"].shape[1] :].tolist()]
        student.train()
        loss = answer_loss(student, list(zip(prompts, answers, strict=True)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        watch.count(len(prompts), sum(len(answer) + 1 for answer in answers), step + 1)
    return {"stopped": None}


def _until_end(ids: list[int]) -> str:
    answer = itertools.takewhile(lambda token: token > END, ids)
    return "".join(VOCABULARY[token] for token in answer)
