"""The trainer against a step computed by hand, and what it promises around it."""

import copy
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import LOGP, LOSS, VOCAB, make_model, make_prompts, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from steps import (
    BASELINES,
    CASES,
    PARAMETER,
    RUNS,
    VARIANTS,
    Case,
    FakeSampler,
    evaluations,
    measured,
    reference_evaluation,
    reference_step,
    trainer_step,
    use_sampler,
)
from trainers import BrokenTeacher, lines, make_args, make_trainer
from transformers import LlamaForCausalLM
from trl import DistillationTrainer, LogCompletionsCallback

from camopd import CaMOPDTrainer
from camopd.callbacks.diagnostics import Diagnostics
from camopd.callbacks.metrics_file import MetricsFile
from camopd.callbacks.teacher_watch import TeacherWatch
from camopd.callbacks.update import UpdateMeasures
from camopd.errors import CaMOPDError, TeacherError
from camopd.forward import Forward
from camopd.setup import check_gathered_weights
from camopd.step import StepCallback


TESTS = Path(__file__).parent


# ------------------------------------------------------------------------------------------------------ Eq. 9, exactly


STEPS = [
    *itertools.product(
        CASES,
        [
            ("exchange", 1),
            ("exchange", 2),
            ("exchange", 8),
            ("padding_free", 2),
            ("padding_free", 8),
            ("token_budget", 1),
        ],
    ),
    *itertools.product(BASELINES, [("exchange", 2), ("padding_free", 8), ("token_budget", 1)]),
]


