"""Guards on a run's numbers: each stops, skips or warns where a fault is put in, and is silent on a healthy run.

As a script for `accelerate launch`: tests/test_guards.py FOLDER LAUNCH_FILE
"""

import copy
import dataclasses
import importlib
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_forward, make_model, make_prompts, make_summary, make_tokenizer
from fake_rollouts import FakeRollouts
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from steps import FakeSampler, use_sampler
from train_tiny import fsdp_on_cpu
from trainers import BrokenTeacher, lines, make_trainer
from trl import TrlParser

from camopd import CaMOPDConfig, TokenScores, scoring
from camopd.callbacks.guards import UNSEEN, Guards, log_ratio_of, says_nothing
from camopd.errors import CaMOPDError, GuardError
from camopd.guards import GUARDS, SPARE, log_ratio_bound, rounding_bound, settle
from camopd.metrics import of_branch
from camopd.optimizer import local
from camopd.samples import Sample
from camopd.scoring import Scorer
from camopd.step import Step, StepCallback
from camopd.teachers.local import LocalTeacher


PLAIN = {"divergence": "sampled", "token_rule": "none"}


TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "configs" / "accelerate"
NAN = math.nan


class BreakLosses(StepCallback):
    """Makes the loss of steps, counted from 0, a number that is none: that of the last micro-batch."""

    def __init__(self, steps, value=NAN):
        self.steps, self.value = steps, value

    def on_step_ready(self, step):
        if step.number in self.steps:
            step.micro_batches[-1].gaps.fill_(self.value)


class BreakGradients(StepCallback):
    """Makes the gradient of one parameter NaN in some steps; the loss is finite."""

    def __init__(self, steps):
        self.steps, self.broken = steps, False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        parameter = model.model.layers[1].mlp.up_proj.weight
        parameter.register_hook(lambda grad: grad * NAN if self.broken else grad)

    def on_step_started(self, step):
        self.broken = step.number in self.steps


def state_of(model, optimizer):
    """Weights and the optimizer's state, as a flat mapping of copies."""
    found = {f"weight {place}": local(param.detach()).clone() for place, param in enumerate(model.parameters())}
    for place, state in optimizer.state_dict()["state"].items():
        found.update({f"{place} {name}": copy.deepcopy(value) for name, value in state.items()})
    found = {name: local(value) if isinstance(value, torch.Tensor) else value for name, value in found.items()}
    return found


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


