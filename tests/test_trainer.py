"""The trainer against a step computed by hand, and what it promises around it."""

import copy
import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import LOSS, make_model, make_prompts, make_tokenizer
from datasets import Dataset
from safetensors.torch import load_file
from steps import (
    BASELINES,
    CASES,
    PARAMETER,
    VARIANTS,
    Case,
    check_evaluations,
    measured,
    reference_step,
    runs_of,
    trainer_step,
)
from trainers import TEMPLATE, lines, make_trainer

from camopd.callbacks.diagnostics import Diagnostics
from camopd.callbacks.metrics_file import MetricsFile
from camopd.callbacks.teacher_watch import TeacherWatch
from camopd.callbacks.update import UpdateMeasures
from camopd.errors import CaMOPDError


TESTS = Path(__file__).parent


# ------------------------------------------------------------------------------------------------------ Eq. 9, exactly


STEPS = [
    *itertools.product(
        CASES,
        [
            ("rebalanced", 1),
            ("rebalanced", 2),
            ("rebalanced", 8),
            ("padding_free", 2),
            ("padding_free", 8),
            ("token_budget", 1),
        ],
    ),
    *itertools.product(BASELINES, [("rebalanced", 2), ("padding_free", 8), ("token_budget", 1)]),
]


@pytest.mark.parametrize(
    ("case", "variant", "batch_size"),
    [pytest.param(case, *how, id=f"{case.name}-{how[0]}-batches_of_{how[1]}") for case, how in STEPS],
)
def test_step_equals_the_step_by_hand(case, variant, batch_size, tmp_path):
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
def test_step_of_several_processes_is_the_step_by_hand(processes, tmp_path, python):
    """In the case `one_sample_kept` all ranks but one have nothing to train: none of them may wait for ever."""
    command = [python, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(TESTS / "steps.py"), str(tmp_path), str(4 // processes)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    for variant, case in runs_of(processes):
        expected, expected_loss, _ = reference_step(case)
        found = load_file(tmp_path / f"{variant}-{case.name}.safetensors")
        assert found.pop("loss").item() == pytest.approx(expected_loss, rel=LOSS)
        seen = {name: found.pop(name) for name in list(found) if name not in expected}
        if variant == "rebalanced":
            _, metrics = trainer_step(case, str(tmp_path / f"alone-{case.name}"), batch_size=2)
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


def test_step_cases_hold_what_they_are_meant_to_hold():
    # Uneven shares for two ranks (positions 0, 2, ... and 1, 3, ...), a rank with nothing, weights in and out of band.
    _, _, kept = reference_step(CASES[0])
    even = sum(position % 2 == 0 for position in kept)
    assert 0 < len(kept) < 8
    assert even != len(kept) - even
    assert len(reference_step(CASES[1])[2]) == 1


# -------------------------------------------------------------------------------------------- student equals teacher


def test_sample_that_would_not_be_trained_stops_the_run_before_the_update(tmp_path, tokenizer, monkeypatch):
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


def test_student_that_equals_its_teacher_does_not_move_at_all(tmp_path, tokenizer):
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
def test_gaps_of_equal_weights_from_disk_are_exactly_zero_under_bf16_autocast(schedule, tmp_path, tokenizer):
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


# ------------------------------------------------------------------------------------------------- schedule and data


def test_steps_take_the_branches_of_the_schedule(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, max_steps=5).train()
    assert [line["branch"] for line in lines(tmp_path)] == ["general", "general", "general", "domain", "general"]


def test_branches_may_be_three(tmp_path, tokenizer):
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
    roll_out = trainer.roll_out
    trainer.roll_out = lambda rows, *limits: seen.append((rows, roll_out(rows, *limits))) or seen[-1][1]
    trainer.train()
    ((rows, (samples, _)),) = seen
    for row, sample in zip(rows, samples, strict=True):
        text = row["prompt"] if isinstance(row["prompt"], str) else f"u {row['prompt'][0]['content']}.a "
        assert sample.token_ids[: sample.prompt_len] == tokenizer(text)["input_ids"]


ASK = {"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "you"}]}
SAY = {"role": "assistant", "content": [{"type": "text", "text": "well "}, {"type": "text", "text": "x"}]}
GLAD, SAD = {"mood": "glad"}, {"mood": "sad"}
WRITTEN = [  # a row, and what of it the model is to see; `from_list` takes its columns from the first
    ({"prompt": [ASK], "system": "be good", "tools": None, "chat_template_kwargs": GLAD},
     "system be good.user hi you.a glad"),
    ({"prompt": [ASK], "tools": [{"name": "find"}], "chat_template_kwargs": SAD}, "find user hi you.a sad"),
    ({"prompt": [ASK, SAY]}, "user hi you.assistant well x"),
]  # fmt: skip


def test_model_sees_what_the_user_wrote_in_training_and_evaluation(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompts = Dataset.from_list([row for row, _ in WRITTEN])
    trainer = make_trainer(
        tmp_path, tokenizer, prompts_per_step=3, per_device_train_batch_size=1, max_steps=1, schedule="domain",
        teachers={"domain": make_model(1)}, train_dataset={"domain": prompts}, eval_dataset={"domain": prompts},
        prefill=True,
    )  # fmt: skip
    expected = sorted(tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in WRITTEN)
    for rows in (trainer.train_dataset.rows_of(0), list(trainer.eval_dataset["domain"])):
        samples, _ = trainer.roll_out(rows, 4)
        assert sorted(sample.token_ids[: sample.prompt_len] for sample in samples) == expected


def test_prompts_that_are_long_keep_their_last_tokens_and_are_counted(tmp_path, tokenizer):
    prompts = Dataset.from_list([{"prompt": "a" * 30 + "tail"}, {"prompt": "short"}])
    trainer = make_trainer(
        tmp_path, tokenizer, max_prompt_length=6, max_steps=1, prompts_per_step=2,
        train_dataset={"general": prompts, "domain": prompts},
    )  # fmt: skip
    rows = [{"prompt": text, "branch": "general"} for text in ("a" * 30 + "tail", "short")]
    samples, prompts_cut = trainer.roll_out(rows, 4)
    ids = [sample.token_ids[: sample.prompt_len] for sample in samples]
    assert tokenizer.decode(ids[0]).replace(" ", "") == "aatail"
    assert tokenizer.decode(ids[1]).replace(" ", "") == "short"
    assert prompts_cut == 1
    trainer.train()
    assert lines(tmp_path)[0]["rollout/prompts_cut"] == 1


# ------------------------------------------------------------------------------------------------- importance weights


def test_rollout_logps_of_vllm_reach_the_importance_weights(tmp_path):
    _, metrics = trainer_step(Case("ratios"), str(tmp_path), 2)
    assert metrics["importance/active"] == 1
    # FakeSampler is off by a factor of up to e either way: log-uniform, so 1 - ln 2 = 31 % lie outside [0.5, 2]
    assert 0.1 < metrics["importance/outside_band"] < 0.55
    assert 2 < metrics["importance/ratio_max"] < 2.72


def test_importance_weights_without_rollout_logps_are_one_and_it_is_said(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, max_steps=1).train()
    (line,) = lines(tmp_path)
    assert line["importance/active"] == 0
    assert "importance/ratio_mean" not in line


@pytest.mark.parametrize(
    ("settings", "active"),
    [({}, 1), ({"importance_sampling_mode": "none"}, 0), ({"divergence": "top_k", "divergence_top_k": 5}, 0)],
    ids=str,
)
def test_tokens_are_outside_a_band_only_where_it_is_in_the_loss(settings, active, tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, max_steps=1, student_logps="engine", **settings).train()
    (line,) = lines(tmp_path)
    assert line["importance/active"] == active and line["importance/ratio_max"] > 0
    assert line["importance/outside_band"] == (0 if active else None)


def test_prefix_of_the_completions_is_scored_and_trained(tmp_path, tokenizer):
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


# ------------------------------------------------------------------------------------------------- evaluation, metrics


def test_gradient_checkpointing_gives_the_same_losses(tmp_path, tokenizer):
    losses = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        make_trainer(folder, tokenizer, gradient_checkpointing=checkpointing).train()
        losses.append([line["loss"] for line in lines(folder)])
    assert losses[0] == pytest.approx(losses[1], rel=LOSS)


# ------------------------------------------------------------------------------------------------- teachers on servers


def test_server_gives_the_step_of_the_same_teacher_in_the_process(tmp_path, tokenizer, start_server):
    server = start_server(model=make_model(2), compact=True)
    teachers = {"general": server.url, "domain": make_model(1)}
    make_trainer(tmp_path / "server", tokenizer, max_steps=2, teachers=teachers).train()
    make_trainer(tmp_path / "process", tokenizer, max_steps=2).train()
    for one, other in zip(lines(tmp_path / "server"), lines(tmp_path / "process"), strict=True):
        for key in ("loss", "grad_norm", "gap/general/mean", "selection/general/kept"):
            assert one[key] == pytest.approx(other[key], rel=2 * LOSS), key


def test_trainer_without_the_callbacks_that_measure_trains_the_same(tmp_path, tokenizer):
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