@pytest.mark.parametrize(
    ("case", "variant", "batch_size"),
    [pytest.param(case, *how, id=f"{case.name}-{how[0]}-batches_of_{how[1]}") for case, how in STEPS],
)
def test_one_step_equals_the_step_by_hand(case, variant, batch_size, tmp_path):
    expected, expected_loss, kept = reference_step(case)
    parameters, metrics = trainer_step(case, str(tmp_path), batch_size, **VARIANTS[variant])
    assert metrics["loss"] == pytest.approx(expected_loss, rel=LOSS)
    assert sum(metrics.get(f"selection/{branch}/kept", 0) for branch in ("general", "domain")) == len(kept)
    for name, value in expected.items():
        torch.testing.assert_close(
            parameters[name], value, atol=PARAMETER, rtol=0, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_take_the_step_by_hand(processes, tmp_path):
    """In the case `one_sample_kept` all ranks but one have nothing to train: none of them may wait for ever."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(TESTS / "steps.py"), str(tmp_path), str(4 // processes)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    for variant, case in RUNS:
        expected, expected_loss, _ = reference_step(case)
        found = load_file(tmp_path / f"{variant}-{case.name}.safetensors")
        assert found.pop("loss").item() == pytest.approx(expected_loss, rel=LOSS)
        seen = {name: found.pop(name) for name in list(found) if name not in expected}
        if variant == "exchange":
            _, metrics = trainer_step(case, str(tmp_path / "alone"), batch_size=2)
            for name, value in measured(metrics).items():
                torch.testing.assert_close(seen[name], value, atol=1e-3, rtol=1e-3, equal_nan=True, msg=name)
        for name, value in found.items():
            torch.testing.assert_close(
                value,
                expected[name],
                atol=PARAMETER,
                rtol=0,
                msg=lambda text, name=name, case=case, variant=variant: f"{variant} {case.name} {name} {text}",
            )
    for rank in range(processes):  # one rank's teacher failed; all have said so, and kept their rollouts
        text = (tmp_path / f"error-{rank}.txt").read_text()
        assert "rank 1 has lost its teacher\nNothing is lost" in text
        for other in range(processes):
            assert f"'rollouts-{other}-of-{processes}.safetensors'" in text
    expected, _, _ = reference_step(CASES[0])
    for name, value in load_file(tmp_path / "resumed.safetensors").items():
        torch.testing.assert_close(value, expected[name], atol=PARAMETER, rtol=0)
    check_evaluations(json.loads((tmp_path / "evaluations.json").read_text()))


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
            assert logged["eval_completions/mean_length"] == pytest.approx(sum(lengths) / count), where
            assert logged["eval_completions/min_length"] == min(lengths), where
            assert logged["eval_completions/max_length"] == max(lengths), where


def test_one_process_counts_every_held_out_prompt_once(tmp_path):
    check_evaluations(evaluations(str(tmp_path), 2))


def test_the_cases_hold_what_they_are_meant_to_hold():
    # Uneven shares for two ranks (positions 0, 2, ... and 1, 3, ...), a rank with nothing, weights in and out of band.
    _, _, kept = reference_step(CASES[0])
    even = sum(position % 2 == 0 for position in kept)
    assert 0 < len(kept) < 8
    assert even != len(kept) - even
    assert len(reference_step(CASES[1])[2]) == 1


def test_dropped_samples_cost_no_forward_or_backward(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, mass_target=0.01, prompts_per_step=8, diagnostics_steps=0)
    seen = []
    forward = trainer.student.logps

    def counting(token_ids, prompt_lens, *args, **kwargs):
        if torch.is_grad_enabled():
            seen.append(len(token_ids))
        return forward(token_ids, prompt_lens, *args, **kwargs)

    monkeypatch.setattr(trainer.student, "logps", counting)
    trainer.train()
    assert seen == [1]  # one sample holds 1 % of the mass; three of the four micro-steps do nothing


# -------------------------------------------------------------------------------------------- student equals teacher


def test_a_sample_that_would_not_be_trained_stops_the_run_before_the_update(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, selection=False, prompts_per_step=4, per_device_train_batch_size=4)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    lost = r"of 4 kept samples with \d+ tokens, 3 samples with \d+ tokens have gone through the loss: 1 not trained"
    for plan, message in (
        (
            lambda lengths, *_: [[[0], [1, 2, 3]]],
            r"2 micro-batches do not fit into the 1 micro-steps",
        ),
        (lambda lengths, *_: [[[0, 1, 2]]], lost),
        (lambda lengths, *_: [[[0, 1, 2, 3, 3]]], r"1 trained more than once .*last checkpoint is from before"),
    ):
        monkeypatch.setattr("camopd.batching.balance_micro_batches", plan)
        with pytest.raises(CaMOPDError, match=message):
            trainer.train()
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def test_a_student_that_equals_its_teacher_does_not_move_at_all(tmp_path, tokenizer):
    model = make_model(1)
    trainer = make_trainer(
        tmp_path, tokenizer, model=copy.deepcopy(model), teachers={"general": model, "domain": model}, max_steps=2,
        schedule="general:1,domain:1", optim="sgd",
    )  # fmt: skip
    trainer.train()
    for (name, before), after in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(before, after), name
    for line in lines(tmp_path):
        assert line["loss"] == 0
        assert line["grad_norm"] == 0
        assert line[f"gap/{line['branch']}/abs_mean"] == 0
        assert line[f"gap/{line['branch']}/abs_p99"] == 0


@pytest.mark.parametrize("schedule", ["general:1,domain:1", "general:3+domain:1"])
def test_equal_weights_from_disk_give_gaps_of_exactly_zero_under_bf16_autocast(schedule, tmp_path, tokenizer):
    path = str(tmp_path / "model")
    make_model(1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    trainer = make_trainer(
        tmp_path, tokenizer, model=path, teachers={"general": path, "domain": path}, max_steps=1, bf16=True,
        schedule=schedule, prompts_per_step=8, score_tokens=3 * 73,
    )  # fmt: skip
    trainer.train()
    (line,) = lines(tmp_path)
    for branch in line["branch"].split("+"):
        assert line[f"gap/{branch}/abs_p99"] == 0
        assert line[f"selection/{branch}/degenerate"] == 1
    assert line["grad_norm"] == 0


def test_a_domain_first_step_on_a_fresh_student_is_reported_degenerate_and_taken(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, schedule="domain:1,general:1", max_steps=2)
    trainer.train()
    first, second = lines(tmp_path)
    assert first["selection/domain/degenerate"] == 1
    assert first["selection/domain/kept_fraction"] == 1
    assert first["loss"] == 0
    assert first["selection/domain/mass"] is None
    assert second["selection/general/degenerate"] == 0
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


# ------------------------------------------------------------------------------------------------- schedule and data


def test_steps_take_the_branches_of_the_schedule(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, max_steps=5).train()
    assert [line["branch"] for line in lines(tmp_path)] == ["general", "general", "general", "domain", "general"]


def test_three_branches_work(tmp_path, tokenizer):
    names = ("general", "domain", "code")
    make_trainer(
        tmp_path, tokenizer, schedule="general:1,domain:1,code:1", max_steps=3, scale=1.0, mass_target=0.8, selection=True,
        score="absolute", teachers={name: make_model(2) for name in names},
        train_dataset={name: make_prompts(name) for name in names},
    ).train()  # fmt: skip
    assert [line["branch"] for line in lines(tmp_path)] == list(names)


def test_rows_of_the_wrong_branch_are_refused(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    with pytest.raises(CaMOPDError, match=r"step 0 got prompts of \['domain'\].*wants \['general'\]"):
        trainer.begin_step([{"prompt": "x", "branch": "domain", "position": 0}])


def test_text_and_messages_mix_in_one_step(tmp_path, tokenizer):
    messages = Dataset.from_list([{"prompt": [{"role": "user", "content": f"hi {index}"}]} for index in range(5)])
    trainer = make_trainer(
        tmp_path, tokenizer, schedule="general:1+domain:1", max_steps=1,
        train_dataset={"general": make_prompts("general"), "domain": messages},
    )  # fmt: skip
    seen = []
    tokenize = trainer._tokenize_prompts
    trainer._tokenize_prompts = lambda prompts: seen.append((prompts, tokenize(prompts)[0])) or tokenize(prompts)
    trainer.train()
    for prompt, ids in zip(*seen[0], strict=True):
        text = prompt if isinstance(prompt, str) else f"u {prompt[0]['content']}.a "
        assert ids == tokenizer(text)["input_ids"]


TEMPLATE = (
    "{% if tools %}{{ tools[0].name }} {% endif %}{% for m in messages %}{{ m.role }} {{ m.content }}."
    "{% endfor %}{% if add_generation_prompt %}a {{ mood }}{% endif %}"
)
ASK = {"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "you"}]}
SAY = {"role": "assistant", "content": [{"type": "text", "text": "well "}, {"type": "text", "text": "x"}]}
GLAD, SAD = {"mood": "glad"}, {"mood": "sad"}
WRITTEN = [  # a row, and what of it the model is to see; `from_list` takes its columns from the first
    ({"prompt": [ASK], "system": "be good", "tools": None, "chat_template_kwargs": GLAD},
     "system be good.user hi you.a glad"),
    ({"prompt": [ASK], "tools": [{"name": "find"}], "chat_template_kwargs": SAD}, "find user hi you.a sad"),
    ({"prompt": [ASK, SAY]}, "user hi you.assistant well x"),
]  # fmt: skip


def test_the_model_sees_what_the_user_wrote_in_training_and_evaluation(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompts = Dataset.from_list([row for row, _ in WRITTEN])
    trainer = make_trainer(
        tmp_path, tokenizer, prompts_per_step=3, per_device_train_batch_size=1, max_steps=1, schedule="domain",
        teachers={"domain": make_model(1)}, train_dataset={"domain": prompts}, eval_dataset={"domain": prompts},
    )  # fmt: skip
    expected = sorted(tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in WRITTEN)
    for rows in (trainer.train_dataset.rows_of(0), list(trainer.eval_dataset["domain"])):
        samples, _ = trainer.roll_out(rows, 4)
        assert sorted(sample.token_ids[: sample.prompt_len] for sample in samples) == expected


def test_messages_that_the_template_refuses_are_an_error_with_the_row_before_training(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE + "{% if messages[0].role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    fine, wrong = ([{"role": role, "content": "hi"}] for role in ("user", "tool"))
    datasets = {branch: Dataset.from_list([{"prompt": fine}] * 99) for branch in ("general", "domain")}
    held_out = {"domain": Dataset.from_list([{"prompt": fine}] * 70 + [{"prompt": wrong}])}
    with pytest.raises(ValueError, match=r"row 70 of branch 'domain' .* the chat template says: TemplateError: no"):
        make_trainer(tmp_path, tokenizer, train_dataset=datasets, eval_dataset=held_out)


def test_long_prompts_keep_their_last_tokens_and_are_counted(tmp_path, tokenizer):
    prompts = Dataset.from_list([{"prompt": "a" * 30 + "tail"}, {"prompt": "short"}])
    trainer = make_trainer(
        tmp_path, tokenizer, max_prompt_length=6, max_steps=1, prompts_per_step=2,
        train_dataset={"general": prompts, "domain": prompts},
    )  # fmt: skip
    ids, _, _ = trainer._tokenize_prompts(["a" * 30 + "tail", "short"])
    assert tokenizer.decode(ids[0]).replace(" ", "") == "aatail"
    assert tokenizer.decode(ids[1]).replace(" ", "") == "short"
    trainer.train()
    assert lines(tmp_path)[0]["rollout/prompts_cut"] == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_that_are_all_longer_than_the_cap_are_an_error_with_the_lengths(tmp_path, tokenizer, streaming):
    prompts = {"domain": Dataset.from_list([{"prompt": "0123456789"}, {"prompt": "0123456"}])}
    if streaming:
        prompts["domain"] = prompts["domain"].to_iterable_dataset()
    prompts["general"] = Dataset.from_list([{"prompt": "0123456789"}, {"prompt": "01"}])  # one that fits is enough
    with pytest.raises(
        ValueError,
        match=r"2 prompts of branch 'domain' that were looked at are all longer than max_prompt_length=4 tokens; .* 7",
    ):
        make_trainer(tmp_path, tokenizer, train_dataset=prompts, max_prompt_length=4)


@pytest.mark.parametrize("name", ["teacher_model", "teacher"])
def test_a_single_teacher_is_refused_with_the_argument_that_takes_one_for_each_branch(name):
    with pytest.raises(TypeError, match=rf"no argument '{name}'\. Each branch has a teacher of its own: teachers=\{{"):
        CaMOPDTrainer(model="student", **{name: "teacher"})
    with pytest.raises(TypeError, match=r"no argument 'reward_funcs'\. See its docstring"):
        CaMOPDTrainer(model="student", reward_funcs=[])


def test_the_table_of_completions_has_the_branch_of_each(tmp_path, tokenizer, capsys):
    trainer = make_trainer(
        tmp_path, tokenizer, schedule="general:1+domain:1", max_steps=2, logging_steps=2, log_completions=True,
        eval_dataset={"domain": make_prompts("domain", 3)},
    )  # fmt: skip
    trainer.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert list(table.columns) == ["step", "branch", "prompt", "completion"]
    assert sorted(table["branch"]) == ["domain"] * 2 + ["general"] * 2  # of the latest step
    for branch, prompt in zip(table["branch"], table["prompt"], strict=True):
        assert prompt.replace(" ", "").startswith(branch)
    assert "branch" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- importance weights


def test_rollout_logps_of_vllm_reach_the_importance_weights(tmp_path):
    _, metrics = trainer_step(Case("ratios"), str(tmp_path), 2)
    assert metrics["importance/active"] == 1
    # FakeSampler is off by a factor of up to e either way: log-uniform, so 1 - ln 2 = 31 % lie outside [0.5, 2]
    assert 0.1 < metrics["importance/outside_band"] < 0.55
    assert 2 < metrics["importance/ratio_max"] < 2.72


def test_without_rollout_logps_the_weights_are_one_and_it_is_said(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, max_steps=1).train()
    (line,) = lines(tmp_path)
    assert line["importance/active"] == 0
    assert "importance/ratio_mean" not in line


def test_the_engine_of_transformers_gives_the_log_probs_it_drew_with(tmp_path, tokenizer, monkeypatch):
    seen = []
    logps = Forward.logps
    monkeypatch.setattr(
        Forward, "logps", lambda self, *args, **kwargs: seen.append(self) or logps(self, *args, **kwargs)
    )

    def run(student_logps):
        seen.clear()
        settings = {"student_logps": student_logps, "importance_sampling_mode": "none", "max_steps": 2, "selection": False,
                    "diagnostics_steps": 0}  # fmt: skip
        trainer = make_trainer(tmp_path / student_logps, tokenizer, **settings)
        trainer.train()
        assert "generate" not in vars(trainer.model)
        return lines(tmp_path / student_logps), seen.count(trainer.student)

    of_engine, forwards = run("engine")
    of_trainer, more_forwards = run("trainer")
    losses = sum(line["train/micro_batches"] for line in of_engine)
    assert more_forwards > forwards == 1 + losses  # none but for the loss, and to probe the student once
    for line, other in zip(of_engine, of_trainer, strict=True):
        assert line["importance/log_ratio"] < LOGP  # float32 with a cache and without
        assert line["gap/general/mean"] == pytest.approx(other["gap/general/mean"], abs=LOGP)
        assert line["loss"] == pytest.approx(other["loss"], rel=2 * LOSS)
        assert line["rollout/general/entropy"] is None
        assert "importance/log_ratio" not in other


def test_tokens_without_a_log_prob_of_the_engine_have_no_gap_at_selection(tmp_path, caplog):
    class NoLogprob(FakeSampler):
        def generate(self, prompts, images, num_generations, profiler):
            prompts, completions, logprobs, _ = super().generate(prompts, images, num_generations, profiler)
            return prompts, completions, [[[None] for _ in row] for row in logprobs], None

    with caplog.at_level("WARNING", logger="camopd"):
        _, metrics = trainer_step(Case("none", student_logps="engine"), str(tmp_path), 2, sampler=NoLogprob())
    assert metrics["gap/general/abs_mean"] == 0
    assert metrics["selection/general/degenerate"] == 1
    assert metrics["loss"] != 0  # Eq. 1 in the loss is of the trainer
    assert "gave no log-prob for" in caplog.text


def test_the_completion_length_follows_its_schedule(tmp_path, tokenizer):
    steps = {0: 2, 1: 5, 3: 3}
    trainer = make_trainer(
        tmp_path, tokenizer, max_completion_length=steps, max_steps=4, eval_strategy="steps", eval_steps=1,
        eval_dataset={"general": make_prompts("general", count=2)},
    )  # fmt: skip
    lengths, roll_out = [], trainer.roll_out

    def watch(rows, max_tokens, *prefix):
        samples, cut = roll_out(rows, max_tokens, *prefix)
        lengths.append((max_tokens, max(sample.length for sample in samples)))
        return samples, cut

    trainer.roll_out = watch
    trainer.train()
    assert [line["rollout/max_length"] for line in lines(tmp_path)] == [2, 5, 5, 3]
    assert [limit for limit, _ in lengths[::2]] == [2, 5, 5, 3]
    assert [limit for limit, _ in lengths[1::2]] == [5, 5, 5, 5]  # evaluation, comparable at every step
    assert all(longest <= limit for limit, longest in lengths)
    assert max(longest for _, longest in lengths) > 2


def test_the_completion_length_of_vllm_follows_its_schedule(tmp_path, tokenizer):
    limits = []

    class Watched(FakeSampler):
        def generate(self, prompts, images, num_generations, profiler):
            limits.append(self.max_completion_length)
            return super().generate(prompts, images, num_generations, profiler)

    trainer = make_trainer(tmp_path, tokenizer, max_completion_length={0: 6, 2: 9}, max_steps=3)
    use_sampler(trainer, Watched())
    trainer.train()
    assert limits == [6, 6, 9]


def test_rows_that_see_each_other_are_padded_from_the_first_step(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("camopd.forward.packing_is_exact", lambda forward: False)
    with pytest.raises(ValueError, match="padding_free=True, but in the student rows"):
        make_trainer(tmp_path, tokenizer, padding_free=True, max_steps=1).train()


def test_a_prefix_of_the_completions_is_scored_and_trained(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, loss_prefix_tokens=2, max_steps=1)
    scored = []
    score = trainer.teachers["general"].score
    trainer.teachers["general"].score = lambda ids, lens, top_k=0: (
        scored.extend(len(row) - start for row, start in zip(ids, lens, strict=True)) or score(ids, lens, top_k)
    )
    trainer.train()
    (line,) = lines(tmp_path)
    assert max(scored) == 2
    assert line["rollout/general/length"] > 2  # what was generated
    assert line["rollout/general/scored"] < 1
    assert line["rollout/general/scored"] == pytest.approx(sum(scored) / (line["rollout/general/length"] * 4))


def test_per_branch_moments_keep_the_update_on_the_branch(tmp_path, tokenizer):
    cosines = {}
    for moments in ("shared", "per_branch"):
        folder = tmp_path / moments
        make_trainer(folder, tokenizer, optimizer_moments=moments, max_steps=16, learning_rate=1e-4).train()
        written = lines(folder)
        assert all(-1 <= line["update/cosine"] <= 1 for line in written)
        cosines[moments] = [line["update/cosine"] for line in written if line["branch"] == "domain"]
    assert sum(cosines["per_branch"]) > sum(cosines["shared"])


def test_per_branch_moments_need_the_optimizer_to_be_ours(tmp_path, tokenizer):
    model = make_model(1)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"optimizer_moments='per_branch' is an AdamW of its own.*pass no optimizer"):
        CaMOPDTrainer(
            model=model, teachers={"general": make_model(2), "domain": make_model(3)},
            args=make_args(tmp_path, optimizer_moments="per_branch"), optimizers=(optimizer, None),
            train_dataset={branch: make_prompts(branch) for branch in ("general", "domain")}, processing_class=tokenizer,
        )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"optimizer_moments='per_branch' is an AdamW of its own and cannot be optim='sgd'"
    ):
        make_args(tmp_path, optimizer_moments="per_branch", optim="sgd")


def test_zero3_that_cannot_gather_its_weights_to_generate_is_refused_with_the_arithmetic(monkeypatch):
    model = torch.nn.Linear(2**10, 2**10, bias=False, dtype=torch.bfloat16)
    check_gathered_weights(model, 2**21)
    message = (
        r"gathers all 0\.00 billion weights on every GPU: 0\.0 GiB, and this one has 0\.0 GiB\. Set use_vllm=True"
    )
    with pytest.raises(ValueError, match=message):
        check_gathered_weights(model, 2**21 - 1)
    model.weight.ds_numel = 8 * 2**30  # as ZeRO-3 says it of a weight in shards
    message = r"gathers all 8\.59 billion weights on every GPU: 16\.0 GiB, and this one has 15\.0 GiB"
    with pytest.raises(ValueError, match=message):
        check_gathered_weights(model, 15 * 2**30)


def test_zero3_in_shards_and_vllm_exclude_each_other(tmp_path, tokenizer):
    args = make_args(tmp_path, ds3_gather_for_generation=False)
    args.use_vllm, args.deepspeed_plugin = True, SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match=r"ds3_gather_for_generation=False leaves .* Leave it at True with use_vllm"):
        CaMOPDTrainer(
            model="never loaded", teachers={"general": make_model(2), "domain": make_model(3)}, args=args,
            train_dataset={branch: make_prompts(branch) for branch in ("general", "domain")}, processing_class=tokenizer,
        )  # fmt: skip


def test_tool_results_are_context_and_nothing_else(tmp_path, tokenizer, monkeypatch):
    """Tokens that a tool wrote take no part in gaps, lengths or loss, whatever the teacher says of them."""

    class Opinionated(BrokenTeacher):
        def score(self, token_ids, prompt_lens, top_k=0):
            scores = super().score(token_ids, prompt_lens)
            for score in scores:
                score.logps[2:4] = self.on_tool_tokens
            return scores

    losses = []
    for on_tool_tokens in (-1.0, float("-inf")):
        teacher = Opinionated(-1.0)
        teacher.on_tool_tokens = on_tool_tokens
        folder = tmp_path / str(on_tool_tokens)
        trainer = make_trainer(folder, tokenizer, teachers={"general": teacher, "domain": make_model(1)}, max_steps=1)

        def generate(prompts, trainer=trainer):
            prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
            completions = [[5, 6, 7, 8, 9 + row] for row in range(len(prompts))]
            return prompt_ids, completions, [[1, 1, 0, 0, 1]] * len(prompts), None, []

        monkeypatch.setattr(trainer, "_generate", generate)
        trainer.train()
        (line,) = lines(folder)
        assert line["rollout/general/length"] == 3
        losses.append(line["loss"])
    assert losses[0] == losses[1] != 0


# ------------------------------------------------------------------------------------------------- evaluation, metrics


def test_evaluation_reports_exact_gaps_per_branch(tmp_path, tokenizer):
    heldout = {branch: make_prompts(branch, 5) for branch in ("general", "domain")}
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=heldout, per_device_eval_batch_size=2)
    use_sampler(trainer, FakeSampler())
    found = trainer.evaluate()
    student, teacher = make_model(1), make_model(2)
    means = []
    for row in heldout["general"]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion, _ = FakeSampler.complete(tuple(prompt))
        if completion:
            logits = [
                model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1) for model in (teacher, student)
            ]
            gaps = [(logits[0] - logits[1])[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion)]
            means.append([sum(f(gap) for gap in gaps) / len(gaps) for f in (float, abs, lambda gap: max(gap, 0))])
    expected = torch.tensor(means, dtype=torch.float64)
    assert found["eval_general_prompts"] == len(means)
    assert found["eval_general_gap"] == pytest.approx(expected[:, 0].mean().item(), abs=LOGP)
    assert found["eval_general_kl"] == pytest.approx(-expected[:, 0].mean().item(), abs=LOGP)
    assert found["eval_general_gap_abs"] == pytest.approx(expected[:, 1].mean().item(), abs=LOGP)
    assert found["eval_general_gap_positive"] == pytest.approx(expected[:, 2].mean().item(), abs=LOGP)
    assert found["eval_general_kl_se"] == pytest.approx((expected[:, 0].std() / len(means) ** 0.5).item(), abs=LOGP)
    assert found["eval_domain_gap_abs"] == 0  # the student is the domain teacher


def test_other_prompts_than_those_of_the_trainer_are_evaluated_in_every_form(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset={"general": make_prompts("general", 4)})
    general, domain = make_prompts("general", 3), make_prompts("domain", 2)
    expected = trainer.evaluate({"general": general})
    assert expected["eval_general_prompts"] == 3
    assert expected["eval_general_gap_abs"] > 0
    both = trainer.evaluate({"general": general.to_iterable_dataset(), "domain": domain})
    assert both["eval_general_prompts"], both["eval_domain_prompts"] == (3, 2)
    assert both["eval_domain_gap_abs"] == 0  # the student is the domain teacher

    def marked(*parts):
        rows = [{**row, "branch": branch} for branch, prompts in parts for row in prompts]
        return Dataset.from_list(rows)

    with_column = trainer.evaluate(marked(("domain", domain), ("general", general)))
    plain = trainer.evaluate(marked(("general", general)))
    predicted = trainer.predict({"general": general})
    assert predicted.predictions is None
    assert trainer.predict(marked(("general", general))).metrics["test_prompts"] == 3
    for name in ("prompts", "kl", "kl_se", "gap_abs", "loss"):
        value = expected[f"eval_general_{name}"]
        assert with_column[f"eval_general_{name}"] == plain[f"eval_{name}"] == value
        assert predicted.metrics[f"test_general_{name}"] == value
    assert trainer.evaluate("general")["eval_prompts"] == trainer.evaluate()["eval_general_prompts"] == 4
    assert trainer.evaluate(trainer.eval_dataset["general"])["eval_prompts"] == 4
    for prompts in (general, general.to_iterable_dataset()):
        with pytest.raises(
            TypeError, match=r"eval_dataset must map branches.*\{'general': dataset\}.* column 'branch'"
        ):
            trainer.evaluate(prompts)
        with pytest.raises(TypeError, match="test_dataset must map branches"):
            trainer.predict(prompts)
    with pytest.raises(ValueError, match=r"eval_dataset='genral' names none of .*\['general'\]"):
        trainer.evaluate("genral")
    trainer.args.dataloader_drop_last, trainer.args.per_device_eval_batch_size = True, 2
    with pytest.raises(CaMOPDError, match=r"2 of 3 held-out prompts were measured.*dataloader_drop_last=False"):
        trainer.evaluate({"general": general})


def test_prompts_of_the_only_branch_need_no_name(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, schedule="general", teachers={"general": make_model(2)}, eval_dataset=make_prompts("g", 3),
        train_dataset={"general": make_prompts("general")},
    )  # fmt: skip
    assert trainer.evaluate()["eval_general_prompts"] == 3
    assert trainer.evaluate(make_prompts("g", 2).to_iterable_dataset())["eval_prompts"] == 2


@pytest.mark.parametrize("optimizer_moments", ["shared", "per_branch"])
def test_the_optimizer_class_is_known_without_a_trainer_as_in_the_parent(optimizer_moments, tmp_path):
    args = make_args(
        tmp_path, optimizer_moments=optimizer_moments, schedule="general+domain,domain+general,general", adam_beta1=0.5
    )
    cls, kwargs = CaMOPDTrainer.get_optimizer_cls_and_kwargs(args, None)
    if optimizer_moments == "shared":
        assert (cls, kwargs) == DistillationTrainer.get_optimizer_cls_and_kwargs(args, None)
    else:
        assert (cls.__name__, kwargs["branches"], kwargs["betas"][0]) == (
            "BranchAdamW",
            ("domain+general", "general"),
            0.5,
        )


def test_the_callback_of_trl_logs_completions_of_held_out_prompts(tmp_path, tokenizer):
    heldout = {"general": make_prompts("general", 4), "domain": make_prompts("domain", 1).to_iterable_dataset()}
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=heldout, max_steps=1)
    callbacks = [LogCompletionsCallback(trainer, num_prompts=number, freq=1) for number in (None, 3)]
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    first, *others = heldout["general"]["prompt"]
    expected = [first, make_prompts("domain", 1)[0]["prompt"], *others]
    assert [[prompt for _, prompt, _ in callback.table] for callback in callbacks] == [expected, expected[:3]]
    with pytest.raises(KeyError, match="completion"):
        trainer.eval_dataset["completion"]


def test_evaluation_changes_nothing_about_training(tmp_path, tokenizer):
    heldout = {branch: make_prompts(branch, 5) for branch in ("general", "domain")}
    losses = []
    for name, extra in (("with", {"eval_strategy": "steps", "eval_steps": 1}), ("without", {})):
        make_trainer(tmp_path / name, tokenizer, eval_dataset=heldout, **extra).train()
        losses.append([line["loss"] for line in lines(tmp_path / name)])
    assert losses[0] == losses[1]


def test_every_documented_metric_is_written_and_every_written_one_documented(tmp_path, tokenizer):
    datasets = {branch: make_prompts(branch) for branch in ("general", "domain")}
    datasets["general"] = datasets["general"].add_column("category", ["maths"] * len(datasets["general"]))
    trainer = make_trainer(tmp_path, tokenizer, max_steps=4, train_dataset=datasets)
    use_sampler(trainer, FakeSampler())
    trainer.train()
    written = {
        re.sub(r"(?<=[/_])(general|domain)(?=[/_]|$)", "<branch>", name).replace("/maths", "/<category>")
        for line in lines(tmp_path)
        for name in line
    }
    text = (TESTS.parent / "docs" / "metrics.md").read_text()
    table = text.split("## metrics.jsonl")[1].split("\n## ")[0]
    documented = {row.split("`")[1] for row in table.splitlines() if row.startswith("| `")}
    assert written == documented


def test_a_new_run_keeps_the_metrics_of_the_one_before(tmp_path, tokenizer):
    for _ in range(3):
        make_trainer(tmp_path, tokenizer, max_steps=1).train()
    assert sorted(path.name for path in tmp_path.glob("metrics*.jsonl")) == [
        "metrics-1.jsonl",
        "metrics-2.jsonl",
        "metrics.jsonl",
    ]


def test_selection_metrics_describe_kept_and_dropped_samples(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, max_steps=1, prompts_per_step=8, max_completion_length=12).train()
    (line,) = lines(tmp_path)
    kept, candidates = line["selection/general/kept"], line["selection/general/candidates"]
    assert line["selection/general/kept_fraction"] == kept / candidates
    assert 0.8 <= line["selection/general/mass"] <= 1
    overall = (
        kept * line["selection/general/length_kept"] + (candidates - kept) * line["selection/general/length_dropped"]
    )
    assert overall == pytest.approx(candidates * line["rollout/general/length"])
    assert line["time/step"] == pytest.approx(line["time/rollout"] + line["time/score"] + line["time/train"])


# --------------------------------------------------------------------------------------------------------- the parent


@pytest.mark.parametrize(
    "name",
    [
        "_tokenize_prompts", "_generate_single_turn", "_generate", "_prepare_inputs", "compute_loss",
        "training_step", "prediction_step", "evaluation_loop", "_save_checkpoint", "_get_grad_norm", "get_train_dataloader",
        "num_examples", "get_batch_samples",
    ],
)  # fmt: skip
def test_the_parent_has_what_the_trainer_overrides_or_relies_on(name):
    assert callable(getattr(DistillationTrainer, name))


def save_adapter(folder, tokenizer):
    """A specialised model as a base and an adapter on disk; the adapter's folder."""
    base = make_model(1)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    get_peft_model(model, config).save_pretrained(folder / "specialised")
    return str(folder / "specialised")


def test_base_and_adapter_are_student_and_both_teachers(tmp_path, tokenizer):
    """One set of weights: the base is the general teacher, the adapter before training the domain teacher."""

    def run(folder, **kwargs):
        trainer = make_trainer(
            folder, tokenizer, model=specialised, teachers={"general": "adapter_off", "domain": "adapter_start"},
            schedule="domain:1,general:1", learning_rate=0.05, save_strategy="steps", save_steps=2, **kwargs,
        )  # fmt: skip
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train(**({"resume_from_checkpoint": str(folder / "checkpoint-2")} if folder.name == "again" else {}))
        return before, {name: value.detach() for name, value in trainer.model.named_parameters()}

    specialised = save_adapter(tmp_path, tokenizer)
    before, after = run(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".default." in name for name in changed)
    assert any(".start." in name for name in before)
    written = lines(tmp_path / "run")
    assert (
        written[0]["branch"] == "domain" and written[0]["gap/domain/abs_mean"] == 0
    )  # the student is this teacher yet
    assert written[1]["gap/general/abs_mean"] > 0.01
    assert written[2]["gap/domain/abs_mean"] > 0

    (tmp_path / "again").mkdir()
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    _, resumed = run(tmp_path / "again")
    for name, value in after.items():
        assert torch.equal(value, resumed[name]), name


def test_an_adapter_that_changes_its_base_is_refused_before_the_model_is_loaded(tmp_path, tokenizer):
    from peft import LoraConfig

    with pytest.raises(
        ValueError, match="init_lora_weights='pissa' moves a part of the base weights into the adapter"
    ):
        make_trainer(
            tmp_path, tokenizer, model=str(tmp_path / "nowhere"), peft_config=LoraConfig(init_lora_weights="pissa"),
            teachers={"general": make_model(2), "domain": "adapter_off"},
        )  # fmt: skip


def test_a_tokenizer_without_an_end_is_refused_before_the_model_is_loaded(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end of sequence"):
        make_trainer(tmp_path, tokenizer, model=str(tmp_path / "nowhere"))
    make_model(1).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="has no end of sequence"):  # the parent loads the tokenizer
        make_trainer(tmp_path, None, model=str(tmp_path / "student"))


def test_tokens_that_the_student_cannot_read_or_that_end_nothing_are_found_at_the_start(tmp_path, caplog):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})  # the model has no row for it
    prompts = [*make_prompts("general").to_list(), {"prompt": "what is <end>"}]
    with pytest.raises(ValueError, match=r"token '<end>' \(id 43\), and the student knows 43 tokens"):
        make_trainer(
            tmp_path, tokenizer,
            train_dataset={"general": Dataset.from_list(prompts), "domain": make_prompts("domain")},
        )  # fmt: skip
    tokenizer.chat_template = tokenizer.chat_template.replace("'.' }}{% endfor %}", "'<end>' }}{% endfor %}")
    make_trainer(tmp_path, tokenizer)
    assert "the chat template ends a turn with '<end>' (id 43), which ends no completion" in caplog.text


