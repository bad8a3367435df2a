"""`student_logps: auto`: when the engine's log-probs are taken, and that a resumed run decides as one without a stop."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import LOGP, LOSS, make_model, make_prompts, make_summary
from hypothesis import given
from hypothesis import strategies as st
from trainers import lines, make_trainer
from transformers import TrainerState

from camopd.callbacks.engine_logps import MARGIN, EngineLogps
from camopd.errors import TeacherError
from camopd.guards import LOG_RATIO
from camopd.step import Step, StepCallback


AUTO = {"student_logps": "auto", "schedule": "general:1,domain:1", "max_steps": 6, "selection": False}


def make_callback(student_logps="auto", dtype=torch.float32, **settings):
    args = SimpleNamespace(
        **{
            "student_logps": student_logps,
            "disable_dropout": True,
            "needs_entropy": False,
            "rollout_lag": 0,
            **settings,
        }
    )
    return EngineLogps(args, dtype, args.needs_entropy)


def make_step(branch="b", gap=1.0, log_ratio=1e-6, tokens=8):
    step = Step(0, (branch,))
    of_tokens = {"num_tokens": tokens, "num_ratios": tokens, "gap_abs": gap * tokens, "log_ratio": log_ratio * tokens}
    step.summaries = [make_summary(branch=branch, **of_tokens)]
    step.apart = {0: (log_ratio * tokens, tokens)}  # of the loss's forward
    return step


def takes_engine_after(callback, step, branch="b"):
    """Whether the step after this one takes the engine's."""
    callback.on_step_closed(step)
    following = Step(1, (branch,))
    callback.on_step_started(following)
    return following.engine_logps


def test_auto_takes_the_engines_log_probs_from_a_branchs_second_step_on(tmp_path, tokenizer):
    at_evaluation = []

    class AtEvaluation(StepCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            at_evaluation.append(metrics["eval_general_entropy"])  # which the engine's have none of

    held_out = {"general": make_prompts("general", count=2)}
    watch = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": held_out, "callbacks": [AtEvaluation()]}
    trainer = make_trainer(tmp_path / "auto", tokenizer, **AUTO, **watch)
    forwards, logps = [], trainer.student.logps
    trainer.student.logps = lambda *args, **run: forwards.append(run) or logps(*args, **run)
    trainer.train()
    found = lines(tmp_path / "auto")
    assert [line["importance/engine_logps"] for line in found] == [0, 0, 1, 1, 1, 1]
    assert [line["entropy"] is None for line in found] == [False, False, True, True, True, True]
    assert len(at_evaluation) == 2 and min(at_evaluation) > 0
    make_trainer(tmp_path / "trainer", tokenizer, **{**AUTO, "student_logps": "trainer"}).train()
    for line, other in zip(found, lines(tmp_path / "trainer"), strict=True):
        name = f"gap/{line['branch']}/mean"
        assert line["importance/log_ratio"] < LOGP
        assert line[name] == pytest.approx(other[name], abs=LOGP)
        assert line["loss"] == pytest.approx(other["loss"], rel=2 * LOSS, abs=LOGP)


def test_auto_has_gaps_of_exactly_zero_while_the_teacher_is_the_student(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, **{**AUTO, "schedule": "domain:1,general:1"}).train()
    found = lines(tmp_path)
    assert found[0]["gap/domain/abs_mean"] == 0 and found[0]["guard/rounding"] == 1
    # Its second step is decided by the first, whose gaps said nothing.
    assert [line["importance/engine_logps"] for line in found] == [0, 0, 0, 1, 1, 1]


def test_auto_decides_after_a_resume_as_without_a_stop(tmp_path, tokenizer):
    settings = {**AUTO, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, tokenizer, **settings).train()
    whole = lines(tmp_path)
    make_trainer(tmp_path, tokenizer, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again = lines(tmp_path)
    for name in ("step", "loss", "importance/engine_logps", "importance/log_ratio", "grad_norm"):
        assert [line[name] for line in again[-3:]] == [line[name] for line in whole[-3:]], name
    assert again[-3]["importance/engine_logps"] == 1


def test_auto_forgets_what_another_run_of_the_trainer_has_shown():
    callback = make_callback()
    assert takes_engine_after(callback, make_step())
    callback.on_train_begin(None, TrainerState(), None)
    step = Step(0, ("b",))
    callback.on_step_started(step)
    assert not step.engine_logps


@given(st.sampled_from(list(LOG_RATIO)), st.floats(0, 2), st.floats(1e-9, 10), st.booleans(), st.integers(1, 9))
def test_auto_takes_the_engines_where_the_gaps_stand_out_of_what_parts_it_from_the_trainer(
    dtype, log_ratio, times, with_engine, tokens
):
    callback = make_callback(dtype=dtype)
    step = make_step(gap=times * MARGIN * log_ratio, log_ratio=log_ratio, tokens=tokens)
    step.engine_logps = with_engine
    if abs(times - 1) > 1e-6 and log_ratio > 1e-9:  # sums and means round
        expected = times > 1 and log_ratio <= LOG_RATIO[dtype]
        if abs(log_ratio - LOG_RATIO[dtype]) > 1e-9:
            assert takes_engine_after(callback, step) == expected
    assert not takes_engine_after(callback, make_step(gap=0.0, log_ratio=log_ratio))


@pytest.mark.parametrize("broken", [make_step(tokens=0), make_step(log_ratio=math.nan), make_step(gap=math.nan)])
def test_auto_takes_the_trainers_after_a_step_that_shows_nothing(broken):
    assert not takes_engine_after(make_callback(), broken)


def test_auto_takes_the_trainers_in_a_mixed_step_with_a_branch_that_has_shown_nothing():
    callback = make_callback()
    assert takes_engine_after(callback, make_step("a"), "a")
    mixed = Step(1, ("a", "b"))
    callback.on_step_started(mixed)
    assert not mixed.engine_logps


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"disable_dropout": False}, False),  # the loss's forward drops, and generation does not
        ({"rollout_lag": 1}, False),  # the engine has the weights of before the last update
        ({"needs_entropy": True}, False),  # the forward is made anyway
        ({"student_logps": "engine", "disable_dropout": False}, True),  # as asked for
    ],
)
def test_auto_never_takes_the_engines_where_they_save_nothing_or_differ(settings, expected):
    assert takes_engine_after(make_callback(**settings), make_step()) == expected


