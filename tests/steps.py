"""One optimizer step of the trainer, and the same step by hand: for `test_trainer.py`, and as a script for torchrun.

Nothing of `camopd` computes the reference: loops over rows and tokens, plain logits, autograd, plain SGD.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import sys
import zlib
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import LOGP, VOCAB, make_model, make_prompts, make_tokenizer, rounding
from safetensors.torch import save_file

from camopd import CaMOPDConfig, CaMOPDTrainer
from camopd.errors import TeacherError
from camopd.prompts import PromptStream, StepDataset
from camopd.schedule import Schedule
from camopd.teachers.local import LocalTeacher


ROWS = 8
LEARNING_RATE, MAX_GRAD_NORM = 0.1, 0.5
# Of a parameter after the step: its gradient's, which is no longer than the norm it is clipped to, and its own.
PARAMETER = LEARNING_RATE * rounding(MAX_GRAD_NORM) + rounding(1, sums=1)


@dataclass(frozen=True)
class Case:
    """A step to take. The first schedule entry decides what it mixes."""

    name: str
    schedule: str = "general:1,domain:1"
    mass_target: float = 0.8
    selection: bool = True
    with_rollout_logps: bool = True
    student_logps: str = "trainer"
    loss_prefix_tokens: int | None = None
    token_rule: str = "none"
    relaxed_exploration_steps: int = 0
    loss_normalization: str = "sample"
    branch_weights: str = "none"
    teacher_prompt: str | None = None  # of the general branch


CASES = (
    Case("uneven"),
    Case("one_sample_kept", mass_target=0.01),  # every other rank, and every other micro-batch, is left with nothing
    Case("mixed", schedule="general:3+domain:1"),
    Case("domain", schedule="domain:1,general:1"),
    Case("without_selection", selection=False),
    Case("without_rollout_logps", with_rollout_logps=False),
    Case("engine", student_logps="engine", mass_target=0.5),  # which keeps other samples than the trainer's gaps do
    Case("prefix", loss_prefix_tokens=2),
    Case("context", schedule="general:3+domain:1", teacher_prompt="you know it is 7. {prompt}", loss_prefix_tokens=3),
)
MIXED = {"schedule": "general:1+domain:1", "selection": False}
BASELINES = (
    Case("relaxed_opd", **MIXED, token_rule="relaxed_opd", loss_normalization="token"),
    Case("relaxed_opd_first_phase", token_rule="relaxed_opd", relaxed_exploration_steps=1, loss_prefix_tokens=2),
    Case("relaxed_opd_engine", token_rule="relaxed_opd", student_logps="engine", loss_normalization="token"),
    Case("selectkd", **MIXED, token_rule="selectkd"),
    Case("selectkd_engine", token_rule="selectkd", student_logps="engine", loss_normalization="token"),
    Case("dn_mopd", schedule="general:3+domain:1", branch_weights="sigma", student_logps="engine"),
)
# What changes how a step is made and not what it is.
VARIANTS = {
    "rebalanced": {},
    "own": {
        "rebalance": False, "padding_free": False, "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 1,
        "ddp_broadcast_buffers": False,
    },
    "padding_free": {"padding_free": True},
    "token_budget": {"padding_free": True, "max_tokens_per_micro_batch": 90, "per_device_train_batch_size": 1},
}  # fmt: skip


def runs_of(processes: int) -> list[tuple[str, Case]]:
    """The (variant, case) to take on several processes: all on two; on four, which take long, what their number changes.

    That is who has which samples, and what is summed over all ranks: the uneven cases, mixed branches, a spread of gaps.
    """
    several = processes > 2
    usual = [("rebalanced", case) for case in ((*CASES[:3], BASELINES[-1]) if several else (*CASES, *BASELINES))]
    varied = CASES[:2] if several else CASES
    return [*usual, *itertools.product((name for name in VARIANTS if name != "rebalanced"), varied)]


def use_sampler(trainer, sampler):
    """Let a trainer roll out with `sampler`, as if it were TRL's `VLLMGeneration`; it may draw from another model."""
    trainer.use_vllm, trainer.vllm_generation = True, sampler
    trainer.args.guards["log_ratio"] = None