def test_lora_student_with_adapter_off_as_domain_teacher(tmp_path, tokenizer):
    from peft import LoraConfig

    trainer = make_trainer(
        tmp_path, tokenizer, teachers={"general": make_model(2), "domain": "adapter_off"}, max_steps=4, learning_rate=0.1,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    base = {name: value.clone() for name, value in trainer.model.named_parameters() if "lora" not in name}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        if "lora" in name:
            continue
        assert torch.equal(value, base[name]), name
    domain = lines(tmp_path)[3]
    assert domain["branch"] == "domain"
    assert domain["gap/domain/abs_mean"] > 0  # three general steps have moved the adapter away from the base


def test_gradient_checkpointing_gives_the_same_losses(tmp_path, tokenizer):
    losses = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        make_trainer(folder, tokenizer, gradient_checkpointing=checkpointing).train()
        losses.append([line["loss"] for line in lines(folder)])
    assert losses[0] == pytest.approx(losses[1], rel=LOSS)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_teacher_logps_stop_the_run_with_sample_and_count(value, tmp_path, tokenizer):
    teachers = {"general": BrokenTeacher(value), "domain": make_model(1)}
    before = make_model(1)
    trainer = make_trainer(tmp_path, tokenizer, teachers=teachers, model=copy.deepcopy(before))
    with pytest.raises(
        CaMOPDError, match=r"teacher 'general' \(broken\) gave (\d) non-finite log-probs out of \1 for sample 0"
    ):
        trainer.train()
    assert all(torch.equal(*pair) for pair in zip(before.parameters(), trainer.model.parameters(), strict=True))


def test_a_teacher_that_returns_too_few_logps_stops_the_run(tmp_path, tokenizer):
    teachers = {"general": BrokenTeacher(-1.0, missing=1), "domain": make_model(1)}
    with pytest.raises(CaMOPDError, match=r"scored (\d) of the (\d) completion tokens of sample 0"):
        make_trainer(tmp_path, tokenizer, teachers=teachers).train()


@pytest.mark.parametrize("change", [-1, 1])
def test_a_teacher_that_returns_too_few_or_too_many_answers_stops_the_run(change, tmp_path, tokenizer):
    class Miscounts(BrokenTeacher):
        def score(self, token_ids, prompt_lens, top_k=0):
            return (super().score(token_ids, prompt_lens) * 2)[: len(token_ids) + change]

    trainer = make_trainer(tmp_path, tokenizer, teachers={"general": Miscounts(-1.0), "domain": make_model(1)})
    with pytest.raises(TeacherError, match=rf"teacher 'broken' returned {4 + change} answers for 4 sequences"):
        trainer.train()


def test_a_teacher_that_finds_every_token_equally_likely_has_lost_its_weights(tmp_path, tokenizer):
    teachers = {"general": BrokenTeacher(-math.log(len(VOCAB))), "domain": make_model(1)}
    with pytest.raises(
        CaMOPDError, match=r"'general' \(broken\) gives every one of \d+ tokens the log-prob -3\.761, as -ln"
    ):
        make_trainer(tmp_path, tokenizer, teachers=teachers).train()


@pytest.mark.parametrize("who", ["student", "teacher of branch 'general'"])
def test_a_context_shorter_than_prompt_and_completion_is_refused(who, tmp_path, tokenizer):
    short, long = make_model(1), make_model(2)
    short.config.max_position_embeddings = 100
    model, teacher = (short, long) if who == "student" else (long, short)
    with pytest.raises(
        ValueError, match=rf"the {who} takes sequences of 100 tokens.*128.*Lower max_completion_length"
    ):
        make_trainer(
            tmp_path, tokenizer, model=model, teachers={"general": teacher, "domain": make_model(3)},
            max_completion_length=64,
        )  # fmt: skip


def test_an_image_inside_a_message_is_refused(tmp_path, tokenizer):
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image", "text": None}]
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": parts}]}])
    with pytest.raises(
        ValueError, match=r"row 0 of branch 'domain' has a part of type 'image'.*images are not supported"
    ):
        make_trainer(tmp_path, tokenizer, train_dataset={"general": make_prompts("general"), "domain": prompts})


def test_a_vision_language_model_is_refused_with_the_way_out(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(CaMOPDTrainer, "_is_vlm", property(lambda self: True, lambda self, value: None), raising=False)
    with pytest.raises(ValueError, match=r"takes images, which no teacher can score yet. Pass its tokenizer"):
        make_trainer(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"teachers": {"general": None, "domain": "x"}}, ValueError, r"visits branch 'general', but teachers has"),
        ({"teachers": {"general": "x"}}, ValueError, r"visits branch 'domain', but teachers has"),
        ({"teachers": {"general": "x", "domain": "x", "code": "x"}}, ValueError, r"teachers has 'code', .* never visits"),
        ({"teachers": "http://localhost:1"}, TypeError, r"teachers must map each branch"),
        ({"teachers": None}, TypeError, r"teachers must map each branch"),
        (
            {"teachers": {"general": "x", "domain": "adapter_start"}},
            ValueError,
            r"'adapter_start'.*but the student comes without one, or gets a new one by peft_config",
        ),
        ({"teachers": {"general": "x", "domain": "adapter_off"}}, ValueError, r"'adapter_off'.*but the student has none"),
        ({"train_dataset": {"general": make_prompts("g")}}, ValueError, r"visits branch 'domain', but train_d"),
        ({"train_dataset": make_prompts("g")}, TypeError, r"train_dataset must map each branch"),
        ({"train_dataset": None}, TypeError, r"train_dataset must map each branch"),
        ({"eval_dataset": make_prompts("g")}, TypeError, r"eval_dataset must map branches.*\{'general': dataset\}"),
        (
            {"eval_dataset": make_prompts("g").add_column("branch", ["code"] * 11)},
            ValueError,
            r"eval_dataset has branch 'code', which is not in",
        ),
        ({"eval_dataset": {"code": make_prompts("g")}}, ValueError, r"eval_dataset has branch 'code', which is not in"),
        ({"schedule": "general:3,domain:1,code:1"}, ValueError, r"has no value for branch 'code'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_model_is_loaded(kwargs, error, message, tmp_path, tokenizer):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, tokenizer, **kwargs)


@pytest.mark.parametrize("how", ["the object", "shallow copy", "under its adapter"])
def test_a_teacher_with_weights_of_the_student_is_refused(how, tmp_path, tokenizer):
    model = make_model(1)
    teacher = copy.copy(model) if how == "shallow copy" else model
    student = model
    if how == "under its adapter":  # PEFT puts the adapter into the very object
        student = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    message = r"teacher of branch 'domain' is the student object itself, or has weights of it.*'adapter_off'"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, model=student, teachers={"general": make_model(2), "domain": teacher})


def test_prompts_that_were_shuffled_or_selected_are_not_copied(tmp_path, tokenizer, monkeypatch):
    """On every process, and into a cache that may not be writable."""
    data = {branch: make_prompts(branch).shuffle(seed=1).select(range(4)) for branch in ("general", "domain")}
    monkeypatch.setattr("datasets.Dataset.flatten_indices", None)
    make_trainer(tmp_path, tokenizer, train_dataset=data)


def test_a_prompt_with_an_image_is_refused(tmp_path, tokenizer):
    prompts = make_prompts("general").add_column("image", [None] * 11)
    with pytest.raises(ValueError, match=r"column 'image': images are not supported"):
        make_trainer(tmp_path, tokenizer, train_dataset={"general": prompts, "domain": make_prompts("domain")})


# ------------------------------------------------------------------------------------------------- teachers on servers


def test_a_server_scores_while_the_student_does(tmp_path, tokenizer, start_server):
    server = start_server()
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, teachers={"general": server.url, "domain": make_model(1)})
    score, forward = trainer.scorer.score, trainer.student.logps
    server.before = lambda: time.sleep(1.0)  # four requests at once
    slow = []

    def slow_forward(*args, **kwargs):
        if slow:
            time.sleep(0.2)  # in each of four
        return forward(*args, **kwargs)

    def score_slowly(*args, **kwargs):
        slow.append(1)
        clocks = score(*args, **kwargs)
        slow.clear()
        return clocks

    trainer.student.logps, trainer.scorer.score = slow_forward, score_slowly
    trainer.train()
    (line,) = lines(tmp_path)
    assert line["time/general/teacher"] >= 1.0
    assert 0.8 <= line["time/general/teacher_hidden"] <= line["time/general/teacher"]
    assert line["time/score"] < line["time/general/teacher"] + 0.7  # one after the other would take longer
    assert line["time/general/teacher_idle"] == pytest.approx(
        line["time/step"] - line["time/general/teacher"], abs=1e-3
    )
    assert line["time/domain/teacher_idle"] == line["time/step"]