class Moves(StepCallback):
    """Whether weights or moments have changed in each step."""

    def __init__(self):
        self.found = []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before = state_of(model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.found.append(not same(self.before, state_of(model, optimizer)))


class Weights(StepCallback):
    """Whether the weights of this process, whole or in shards, have changed in each step."""

    def __init__(self):
        self.found = []

    @staticmethod
    def of(model):
        return [getattr(weight, "ds_tensor", weight).detach().clone() for weight in model.parameters()]

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = self.of(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.found.append(not all(map(torch.equal, self.before, self.of(model))))


class ClaimsLoss(StepCallback):
    """Says of a step that a loss is NaN when it has been stepped with its gradient, which is finite."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_ready(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.step.number in self.steps:
            self.step.broken_losses = [([0], NAN)]


@pytest.fixture
def warnings(caplog):
    """A function that gives what the guards have warned of so far."""
    caplog.set_level(logging.WARNING, logger="camopd")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "camopd.callbacks.guards"]


# ----------------------------------------------------------------------------------------------- loss and gradient


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim": "adamw_torch"},
        {"optimizer_moments": "per_branch"},
        {"optim": "adafactor"},
        {"max_grad_norm": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("fault", [BreakLosses, BreakGradients])
def test_step_that_is_not_finite_leaves_weights_and_moments_as_they_are(
    fault, settings, tmp_path, tokenizer, warnings
):
    moves = Moves()
    callbacks = [fault({1}), moves]
    settings = {"schedule": "general:9,domain:1", "guards": {"truncated": None}, **settings}
    trainer = make_trainer(tmp_path, tokenizer, callbacks=callbacks, **settings)
    trainer.train()
    assert moves.found == [True, False, True, True]
    assert [line["guard/skipped"] for line in lines(tmp_path)] == [0, 1, 0, 0]
    assert lines(tmp_path)[1]["grad_norm"] is None
    assert lines(tmp_path)[1]["update/changed_share"] == 0
    assert all(math.isfinite(line["grad_norm"]) for place, line in enumerate(lines(tmp_path)) if place != 1)
    (text,) = warnings()
    kept = trainer.checkpoints and tmp_path / "rejected" / "step-2-rank-0.safetensors"
    what = r"the norm of the gradient is nan" if fault is BreakGradients else r"the loss of positions \d(, \d)* is nan"
    assert re.match(rf"step 2 \(general\): {what}", text) and str(kept) in text
    record = json.loads(kept.with_suffix(".json").read_text())
    assert record["step"] == 2 and record["branch"] == "general" and record["why"] in text
    assert {"token_ids", "mask", "gaps", "teacher_logps", "student_logps"} <= set(load_file(kept))


def test_skipped_steps_stop_the_run_at_the_third_in_a_row_and_a_finite_one_between_counts_anew(tmp_path, tokenizer):
    make_trainer(tmp_path / "twice", tokenizer, callbacks=[BreakLosses({0, 1, 3, 4})], max_steps=6).train()
    assert [line["guard/skipped"] for line in lines(tmp_path / "twice")] == [1, 1, 0, 1, 1, 0]

    model = make_model(1)
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model=model,
        callbacks=[BreakLosses({0, 1, 2}, math.inf)],
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.raises(
        GuardError, match=r"step 3 \(general\): the loss of .* is -?inf, after 2 skipped steps"
    ) as caught:
        trainer.train()
    assert "guards: {skipped_steps: null}" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert len(list((tmp_path / "rejected").glob("*.safetensors"))) == 3
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_skipping_can_be_switched_off_and_allowed_for_no_step(tmp_path, tokenizer):
    with pytest.raises(GuardError, match=r"step 1 \(general\): the loss of positions .* is nan\. Look at"):
        make_trainer(tmp_path / "never", tokenizer, callbacks=[BreakLosses({0})], guards={"skipped_steps": 0}).train()
    trainer = make_trainer(
        tmp_path, tokenizer, callbacks=[BreakLosses({0})], guards={"skipped_steps": None}, max_steps=1
    )
    trainer.train()
    assert not any(param.isfinite().all() for param in trainer.model.parameters())


def test_learning_rate_far_too_large_saves_no_weights_that_are_not_finite(tmp_path, tokenizer):
    """The loss of the first step is finite: its update alone makes the weights infinite, and none of them is saved."""
    trainer = make_trainer(
        tmp_path, tokenizer, learning_rate=1e39, save_strategy="steps", save_steps=1, max_steps=8, max_grad_norm=0.0
    )
    with pytest.raises(CaMOPDError, match=r"weights .*step 1.* are not finite, so nothing is saved"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_learning_rate_that_grows_far_too_large_leaves_the_checkpoint_from_before_it(tmp_path, tokenizer):
    class Grows(StepCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 2:
                optimizer.param_groups[0]["lr"] = 1e39

    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    trainer = make_trainer(tmp_path, tokenizer, callbacks=[Grows()], **settings)
    with pytest.raises(CaMOPDError, match=r"weights .*step 3.* are not finite.*Go on from '.*checkpoint-2'"):
        trainer.train()
    saved = sorted(tmp_path.glob("checkpoint-*"))
    assert [folder.name for folder in saved] == ["checkpoint-1", "checkpoint-2"]
    for folder in saved:
        assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values()), folder


# ------------------------------------------------------------------------------------------------------- log-probs


class Louder(FakeSampler):
    """A rollout engine whose log-probs are off by so many nats."""

    def __init__(self, nats):
        self.nats = nats

    def generate(self, *args, **kwargs):
        prompts, completions, logprobs, more = super().generate(*args, **kwargs)
        return prompts, completions, [[[token[0] + self.nats] for token in row] for row in logprobs], more


def test_log_prob_of_a_teacher_above_0_stops_the_run_and_one_of_rounding_does_not(tmp_path, tokenizer):
    def run(value, **settings):
        teachers = {"general": BrokenTeacher(value), "domain": make_model(1)}
        model = make_model(1)
        before = copy.deepcopy(model.state_dict())
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        trainer = make_trainer(folder, tokenizer, teachers=teachers, model=model, max_steps=1, **settings)
        try:
            trainer.train()
        finally:
            moved = any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
            assert moved == (trainer.state.global_step > 0)

    wanted = r"step 1 \(general\): teacher 'general' \(broken\) gave (\d) of \1 tokens of sample 0 .* up to 0\.5: "
    with pytest.raises(GuardError, match=wanted) as caught:
        run(0.5)
    assert str(tmp_path / "0" / "rejected" / "step-1-rank-0.safetensors") in str(caught.value)
    assert (load_file(tmp_path / "0" / "rejected" / "step-1-rank-0.safetensors")["teacher_logps"] == 0.5).all()
    run(0.0099)
    run(0.5, guards={"log_prob": 0.6})
    run(0.5, guards={"log_prob": None})


def test_log_prob_of_the_rollout_engine_above_0_stops_the_run(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    use_sampler(trainer, Louder(20.0))
    with pytest.raises(GuardError, match=r"the rollout engine gave .* log-prob above 0"):
        trainer.train()


def test_log_prob_of_the_student_above_0_is_an_error_of_every_rank():
    student = make_forward(make_model(1))
    rows = student.rows
    student.rows = lambda *args, **kwargs: [(logps * 0 + 3.0, entropy) for logps, entropy in rows(*args, **kwargs)]
    sample = Sample("general", 4, [5, 6, 7], 2, torch.ones(1, dtype=torch.bool), 1, False)
    teachers = {"general": LocalTeacher(make_model(2), "t", "cpu", 2)}

    def scorer(gather):
        return Scorer(student, teachers, 2, gather, settle(None))

    with pytest.raises(GuardError, match=r"student gave 1 of 1 tokens of sample 4 \(branch 'general'\)"):
        scorer(list).score([sample], ["general"])
    student.rows = rows
    scorer(list).score([sample], ["general"])

    def gather(mine):  # another rank has met an error
        return [*mine, (GuardError, "of rank 1")] if mine == [None] else mine

    with pytest.raises(GuardError, match="of rank 1"):
        scorer(gather).score([sample], ["general"])


def test_log_prob_far_below_0_is_a_number(tmp_path, tokenizer):
    class Refuses(BrokenTeacher):
        def score(self, token_ids, prompt_lens, top_k=0):
            scores = super().score(token_ids, prompt_lens)
            for score in scores:
                score.logps[0] = -9999.0
            return scores

    teachers = {"general": Refuses(-1.0), "domain": make_model(1)}
    make_trainer(tmp_path, tokenizer, teachers=teachers, max_steps=1).train()
    (line,) = lines(tmp_path)
    assert line["teacher/general/perplexity"] is None and line["gap/general/mean"] < -1000


@given(st.floats(-1e30, 0), st.integers(1, 1000))
def test_perplexity_is_that_of_any_log_prob(logp, tokens):
    row = make_summary(
        num_tokens=tokens, length=tokens, num_ids=tokens + 1, teacher_logp=logp * tokens, gap_samples=(0.0,)
    )
    found = of_branch("b", [row], {0}, False)["teacher/b/perplexity"]
    assert found == math.inf if logp < -710 else found >= 1


class Off(FakeSampler):
    """A rollout engine whose log-probs are the student's, but for so many nats."""

    def __init__(self, trainer, nats):
        self.trainer, self.nats = trainer, nats

    def generate(self, prompts, images, num_generations, profiler):
        completions = [[5, 6, 7]] * len(prompts)
        rows = [[*prompt, 5, 6, 7] for prompt in prompts]
        logps, _ = make_forward(self.trainer.model).logps(rows, [len(prompt) for prompt in prompts])
        found = [[[value + self.nats] for value in row[:3]] for row in logps.tolist()]
        return prompts, completions, found, None


@pytest.mark.parametrize("student_logps", ["trainer", "engine"])
def test_rollout_engine_that_is_another_model_stops_the_run_before_the_optimizer(student_logps, tmp_path, tokenizer):
    def run(folder, nats, limit=0, **settings):
        trainer = make_trainer(tmp_path / folder, tokenizer, max_steps=1, student_logps=student_logps, **settings)
        use_sampler(trainer, Off(trainer, nats))
        trainer.args.guards["log_ratio"] = limit
        before = copy.deepcopy(trainer.model.state_dict())
        try:
            trainer.train()
        finally:
            moved = any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
            assert moved == (trainer.state.global_step > 0)

    wanted = r"step 1 \(general\): the log-probs of the trainer .* 0\.02 nats per token .*guards\['log_ratio'\]=0\.01"
    with pytest.raises(GuardError, match=wanted):
        run("off", -0.02)
    run("rounding", -0.005)
    run("allowed", -0.02, 0.03)
    run("switched_off", -0.02, None)
    with pytest.raises(GuardError, match=wanted):
        run("without_weights", -0.02, importance_sampling_mode="none")


rows_of_servers = st.lists(st.tuples(st.sampled_from(["", "a", "b"]), st.floats(0, 90), st.integers(1, 8 * SPARE)))


@given(rows_of_servers, st.floats(0.01, 2), st.sampled_from([0, SPARE]))
def test_log_ratio_is_that_of_all_or_of_a_server_that_is_surely_above_the_limit(rows, limit, spare):
    found, server = log_ratio_of(rows, limit, spare)
    sums = {url: (sum(apart for each, apart, _ in rows if url in ("", each)),
                  sum(tokens for each, _, tokens in rows if url in ("", each))) for url in ("", "a", "b")}  # fmt: skip
    means = {url: apart / max(1, tokens) for url, (apart, tokens) in sums.items()}
    assert found == pytest.approx(means[server]) or (found, server) == (0, "")
    surely = {url for url, (apart, tokens) in sums.items() if apart > limit * (tokens + (SPARE if url else spare))}
    assert (found > limit) == bool(surely if spare else surely | {url for url in [""] if means[url] > limit})
    assert all(found >= means[url] for url in surely)


def guards_of(limit, dtype=torch.float32):
    args = SimpleNamespace(guards=settle({"degenerate": None, "log_ratio": limit}), learning_rate=1.0, **PLAIN)
    return Guards(args, {"b": "absolute"}, False, dtype)


def lagged(number, ahead, writers=("http://a", "http://b")):
    """A step whose samples were written a step before, and what was compared of the next one's."""
    step = Step(number, ("b",), samples=[SimpleNamespace(lag=1)], ahead_apart=ahead)
    step.metrics["rollout/b/entropy"] = NAN
    step.summaries = [make_summary(position=place, server=url) for place, url in enumerate(writers)]
    return step


def test_token_or_two_of_a_step_ahead_stop_no_run_and_those_of_many_steps_do():
    guards = guards_of(0, torch.bfloat16)  # the bound is 0.25 nats per token
    for number in range(20):
        odd = number in (0, 1)  # a token each
        guards.on_step_ready(lagged(number, [("http://a", 1.0, 100), ("http://b", *((2.0, 1) if odd else (0.2, 10)))]))
    guards = guards_of(0, torch.bfloat16)
    enough = int(
        0.25 * SPARE / (5.0 - 0.25 * 10)
    )  # comparisons of 10 tokens with 5 nats: the bound, and what is spare
    for number in range(enough):
        guards.on_step_ready(lagged(number, [("http://a", 1.0, 100), ("http://b", 5.0, 10)]))
    with pytest.raises(GuardError, match=r"the rollout server at http://b, for the same tokens, are 0\.5 nats"):
        guards.on_step_ready(lagged(enough, [("http://a", 1.0, 100), ("http://b", 5.0, 10)]))


def test_server_that_turns_stale_after_many_good_steps_is_found():
    guards = guards_of(0)
    for number in range(100):
        guards.on_step_ready(lagged(number, [("http://a", 0.0, 100)]))
    with pytest.raises(GuardError, match="http://a"):
        guards.on_step_ready(lagged(100, [("http://a", 0.03 * 100, 100)]))
        guards.on_step_ready(lagged(101, [("http://a", 0.03 * 100, 100)]))


def test_server_that_is_never_looked_at_beside_others_is_named(caplog):
    guards = guards_of(0)
    for number in range(2 * UNSEEN - 1):
        guards.on_step_ready(lagged(number, [("http://a", 0.0, 9)]))
    assert "was not seen" not in caplog.text
    for number in range(2 * UNSEEN - 1, 6 * UNSEEN):
        guards.on_step_ready(lagged(number, [("http://a", 0.0, 9)]))
    assert caplog.text.count("was not seen") == 1 and "whether http://b has the student's weights" in caplog.text
    guards.on_step_ready(lagged(99, [("http://b", 0.0, 9)]))
    for number in range(100, 100 + 2 * UNSEEN):
        guards.on_step_ready(lagged(number, []))
    # One was last seen a step before the other, and each is named once.
    assert caplog.text.count("was not seen") == 3 and caplog.text.count("whether http://a has") == 1


@pytest.mark.parametrize("student_logps", ["trainer", "engine"])
def test_rollout_server_with_other_weights_is_named_where_the_mean_over_all_hides_it(
    student_logps, tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr("camopd.callbacks.guards.SPARE", 2)
    servers = [FakeRollouts(make_model(9), tokenizer) for _ in range(2)]
    servers[1].reload = lambda folder: (200, json.dumps({"results": [None]}))

    def run(folder, limit):
        trainer = make_trainer(
            tmp_path / folder, tokenizer, max_steps=1, prompts_per_step=24, guards={"log_ratio": limit},
            rollout_servers=[server.url for server in servers], student_logps=student_logps,
        )  # fmt: skip
        try:
            trainer.train()
        finally:
            trainer.run.sampler.close()
        step = trainer.step
        if student_logps == "trainer":
            return [(row.server, row.log_ratio, row.num_ratios) for row in step.summaries]
        assert all(not row.log_ratio for row in step.summaries)  # the loss's forward alone knows it
        return [(row.server, *step.apart[row.position]) for row in step.summaries if row.position in step.apart]

    try:
        rows = run("off", None)
        assert {server for server, _, _ in rows} == {server.url for server in servers}
        mean = sum(apart for _, apart, _ in rows) / sum(tokens for _, _, tokens in rows)
        worst, url = log_ratio_of(rows, mean)
        assert url == servers[1].url and worst > 1.2 * mean
        with pytest.raises(GuardError, match=f"the rollout server at {re.escape(url)}, for the same tokens, are "):
            run("bound", (mean + worst) / 2)
    finally:
        for server in servers:
            server.close()


def test_bound_of_the_log_ratio_follows_from_the_type():
    types = (torch.float32, torch.float16, torch.bfloat16)
    assert [log_ratio_bound(0, dtype) for dtype in types] == [0.01, 0.05, 0.25]
    assert log_ratio_bound(0.5, torch.float32) == 0.5 and log_ratio_bound(None, torch.float32) is None
    torch.set_float32_matmul_precision("high")
    try:
        assert log_ratio_bound(0, torch.float32) == 0.05
    finally:
        torch.set_float32_matmul_precision("highest")


# ------------------------------------------------------------------------------------------------------ completions


class Says(FakeSampler):
    """A rollout engine that gives the same completions in every step."""

    def __init__(self, *completions):
        self.completions = completions

    def generate(self, prompts, images, num_generations, profiler):
        found = [list(self.completions[place % len(self.completions)]) for place in range(len(prompts))]
        return prompts, found, [[[-1.0] for _ in row] for row in found], None


EMPTY, END, REPEATED, ANSWER = [], [2], [7] * 8, [7] * 7 + [8]


@pytest.mark.parametrize(
    ("completions", "stops"),
    [
        ([EMPTY], True),
        ([END], True),
        ([REPEATED], True),
        ([[7] * 8 + [2]], True),
        ([EMPTY, END, REPEATED], True),
        ([EMPTY, END, REPEATED, ANSWER], False),
        ([[7] * 7 + [2]], False),
        ([[7, 2]], False),
    ],
    ids=str,
)
def test_completions_that_say_nothing_stop_the_run(completions, stops, tmp_path, tokenizer):
    settings = {"max_completion_length": 12, "max_steps": 1, "prompts_per_step": 4, "importance_sampling_mode": "none"}
    trainer = make_trainer(tmp_path / "run", tokenizer, **settings)
    use_sampler(trainer, Says(*completions))
    if not stops:
        trainer.train()
        return
    with pytest.raises(GuardError, match=r"step 1 \(general\): 4 of 4 completions .*positions 0, 1, 2, 3.*degenerate"):
        trainer.train()
    assert (tmp_path / "run" / "rejected" / "step-1-rank-0.json").is_file()
    trainer = make_trainer(tmp_path / "off", tokenizer, guards={"degenerate": None}, **settings)
    use_sampler(trainer, Says(*completions))
    trainer.train()


def test_completions_of_one_branch_of_a_mixed_step_stop_the_run_by_themselves(tmp_path, tokenizer, warnings):
    class Mute(StepCallback):
        """Cuts the completions of a branch, or leaves nothing of them."""

        def __init__(self, branch, **values):
            self.branch, self.values = branch, values

        def on_step_ready(self, step):
            step.summaries = [
                dataclasses.replace(row, **(self.values if row.branch == self.branch else {"truncated": False}))
                for row in step.summaries
            ]

    def run(folder, branch, rows, **values):
        make_trainer(
            tmp_path / folder, tokenizer, schedule="general:1+domain:1", prompts_per_step=rows, max_steps=1,
            callbacks=[Mute(branch, **values)],
        ).train()  # fmt: skip

    with pytest.raises(
        GuardError, match=r"step 1 \(general\+domain\): 8 of 8 completions of branch 'domain' are empty"
    ):
        run("empty", "domain", 16, length=0)
    run("few", "domain", 8, length=0)
    assert not warnings()
    run("cut", "general", 16, truncated=True)
    (text,) = warnings()
    assert "8 of 8 completions of branch 'general' are cut at max_completion_length" in text


def test_share_of_completions_that_say_nothing_can_be_set(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, guards={"degenerate": 0.5}, max_completion_length=12)
    use_sampler(trainer, Says(END, ANSWER))
    with pytest.raises(GuardError, match="2 of 4 completions"):
        trainer.train()


@given(st.integers(0, 20), st.booleans(), st.booleans())
def test_says_nothing_is_empty_or_one_token(length, truncated, repeats):
    row = make_summary(length=length, truncated=truncated, repeats=repeats)
    assert says_nothing(row) == (repeats or length == 0 or (length == 1 and not truncated))


# --------------------------------------------------------------------------------------------------------- warnings


def test_truncation_of_all_completions_is_warned_of_once(tmp_path, tokenizer, warnings):
    trainer = make_trainer(tmp_path / "run", tokenizer, max_completion_length=3)
    use_sampler(trainer, Says([5, 6, 7]))
    trainer.train()
    (text,) = [text for text in warnings() if "truncated" in text]
    assert text.startswith("step 1 (general): 4 of 4 completions are cut at max_completion_length")
    trainer = make_trainer(tmp_path / "some", tokenizer, max_completion_length=3)
    use_sampler(trainer, Says([5, 6, 7], [5, 6, 2]))
    trainer.train()
    assert len([text for text in warnings() if "truncated" in text]) == 1


def test_gaps_of_exactly_0_are_warned_of_from_a_branchs_second_step_on(tmp_path, tokenizer, warnings):
    class ByHand(BrokenTeacher):
        def score(self, token_ids, prompt_lens, top_k=0):
            return self.student.score(token_ids, prompt_lens, top_k)

    def run(folder, teacher, **settings):
        teachers = {"general": teacher, "domain": make_model(2)}
        make_trainer(folder, tokenizer, teachers=teachers, schedule="general:1,domain:1", **settings).train()
        return [text for text in warnings() if "zero_gap" in text]

    # The general teacher is the student's start: 0 in its first step alone.
    assert run(tmp_path / "start", make_model(1), max_steps=6) == []
    (text,) = run(tmp_path / "same", make_model(1), learning_rate=0.0, max_steps=6)
    assert text.startswith("step 3 (general): all gaps of branch 'general' are exactly 0")
    found = run(tmp_path / "off", make_model(1), learning_rate=0.0, max_steps=6, guards={"zero_gap": None})
    assert len(found) == 1


class Rounds(BrokenTeacher):
    """In some steps, counted from 0, the student in batches of its own, off by a share of the bound; in others -1 nats."""

    name = "rounds"

    def __init__(self, share, steps=(1,)):
        super().__init__(-1.0)
        self.share, self.steps = share, steps

    def score(self, token_ids, prompt_lens, top_k=0):
        if self.trainer.state.global_step not in self.steps:
            return super().score(token_ids, prompt_lens, top_k)
        with torch.no_grad():
            rows = [
                self.trainer.student.logps([ids], [at])[0][0] for ids, at in zip(token_ids, prompt_lens, strict=True)
            ]
        bound = rounding_bound(GUARDS["rounding"].default, torch.float32, max(float(row.abs().max()) for row in rows))
        return [TokenScores(row + self.share * bound) for row in rows]


def run_with(teacher, folder, tokenizer, **settings):
    """A run in which a branch of its own has this teacher from the second step on, and what has moved."""
    moves = Moves()
    settings = {"schedule": "general:1,domain:9", "max_steps": 3, "guards": {"truncated": None}, **settings}
    trainer = make_trainer(
        folder, tokenizer, callbacks=[moves], teachers={"general": make_model(2), "domain": teacher}, **settings
    )
    teacher.trainer = trainer
    trainer.train()
    return moves.found, lines(folder)


@pytest.mark.parametrize("settings", [{}, {"optimizer_moments": "per_branch"}, {"student_logps": "engine"}], ids=str)
def test_step_whose_gaps_are_all_rounding_is_skipped_and_says_so(settings, tmp_path, tokenizer, warnings):
    moved, found = run_with(Rounds(0), tmp_path, tokenizer, **settings)
    assert moved == [True, False, True]  # Adam has moments of the step before
    assert [line["guard/skipped"] for line in found] == [line["guard/rounding"] for line in found] == [0, 1, 0]
    assert found[1]["update/changed_share"] == 0
    (text,) = warnings()
    assert re.match(r"step 2 \(domain\): all gaps are (rounding, at most \S+ nats|exactly 0): .* is skipped", text)


@pytest.mark.parametrize("seed", [1, 2])
def test_run_that_has_trained_nothing_says_so_at_its_end(seed, tmp_path, tokenizer, warnings):
    """The student is of seed 1: with it as the only teacher all steps are skipped."""
    settings = {"schedule": "general", "max_steps": 3, "guards": {"truncated": None, "zero_gap": None}}
    make_trainer(
        tmp_path, tokenizer, teachers={"general": make_model(seed)},
        train_dataset={"general": make_prompts("general")}, **settings,
    ).train()  # fmt: skip
    said = [text for text in warnings() if "nothing was trained" in text]
    assert len(said) == (seed == 1) and all("all 3 steps" in text for text in said)
    assert all(line["guard/skipped"] == (seed == 1) for line in lines(tmp_path))


def test_gap_of_some_roundings_more_and_one_token_with_a_gap_are_stepped_on(tmp_path, tokenizer, warnings):
    assert run_with(Rounds(2.0), tmp_path / "gap", tokenizer)[0] == [True] * 3

    class OneToken(Rounds):
        def score(self, *args):
            answers = super().score(*args)
            answers[-1].logps[0] -= 1e-3
            return answers

    assert run_with(OneToken(0), tmp_path / "token", tokenizer)[0] == [True] * 3
    assert (
        run_with(Rounds(0), tmp_path / "off", tokenizer, guards={"rounding": None, "truncated": None})[0] == [True] * 3
    )
    assert warnings() == []


def test_step_of_two_branches_is_skipped_where_both_are_rounding(tmp_path, tokenizer, warnings):
    moved, found = run_with(Rounds(0), tmp_path, tokenizer, schedule="general:1+domain:1", max_steps=2)
    assert moved == [True, True] and [line["guard/rounding"] for line in found] == [0, 0]
    assert warnings() == []


def test_gaps_of_exactly_0_are_skipped_and_no_skip_counts_as_one_that_is_not_finite(tmp_path, tokenizer, warnings):
    moves = Moves()
    teachers = {"general": make_model(1), "domain": make_model(1)}
    settings = {"max_steps": 5, "weight_decay": 0.1, "guards": {"skipped_steps": 0, "truncated": None}}
    make_trainer(tmp_path, tokenizer, teachers=teachers, callbacks=[moves], **settings).train()
    assert moves.found == [False] * 5  # not even by weight decay
    assert {line["guard/skipped"] for line in lines(tmp_path)} == {1}
    assert sum("all gaps are exactly 0: " in text for text in warnings()) == 5
    assert sum("zero_gap" in text for text in warnings()) == 1  # the second step of a branch, as if they were taken


def test_small_gap_of_a_teacher_in_the_students_batches_is_never_rounding(tmp_path, tokenizer):
    """There equal weights give exactly 0, so whatever else comes out is of other weights."""
    teacher = make_model(1)
    with torch.no_grad():  # by an ulp or so
        teacher.lm_head.weight.mul_(1 + 2**-23)
    moves = Moves()
    teachers = {"general": teacher, "domain": make_model(1)}
    make_trainer(tmp_path, tokenizer, teachers=teachers, callbacks=[moves], max_steps=1).train()
    (line,) = lines(tmp_path)
    assert 0 < line["gap/general/abs_mean"] < 1e-6 and moves.found == [True]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(0, 2**31), st.integers(1, 40),
    st.floats(0.5, 8), st.floats(-9, 1),
)  # fmt: skip
def test_rounded_logits_of_one_model_are_rounding_and_a_gap_beyond_that_is_not(dtype, seed, tokens, spread, exponent):
    """Log-probs in float64, of logits as they are and rounded to the dtype, and of those of another model."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, tokens, 50, generator=generator, dtype=torch.float64)
    logits = spread * draw()
    other = logits + 10**exponent * draw()
    exact, rounded, exact_other, rounded_other = (
        each.log_softmax(dim=-1)[:, 0] for each in (logits, logits.to(dtype).double(), other, other.to(dtype).double())
    )
    # At most one rounding of the logit and one of the log-sum-exp, which moves by no more than the largest of its terms.
    unit, largest = torch.finfo(dtype).eps / 2, max(logits.abs().max().item(), other.abs().max().item())
    noise = 2 * unit * largest
    assert (rounded - exact).abs().max() <= noise <= rounding_bound(2, dtype, largest)
    limit = rounding_bound(GUARDS["rounding"].default, dtype, max(exact.abs().max(), rounded_other.abs().max()).item())
    row = {"num_tokens": tokens, "logp_largest": max(rounded.abs().max(), rounded_other.abs().max()).item()}
    guards = Guards(
        SimpleNamespace(guards=settle({"degenerate": None}), learning_rate=1.0, **PLAIN),
        {"b": "absolute"},
        False,
        dtype,
    )
    step = Step(0, ("b",))
    step.metrics["rollout/b/entropy"] = NAN
    step.summaries = [make_summary(gap_largest=(rounded_other - rounded).abs().max().item(), **row)]
    guards.on_step_ready(step)
    if (exact_other - exact).abs().max() > limit + 2 * noise:
        assert step.metrics["guard/rounding"] == 0


def test_gaps_of_exactly_0_before_the_first_update_of_a_warm_up_are_not_warned_of(tmp_path, tokenizer, warnings):
    """The first learning rate of a warm-up is 0: the student is its start in the second step of a branch, too."""
    teachers = {"general": make_model(1), "domain": make_model(2)}
    settings = {
        "schedule": "general:1+domain:1",
        "warmup_steps": 2,
        "teachers": teachers,
        "guards": {"truncated": None},
    }
    make_trainer(tmp_path / "healthy", tokenizer, **settings).train()
    found = lines(tmp_path / "healthy")
    assert [line["learning_rate"] > 0 for line in found[:3]] == [False, True, True]
    assert [line["gap/general/abs_mean"] > 0 for line in found[:3]] == [False, False, True]
    assert not warnings()
    make_trainer(tmp_path / "same", tokenizer, **settings, learning_rate=1e-30).train()
    (text,) = warnings()
    assert text.startswith("step 3 (general+domain): all gaps of branch 'general' are exactly 0")


class Rewrite(StepCallback):
    """Writes over a metric of a step before the guards see it."""

    def __init__(self, name, values):
        self.name, self.values = name, values

    def on_step_ready(self, step):
        step.metrics[self.name] = self.values[step.number]


def test_entropy_that_collapses_is_warned_of_once(tmp_path, tokenizer, warnings):
    name = "rollout/general/entropy"
    callbacks = [Rewrite(name, [2.0, 0.21, 0.19, 0.1])]
    make_trainer(tmp_path / "collapse", tokenizer, callbacks=callbacks, schedule="general:9,domain:1").train()
    (text,) = [text for text in warnings() if "entropy" in text]
    assert text.startswith("step 3 (general): the entropy of branch 'general' is 0.19 nats per token, 9.5% of")
    make_trainer(tmp_path, tokenizer, callbacks=[Rewrite(name, [2.0, NAN, NAN, 0.0])], schedule="general:9,domain:1",
                 guards={"entropy": None}).train()  # fmt: skip
    assert len([text for text in warnings() if "entropy" in text]) == 1


BAND = {"importance_sampling_low": 0.3, "importance_sampling_high": 3.5}  # around the noise of `FakeSampler`


def test_tokens_outside_the_band_are_warned_of_once(tmp_path, tokenizer, warnings):
    for nats, mode, count in ((0.0, "mask", 0), (-2.0, "none", 0), (-2.0, "mask", 1), (-2.0, "truncate", 2)):
        settings = {"learning_rate": 1e-4, "importance_sampling_mode": mode, "prompts_per_step": 8, **BAND}
        trainer = make_trainer(tmp_path / f"{mode}{nats}", tokenizer, **settings)
        use_sampler(trainer, Louder(nats))
        trainer.train()
        found = [text for text in warnings() if "outside_band" in text]
        assert len(found) == count, (nats, mode)
    assert "% of the tokens have an importance ratio outside" in found[-1]


# ------------------------------------------------------------------------------------------------------ healthy runs


@pytest.mark.parametrize("engine", ["transformers", "sampler"])
def test_guards_are_silent_on_a_healthy_run_and_cost_less_than_a_hundredth_of_it(
    engine, tmp_path, tokenizer, warnings, monkeypatch
):
    spent = []  # CPU seconds: others on the machine take none of these

    def timed(method):
        def inside(*args, **kwargs):
            start = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                spent.append(time.process_time() - start)

        return inside

    parts = [(Guards, name) for name in ("on_step_ready", "on_pre_optimizer_step", "on_step_closed")]
    if engine != "sampler":  # which writes no completions: its step is none to measure what is done per sample by
        parts += [(scoring, "check_scored"), (Step, "check_trained")]
    for owner, name in parts:
        monkeypatch.setattr(owner, name, timed(getattr(owner, name)))
    settings = {"max_steps": 8, "prompts_per_step": 8, "max_completion_length": 48, "learning_rate": 1e-4}
    if engine == "sampler":
        settings.update(BAND, guards={"truncated": None})  # none of its completions ends
    trainer = make_trainer(tmp_path, tokenizer, **settings)
    if engine == "sampler":
        use_sampler(trainer, FakeSampler())
    start = time.process_time()
    trainer.train()
    share = sum(spent) / (time.process_time() - start)
    print(f"guards: {share:.4%} of a step of {(time.process_time() - start) / 8:.3f} s")
    assert share < 0.01
    assert warnings() == []
    assert not (tmp_path / "rejected").exists()
    assert {line["guard/skipped"] for line in lines(tmp_path)} == {0}


# ---------------------------------------------------------------------------------------------------------- settings


def test_thresholds_are_merged_over_the_defaults_and_come_from_the_command_line(tmp_path):
    defaults = {name: guard.default for name, guard in GUARDS.items()}
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    (args,) = TrlParser([CaMOPDConfig]).parse_args_and_config(words)
    assert args.guards == defaults
    (args,) = TrlParser([CaMOPDConfig]).parse_args_and_config([*words, "--guards", '{"log_prob": null, "entropy": 0}'])
    assert args.guards == {**defaults, "log_prob": None, "entropy": 0}
    assert CaMOPDConfig(**{**args.to_dict(), "hub_token": None}).guards == args.guards  # a copy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logprob": 1}, "no threshold 'logprob'. Did you mean 'log_prob'"),
        ({7: 1}, "no threshold 7"),
        ({"skipped_steps": 1.5}, r"guards\['skipped_steps'\] must be a whole number"),
        ({"skipped_steps": True}, "got True"),
        ({"skipped_steps": 10**400}, "got a number of 1329 bits"),
        ({"log_prob": 10**309}, "or null for none"),
        ({"degenerate": 0}, "above 0"),
        ({"outside_band": 1.1}, "a share, 0 to 1"),
        ({"entropy": math.nan}, "got nan"),
        ({"log_prob": "0.1"}, "or null for none, got '0.1'"),
        ({"zero_gap": -1}, "at least 1"),
        ([1], "must be a mapping"),
        ("{log_prob: 1}", "not valid JSON"),
    ],
)
def test_thresholds_that_there_are_not_are_refused(given, message, make_config):
    with pytest.raises(ValueError, match=message):
        make_config(guards=given)


# ----------------------------------------------------------------------------------------------------- two processes


def launch(config, folder, python):
    """This file as a script on two processes, under a launch file; what each of them has found."""
    command = [
        python, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml"),
        "--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no", __file__, str(folder), config,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_ranks_skip_and_stop_together(config, tmp_path, python):
    found = launch(config, tmp_path, python)
    for rank, each in enumerate(found):
        assert each["moved"] == [True, False, True]
        assert "step 1 (general): teacher 'general' (broken) gave" in each["log_prob"]
        assert "log-prob above 0" in each["log_prob"]
        assert (tmp_path / "skip" / "rejected" / f"step-2-rank-{rank}.safetensors").is_file()
        assert (tmp_path / "log_prob" / "rejected" / f"step-1-rank-{rank}.safetensors").is_file()
    assert config == "fsdp2" or found[0]["weights"] == found[1]["weights"]
    assert [line["guard/skipped"] for line in lines(tmp_path / "skip")] == [0, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_steps_that_deepspeed_skips_are_counted_and_one_that_it_has_made_stops_the_run(config, tmp_path, python):
    for rank, each in enumerate(launch(config, tmp_path, python)):
        assert each["loss moved"] == each["gradient moved"] == [True, False, True]
        assert re.search(r"step 3 \(general\): the norm of the gradient is inf.*after 1 skipped", each["often"])
        assert re.search(
            r"step 2 \(general\): the loss of positions 0 is nan, and DeepSpeed has stepped", each["made"]
        )
        for name in ("loss", "gradient", "often", "made"):
            assert (tmp_path / name / "rejected" / f"step-2-rank-{rank}.safetensors").is_file()
    for name in ("loss", "gradient"):
        assert [line["guard/skipped"] for line in lines(tmp_path / name)] == [0, 1, 0]
        assert "the loss of positions" in (tmp_path / "loss" / "rejected" / "step-2-rank-0.json").read_text()
    assert [path.name for path in (tmp_path / "made").glob("checkpoint-*")] == ["checkpoint-1"]


def _on_two_processes(folder: Path, config: str) -> None:
    found, rank = {}, int(os.environ["RANK"])
    settings = {"schedule": "general:9,domain:1", "max_steps": 3, "prompts_per_step": 8}
    if config == "fsdp2":
        fsdp_on_cpu()

    def stopped(name, **more):
        try:
            make_trainer(folder / name, make_tokenizer(), **settings, **more).train()
        except GuardError as error:
            found[name] = str(error)

    if config.startswith("zero"):
        backend = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None  # else a compiler takes minutes
        for name, faults in (
            ("loss", [BreakLosses({1})] if rank == 1 else []),
            ("gradient", [BreakGradients({1})]),
        ):
            moves = Weights()
            stopped(name, callbacks=[*faults, moves])
            found[f"{name} moved"] = moves.found
        stopped("often", callbacks=[BreakGradients({1, 2})], guards={"skipped_steps": 1})
        stopped("made", callbacks=[ClaimsLoss({1})], save_strategy="steps", save_steps=1)
    else:
        moves = Moves()
        callbacks = [moves, *([BreakLosses({1})] if rank == 1 else [])]
        trainer = make_trainer(folder / "skip", make_tokenizer(), callbacks=callbacks, **settings)
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
        found["weights"] = [local(param).double().sum().item() for param in model.parameters()]
        found["moved"] = moves.found
        stopped("log_prob", teachers={"general": BrokenTeacher(0.5 if rank == 1 else -1.0), "domain": make_model(1)})
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()


if __name__ == "__main__":
    _on_two_processes(Path(sys.argv[1]), sys.argv[2])


@pytest.mark.parametrize("limit", [0.3, None])
def test_servers_that_are_not_seen_are_not_warned_of_where_a_bound_is_set_or_none_is_wanted(caplog, limit):
    guards = guards_of(limit)
    for number in range(6 * UNSEEN):
        guards.on_step_ready(lagged(number, []))
    assert "was not seen" not in caplog.text


def test_bound_that_is_set_finds_a_stale_server_in_the_lagged_step_itself():
    step = lagged(3, [])
    step.summaries = [
        make_summary(position=place, server=f"http://{name}", num_ratios=50, log_ratio=50 * apart)
        for place, (name, apart) in enumerate([("a", 0.1), ("b", 0.9)])
    ]
    guards_of(0).on_step_ready(step)  # with an update between them, rounding bounds nothing
    guards_of(1.0).on_step_ready(step)
    with pytest.raises(GuardError, match=r"the rollout server at http://b, for the same tokens, are 0\.9 nats"):
        guards_of(0.3).on_step_ready(step)


def test_rounding_is_skipped_where_broken_steps_are_not(tmp_path, tokenizer):
    """Without the skip Adam and weight decay would move a student that equals its teachers."""
    model = make_model(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(
        tmp_path, tokenizer, model=model, teachers={"general": make_model(1), "domain": make_model(1)}, max_steps=2,
        weight_decay=0.1, guards={"truncated": None, "skipped_steps": None},
    )  # fmt: skip
    trainer.train()
    assert [line["guard/skipped"] for line in lines(tmp_path)] == [1, 1]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "settings", [{"token_rule": "teacher_free"}, {"token_rule": "relaxed_opd", "relaxed_mixture": 0.7}]
)
def test_rule_that_trains_tokens_without_a_gap_is_not_skipped(settings, tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, teachers={"general": make_model(1), "domain": make_model(1)}, max_steps=1,
        guards={"truncated": None}, selection=False, **settings,
    )  # fmt: skip
    trainer.train()
    (line,) = lines(tmp_path)
    assert line["loss"] != 0 and line["guard/rounding"] == line["guard/skipped"] == 0
    assert line["update/changed_share"] > 0