class FakeSampler:
    """Stands in for TRL's `VLLMGeneration`: completions and log-probs that depend on the prompt alone.

    One prompt in six or so gets an empty completion. The log-probs are off the trainer's by up to a factor of e either
    way, so that some importance weights fall outside their band.
    """

    logprobs = None

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler):
        completions, logprobs = zip(*(self.complete(tuple(ids)) for ids in prompts), strict=True)
        return prompts, list(completions), [[[value] for value in row] for row in logprobs], None

    @classmethod
    def complete(cls, prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
        tokens, logprobs = cls._complete(prompt)
        return list(tokens), list(logprobs)

    @staticmethod
    @cache
    def _complete(prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
        digest = zlib.crc32(bytes(prompt))
        generator = torch.Generator().manual_seed(digest)
        length = digest % 6
        tokens = torch.randint(4, len(VOCAB), (length,), generator=generator).tolist()
        student = make_model(1)
        noise = (2 * torch.rand(length, generator=generator) - 1).tolist()
        logps = _logps(student, list(prompt), tokens).tolist()
        return tokens, [value + shift for value, shift in zip(logps, noise, strict=True)]


def make_trainer(case: Case, output_dir: str, batch_size: int, general_teacher=None, sampler=None, **settings):
    """A `CaMOPDTrainer` for one step of a case, with rollouts by `FakeSampler`."""
    values = {
        "output_dir": output_dir, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "gradient_checkpointing": False, "optim": "sgd", "learning_rate": LEARNING_RATE,
        "max_grad_norm": MAX_GRAD_NORM, "max_steps": 1, "prompts_per_step": ROWS, "per_device_train_batch_size": batch_size,
        "max_completion_length": 9, "max_prompt_length": 64, "schedule": case.schedule,
        "mass_target": case.mass_target, "selection": case.selection, "score_tokens": 3 * 73,
        "importance_sampling_mode": "mask" if case.with_rollout_logps else "none",
        "student_logps": case.student_logps, "loss_prefix_tokens": case.loss_prefix_tokens, "token_rule": case.token_rule,
        "relaxed_exploration_steps": case.relaxed_exploration_steps, "relaxed_entropy_share": 0.8,
        "loss_normalization": case.loss_normalization, "branch_weights": case.branch_weights,
        "teacher_prompt": case.teacher_prompt and {"general": case.teacher_prompt},
    }  # fmt: skip
    args = CaMOPDConfig(**{**values, **settings})
    trainer = CaMOPDTrainer(
        model=make_model(1),
        teachers={"general": general_teacher or make_model(2), "domain": make_model(3)},
        args=args,
        train_dataset={branch: make_prompts(branch) for branch in ("general", "domain")},
        processing_class=make_tokenizer(),
    )
    use_sampler(trainer, sampler or FakeSampler())
    return trainer


def trainer_step(
    case: Case, output_dir: str, batch_size: int, resume=None, **more
) -> tuple[dict[str, torch.Tensor], dict]:
    """Parameters after one optimizer step of `CaMOPDTrainer` on this process's share, and the step's metrics."""
    trainer = make_trainer(case, output_dir, batch_size, **more)
    trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: value.detach().clone() for name, value in model.named_parameters()}, trainer.step.metrics


HELD_OUT = (1, 3, 5)  # prompts: fewer than processes, and numbers that their batches do not divide


def held_out(branch: str, count: int, streamed: bool):
    """So many prompts of a branch, as a `Dataset` or as a stream."""
    prompts = make_prompts(branch, count)
    return prompts.to_iterable_dataset(2 if count > 1 else 1) if streamed else prompts


def evaluations(output_dir: str, batch_size: int) -> list[dict[str, float]]:
    """What `evaluate` finds and logs for each of `HELD_OUT`, as a `Dataset` and as a stream, of both branches."""
    trainer = make_trainer(CASES[0], output_dir, 2, per_device_eval_batch_size=batch_size)
    results = []
    for streamed in (False, True):
        for count in HELD_OUT:
            found = trainer.evaluate({branch: held_out(branch, count, streamed) for branch in ("general", "domain")})
            logged = trainer.state.log_history[-2:]  # with TRL's metrics, which have no branch in their names
            results.append({"count": count, "streamed": streamed, "found": found, "logged": logged})
    return results


def reference_evaluation(branch: str, count: int) -> dict[str, float]:
    """The same of one branch by hand: KL, its standard error, prompts and completion lengths."""
    teacher, student, tokenizer = make_model({"general": 2, "domain": 3}[branch]), make_model(1), make_tokenizer()
    values, lengths = [], []
    for row in make_prompts(branch, count):
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion, _ = FakeSampler.complete(tuple(prompt))
        lengths.append(len(completion))
        if completion:
            with torch.no_grad():
                gaps = _logps(student, prompt, completion) - _logps(teacher, prompt, completion)
            values.append(float(gaps.double().mean()))
    mean = sum(values) / len(values) if values else math.nan
    spread = (
        math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else math.nan
    )
    return {
        "kl": mean, "kl_se": spread / math.sqrt(len(values)) if values else math.nan, "prompts": len(values),
        "lengths": lengths,
    }  # fmt: skip


def measured(metrics: dict) -> dict[str, torch.Tensor]:
    """What the diagnostics say of the step's samples."""
    return {
        name: torch.tensor(float(value))
        for name, value in metrics.items()
        if name.startswith(("coherence/", "conflict/"))
    }


@cache
def reference_step(case: Case) -> tuple[dict[str, torch.Tensor], float, set[int]]:
    """Parameters, loss and kept positions of the same step, by hand."""
    student = make_model(1)
    teachers = {"general": make_model(2), "domain": make_model(3)}
    scale = {"general": 2.0, "domain": 1.0}
    schedule = Schedule.parse(case.schedule)
    streams = {branch: PromptStream(make_prompts(branch), branch, seed=42) for branch in schedule.branches}
    rows = StepDataset(streams, schedule, ROWS, num_steps=1).rows_of(0)
    tokenizer = make_tokenizer()

    samples = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion, rollout = FakeSampler.complete(tuple(prompt))
        if not completion:
            continue
        completion, rollout = completion[: case.loss_prefix_tokens], rollout[: case.loss_prefix_tokens]
        seen = prompt
        if case.teacher_prompt and row["branch"] == "general":
            seen = tokenizer(case.teacher_prompt.format(prompt=row["prompt"]))["input_ids"]
        with torch.no_grad():
            teacher = _logps(teachers[row["branch"]], seen, completion)
            before = _logps(student, prompt, completion)
        gaps = [float(t) - float(s) for t, s in zip(teacher, before, strict=True)]
        at_selection = gaps
        if case.student_logps == "engine":
            at_selection = [float(t) - r for t, r in zip(teacher, rollout, strict=True)]
        demands = [abs(gap) if row["branch"] == "general" else max(gap, 0.0) for gap in at_selection]
        score = sum(demands) / len(demands)
        tokens = [
            {"rollout": r, "gap": gap, "at_selection": first, **more}
            for r, gap, first, more in zip(
                rollout, gaps, at_selection, _views(student, teachers[row["branch"]], prompt, completion), strict=True
            )
        ]
        samples.append((row, prompt, completion, tokens, score))
    assert len(samples) < len(rows), "the case should hold an empty completion"

    kept = []
    for branch in schedule.branches:
        ranked = sorted((s for s in samples if s[0]["branch"] == branch), key=lambda s: (-s[-1], s[0]["position"]))
        total, mass = sum(s[-1] for s in ranked), 0.0
        for sample in ranked:
            kept.append(sample)
            mass += sample[-1]
            if case.selection and mass / total >= case.mass_target - 1e-12:
                break

    # What the baselines read: all tokens of the step, those of dropped samples included.
    all_tokens = {
        branch: [t for s in samples if s[0]["branch"] == branch for t in s[3]] for branch in schedule.branches
    }
    entropies = sorted((token["entropy"] for tokens in all_tokens.values() for token in tokens), reverse=True)
    floor = math.log(0.3 / 0.7)
    for token in (token for tokens in all_tokens.values() for token in tokens):
        token["value"] = 1.0
        if case.token_rule == "selectkd" and not token["accepted"]:
            token["value"] = 0.01
        if case.token_rule == "relaxed_opd" and case.relaxed_exploration_steps:
            token["value"] = float(token["at_selection"] >= floor)
        elif case.token_rule == "relaxed_opd":  # most tokens; among few, none is below the floor
            token["value"] = float(token["entropy"] >= entropies[math.floor(0.8 * (len(entropies) - 1) + 1e-9)])
    if case.branch_weights == "sigma":
        spreads = {branch: _spread([t["at_selection"] for t in all_tokens[branch]]) for branch in schedule.branches}
        overall = _spread([t["at_selection"] for tokens in all_tokens.values() for t in tokens])
        scale = {branch: scale[branch] * min(max(overall / spreads[branch], 0.25), 4) for branch in schedule.branches}
    num_tokens = sum(token["value"] if case.token_rule == "relaxed_opd" else 1 for s in kept for token in s[3])

    loss = torch.zeros(())
    for row, prompt, completion, tokens, _ in kept:
        logps = _logps(student, prompt, completion)
        per_token = []
        for logp, token in zip(logps, tokens, strict=True):
            weight = math.exp(float(logp.detach()) - token["rollout"]) if case.with_rollout_logps else 1.0
            weight = weight if 0.5 <= weight <= 2.0 else 0.0
            reward = max(token["gap"], floor) if case.token_rule == "relaxed_opd" else token["gap"]
            per_token.append(weight * token["value"] * scale[row["branch"]] * reward * logp)
        over = num_tokens if case.loss_normalization == "token" else len(completion) * len(kept)
        loss = loss - sum(per_token) / over
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
    torch.optim.SGD(student.parameters(), lr=LEARNING_RATE).step()
    parameters = {name: value.detach() for name, value in student.named_parameters()}
    return parameters, loss.item(), {sample[0]["position"] for sample in kept}


def _logps(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    if not completion:
        return torch.zeros(0)
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1)[range(len(completion)), completion]


def _views(student, teacher, prompt: list[int], completion: list[int]) -> list[dict]:
    """Per completion token the student's entropy, and whether its likeliest token is among the teacher's five likeliest."""
    inputs = torch.tensor([prompt + completion])
    with torch.no_grad():
        own, theirs = (model(inputs).logits[0, len(prompt) - 1 : -1].softmax(dim=-1) for model in (student, teacher))
    views = []
    for p, q in zip(own.tolist(), theirs.tolist(), strict=True):
        likeliest = p.index(max(p))
        views.append(
            {
                "entropy": -sum(value * math.log(value) for value in p),
                "accepted": sum(value > q[likeliest] for value in q) < 5,
            }
        )
    return views


def _spread(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def check_evaluations(results):
    """Every held-out prompt counts once, whatever the data loader has filled its batches up with."""
    assert len(results) == 6
    for result in results:
        count, found = result["count"], result["found"]
        for branch, logged in zip(("general", "domain"), result["logged"], strict=True):
            expected = reference_evaluation(branch, count)
            where = f"{count} prompts of {branch}, streamed: {result['streamed']}"
            assert found[f"eval_{branch}_prompts"] == expected["prompts"], where
            for name in ("kl", "kl_se"):
                assert found[f"eval_{branch}_{name}"] == pytest.approx(expected[name], abs=LOGP, nan_ok=True), where
            assert found[f"eval_{branch}_loss"] == pytest.approx(expected["kl"], abs=LOGP, nan_ok=True), where
            rate, seconds = found[f"eval_{branch}_samples_per_second"], found[f"eval_{branch}_runtime"]
            assert rate * seconds == pytest.approx(count, rel=0.2, abs=0.6), where  # both are rounded
            lengths = expected["lengths"]
            assert logged[f"eval_{branch}_completions/mean_length"] == pytest.approx(sum(lengths) / count), where
            assert logged[f"eval_{branch}_completions/min_length"] == min(lengths), where
            assert logged[f"eval_{branch}_completions/max_length"] == max(lengths), where
            assert not {name for name in logged if name.startswith(("eval_completions", "eval_entropy"))}, where


if __name__ == "__main__":  # torchrun --standalone --nproc_per_node 2 tests/steps.py FOLDER BATCH_SIZE
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    gc.freeze()  # as conftest.py does
    for variant, case in runs_of(int(os.environ["WORLD_SIZE"])):
        name = f"{variant}-{case.name}"
        parameters, metrics = trainer_step(case, str(folder / f"run-{name}"), size, **VARIANTS[variant])
        from accelerate import PartialState

        state = PartialState()
        assert state.num_processes == int(os.environ["WORLD_SIZE"]) > 1, state.num_processes
        if state.is_main_process:
            parameters = {name: value.contiguous() for name, value in parameters.items()}
            values = {**parameters, **measured(metrics), "loss": torch.tensor(metrics["loss"])}
            save_file(values, folder / f"{name}.safetensors")
        state.wait_for_everyone()

    found = evaluations(str(folder / "evaluation"), batch_size=2)
    if state.is_main_process:
        (folder / "evaluations.json").write_text(json.dumps(found))

    # A rank whose teacher fails must not leave the other one waiting in the next collective. After resume the step that was
    # kept is the step by hand.
    class FailsOnOneRank:
        name = "fails on one rank"
        fails = True

        def submit(self, token_ids, prompt_lens, top_k=0):
            future = Future()
            if self.fails and state.process_index == 1:
                future.set_exception(TeacherError("rank 1 has lost its teacher"))
            else:
                future.set_result(LocalTeacher(make_model(2), "local", "cpu", 3).score(token_ids, prompt_lens, top_k))
            return future

        def score(self, token_ids, prompt_lens, top_k=0):
            return self.submit(token_ids, prompt_lens, top_k).result()

    teacher, run = FailsOnOneRank(), folder / "fails"
    try:
        trainer_step(CASES[0], str(run), size, general_teacher=teacher)
    except TeacherError as error:
        kept = sorted(path.name for path in (run / "checkpoint-0").glob("rollouts-*"))
        (folder / f"error-{state.process_index}.txt").write_text(f"{error} {kept}")
    teacher.fails = False
    FakeSampler.generate = None  # nothing is rolled out again
    parameters, _ = trainer_step(CASES[0], str(run), size, general_teacher=teacher, resume=str(run / "checkpoint-0"))
    if state.is_main_process:
        save_file({name: value.contiguous() for name, value in parameters.items()}, folder / "resumed.safetensors")
    state.wait_for_everyone()
    torch.distributed.destroy_process_group()