def test_both_branches_of_a_mixed_step_are_asked_before_the_student_scores(tmp_path, tokenizer, start_server):
    general, domain = start_server(), start_server(model=make_model(2))
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=1, schedule="general:1+domain:1",
        teachers={"general": general.url, "domain": domain.url},
    )  # fmt: skip
    student_scores = threading.Event()
    score, forward = trainer.scorer.score, trainer.student.logps

    def begin(
        *args, **kwargs
    ):  # what is asked from now on is answered when the student has begun, and it begins when both are asked
        asked = len(general.scored), len(domain.scored)

        def forward_when_both_are_asked(*args, **kwargs):
            deadline = time.monotonic() + 60
            while len(general.scored) == asked[0] or len(domain.scored) == asked[1]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            student_scores.set()
            return forward(*args, **kwargs)

        trainer.student.logps = forward_when_both_are_asked
        general.before = domain.before = lambda: student_scores.wait(10)
        return score(*args, **kwargs)

    trainer.scorer.score = begin
    trainer.train()
    (line,) = lines(tmp_path)
    assert line["time/general/teacher_hidden"] > 0
    assert line["time/domain/teacher_hidden"] > 0


def test_a_server_gives_the_step_of_the_same_teacher_in_the_process(tmp_path, tokenizer, start_server):
    server = start_server(model=make_model(2), compact=True)
    teachers = {"general": server.url, "domain": make_model(1)}
    make_trainer(tmp_path / "server", tokenizer, max_steps=2, teachers=teachers).train()
    make_trainer(tmp_path / "process", tokenizer, max_steps=2).train()
    for one, other in zip(lines(tmp_path / "server"), lines(tmp_path / "process"), strict=True):
        for key in ("loss", "grad_norm", "gap/general/mean", "selection/general/kept"):
            assert one[key] == pytest.approx(other[key], rel=2 * LOSS), key