def test_engine_takes_its_log_probs_in_every_step(tmp_path, tokenizer):
    settings = {**AUTO, "student_logps": "engine", "max_steps": 2}
    make_trainer(tmp_path, tokenizer, model=make_model(1), **settings).train()
    assert [line["importance/engine_logps"] for line in lines(tmp_path)] == [1, 1]


def test_evaluation_after_a_step_that_broke_off_has_the_trainers_log_probs(tmp_path, tokenizer):
    """With entropies, which the engine's have none of."""
    held_out = {"general": make_prompts("general", count=2)}
    trainer = make_trainer(tmp_path, tokenizer, **{**AUTO, "student_logps": "engine"}, eval_dataset=held_out)
    score = trainer.scorer.score

    def fail(*args, **kwargs):
        raise TeacherError("it is gone")

    trainer.scorer.score = fail
    with pytest.raises(TeacherError):
        trainer.train()
    trainer.scorer.score = score
    assert trainer.evaluate()["eval_general_entropy"] > 0


def test_evaluation_names_the_branch_in_all_that_it_says(tmp_path, tokenizer):
    held_out = {branch: make_prompts(branch, count=2) for branch in ("general", "domain")}
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=held_out)
    found = trainer.evaluate()
    of_each = [{name.removeprefix(f"eval_{branch}_") for name in found if name.startswith(f"eval_{branch}_")}
               for branch in held_out]  # fmt: skip
    assert of_each[0] == of_each[1] >= {"entropy", "completions/mean_length", "kl"}
    assert found["eval_general_entropy"] != found["eval_domain_entropy"]
    assert len(found) - 2 * len(of_each[0]) <= 2  # num_tokens and epoch, which are of the run