@pytest.mark.parametrize("other_weights", [True, False])
def test_a_server_that_says_it_is_the_student_and_is_not_is_refused_before_the_first_rollout(
    other_weights, tmp_path, tokenizer, start_server
):
    student = make_model(1)
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    server = start_server(model=make_model(5) if other_weights else student, root=str(tmp_path / "student"))
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=1, model=str(tmp_path / "student"), model_init_kwargs={"dtype": "float32"},
        teachers={"general": make_model(2), "domain": server.url},
    )  # fmt: skip
    if not other_weights:
        trainer.train()
        return
    trainer.roll_out = None
    with pytest.raises(TeacherError, match=r"'domain'.*differs from the trainer by .* other weights stand behind"):
        trainer.train()


def test_a_student_with_an_adapter_is_not_taken_for_the_base_it_is_named_after(tmp_path, tokenizer, start_server):
    make_model(1).save_pretrained(tmp_path / "base")
    student = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]),
    )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.5)
    base = start_server(model=make_model(1), root=str(tmp_path / "base"))
    teachers = {"general": base.url, "domain": make_model(2)}
    make_trainer(tmp_path, tokenizer, model=student, max_steps=1, teachers=teachers).train()
    (line,) = lines(tmp_path)
    assert line["gap/general/abs_mean"] > 0.5


def test_a_server_that_has_lost_its_weights_is_refused_before_the_first_rollout(tmp_path, tokenizer, start_server):
    lost = make_model(2)
    with torch.no_grad():
        lost.lm_head.weight.zero_()
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=1, teachers={"general": start_server(model=lost).url, "domain": make_model(1)}
    )
    trainer.roll_out = None
    with pytest.raises(TeacherError, match=r"'general'.*as -ln\(vocabulary size\): it has lost its weights"):
        trainer.train()


def test_a_far_teacher_is_warned_of_once_and_a_near_one_not(tmp_path, tokenizer, caplog):
    make_trainer(tmp_path, tokenizer, max_steps=5, learning_rate=1e-9).train()
    warned = [record.getMessage() for record in caplog.records if "initial KL" in record.getMessage()]
    (text,) = warned  # five steps visit "general" four times; the domain's teacher is the student itself
    assert text.startswith("teacher 'general', initial KL: ")
    assert "above 0.1" in text


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_model_whose_logits_are_not_what_is_computed_is_refused_before_the_first_rollout(tmp_path, tokenizer, whose):
    bent = make_model(2)
    forward = bent.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output

    bent.forward = scaled
    changes = {"model": bent} if whose == "student" else {"teachers": {"general": bent, "domain": make_model(1)}}
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, **changes)
    trainer._generate_single_turn = lambda *args: pytest.fail("generated")
    with pytest.raises(ValueError, match=rf"{whose} .*\(LlamaForCausalLM\) that CaMOPD computes .* by \d.* nats"):
        trainer.train()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_an_evaluation_measures_is_no_part_of_a_step(tmp_path, tokenizer):
    """FSDP2 takes a step of zeros on resume, before any step of the run: with nothing to add to, also after `evaluate`."""
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset={"general": make_prompts("general", 2)}, max_steps=2)
    trainer.evaluate()
    optimizer = trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    assert trainer.step is None
    trainer.train()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_the_check_of_teachers_is_no_part_of_the_first_rollouts_time(tmp_path, tokenizer, start_server):
    server = start_server()
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, teachers={"general": server.url, "domain": make_model(1)})
    checking = []

    class Before(StepCallback):
        def on_step_started(self, step):
            checking.append(len(server.scored))

    trainer.add_callback(Before())
    trainer.train()
    assert checking[0] > 0  # it was asked before the step, whose clock starts with it


def test_a_server_with_the_students_start_is_another_model_once_the_trainer_has_stepped(
    tmp_path, tokenizer, start_server
):
    student = make_model(1)
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    server = start_server(model=student, root=str(tmp_path / "student"))
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=2, model=str(tmp_path / "student"), model_init_kwargs={"dtype": "float32"},
        teachers={"general": make_model(2), "domain": server.url}, learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    trainer.train()  # from step 0 again, with the weights that it has


def test_what_a_callback_measures_is_in_the_line_of_the_step_whenever_it_was_added(tmp_path, tokenizer):
    class Measure(StepCallback):
        def __init__(self, name):
            self.name = name

        def on_step_closed(self, step):
            step.metrics[self.name] = step.number

    trainer = make_trainer(tmp_path, tokenizer, max_steps=2, callbacks=[Measure("mine/early")])
    trainer.add_callback(Measure("mine/late"))
    trainer.train()
    assert [(line["mine/early"], line["mine/late"]) for line in lines(tmp_path)] == [(0, 0), (1, 1)]


def test_a_trainer_without_the_callbacks_that_measure_trains_the_same(tmp_path, tokenizer):
    trained = []
    for watched in (True, False):
        trainer = make_trainer(tmp_path / str(watched), tokenizer, max_steps=4, diagnostics_steps=1)
        if not watched:
            for callback in (Diagnostics, UpdateMeasures, TeacherWatch, MetricsFile):
                trainer.remove_callback(callback)
        trainer.train()
        trained.append(dict(trainer.model.named_parameters()))
    assert not (tmp_path / "False" / "metrics.jsonl").exists()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
