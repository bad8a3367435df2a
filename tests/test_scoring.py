"""Scoring: what a teacher is asked, when, and what becomes of its answers."""

import copy
import math
import threading
import time
from concurrent.futures import Future

import pytest
import torch
from conftest import LOGP, VOCAB, make_forward, make_model
from steps import Case, FakeSampler, trainer_step
from trainers import BrokenTeacher, lines, make_trainer

from camopd.errors import CaMOPDError, TeacherError
from camopd.samples import Sample
from camopd.scoring import Scorer
from camopd.teachers.base import TokenScores
from camopd.teachers.local import LocalTeacher


def make_sample(position, prompt, completion, **more):
    mask = torch.ones(len(completion), dtype=torch.bool)
    return Sample("general", position, prompt + completion, len(prompt), mask, len(completion), False, **more)


def logps(model, prompt, completion):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1)[range(len(completion)), completion]


def test_teacher_may_see_another_prompt_than_the_student():
    student, teacher = make_model(1), make_model(2)
    samples = [
        make_sample(0, [5, 6], [7, 8, 9]),
        make_sample(1, [5, 6], [7, 8, 9], teacher_prompt=[10, 11, 12, 13]),
        make_sample(2, [5], [], teacher_prompt=[10]),
    ]
    scorer = Scorer(make_forward(student), {"general": LocalTeacher(teacher, "t", "cpu", 2)}, 2, list)
    scorer.score(samples, ["general"])
    for sample, prompt in zip(samples[:2], ([5, 6], [10, 11, 12, 13]), strict=True):
        torch.testing.assert_close(sample.teacher_logps, logps(teacher, prompt, [7, 8, 9]), rtol=0, atol=LOGP)
        torch.testing.assert_close(sample.student_logps, logps(student, [5, 6], [7, 8, 9]), rtol=0, atol=LOGP)
        torch.testing.assert_close(sample.gaps, sample.teacher_logps - sample.student_logps, rtol=0, atol=0)
    assert len(samples[2].gaps) == 0


def test_prompt_that_fills_up_a_batch_has_its_own_answers():
    """Of few held-out prompts accelerate deals a rank some twice, and each copy has its own completion."""

    class Remote:
        name = "remote"

        def submit(self, token_ids, prompt_lens, top_k=0):
            answers = Future()
            answers.set_result(LocalTeacher(make_model(2), "t", "cpu", 2).score(token_ids, prompt_lens, top_k))
            return answers

        def score(self, token_ids, prompt_lens, top_k=0):
            return self.submit(token_ids, prompt_lens, top_k).result()

    completions = [[7, 8, 9], [7], [9, 8, 7], [8, 8]]
    samples = [make_sample(place % 2, [5, 6], completion) for place, completion in enumerate(completions)]
    Scorer(make_forward(make_model(1)), {"general": Remote()}, 2, list).score(samples, ["general"])
    for sample, completion in zip(samples, completions, strict=True):
        torch.testing.assert_close(sample.teacher_logps, logps(make_model(2), [5, 6], completion), rtol=0, atol=LOGP)


@pytest.mark.parametrize("ranks", [1, 3])
def test_rank_with_fewer_samples_adds_dummies_which_no_sample_gets(ranks):
    asked = []

    class Counting:
        name = "counting"

        def score(self, token_ids, prompt_lens, top_k=0):
            asked.extend(token_ids)
            return [
                TokenScores(-1.0 - torch.arange(len(ids) - start))
                for ids, start in zip(token_ids, prompt_lens, strict=True)
            ]

    samples = [make_sample(0, [5, 6], [7, 8]), make_sample(1, [5], [7])]

    def gather(mine):  # another rank has four of the branch
        return [4, *mine] if mine == [2] else mine

    Scorer(make_forward(make_model(1)), {"general": Counting()}, 2, gather if ranks > 1 else list).score(
        samples, ["general"]
    )
    assert asked == [[5, 6, 7, 8], [5, 7], *([[2, 2]] * (2 if ranks > 1 else 0))]
    assert [len(sample.teacher_logps) for sample in samples] == [2, 1]


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
    assert metrics["guard/rounding"] == 0
    assert "gave no log-prob for" in caplog.text


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


def test_teacher_that_returns_too_few_logps_stops_the_run(tmp_path, tokenizer):
    teachers = {"general": BrokenTeacher(-1.0, missing=1), "domain": make_model(1)}
    with pytest.raises(CaMOPDError, match=r"scored (\d) of the (\d) completion tokens of sample 0"):
        make_trainer(tmp_path, tokenizer, teachers=teachers).train()


def test_teacher_that_finds_every_token_equally_likely_has_lost_its_weights(tmp_path, tokenizer):
    teachers = {"general": BrokenTeacher(-math.log(len(VOCAB))), "domain": make_model(1)}
    with pytest.raises(
        CaMOPDError, match=r"'general' \(broken\) gives every one of \d+ tokens the log-prob -3\.761, as -ln"
    ):
        make_trainer(tmp_path, tokenizer, teachers=teachers).train()


def test_server_scores_while_the_student_does(tmp_path, tokenizer, start_server):
    server = start_server()
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, teachers={"general": server.url, "domain": make_model(1)})
    score, forward = trainer.scorer.score, trainer.student.logps
    server.before = lambda: time.sleep(1.0)  # four requests at once
    slow = []

    def slow_forward(*args, **kwargs):
        if slow:
            slow.clear()
            time.sleep(0.8)  # the first of one or more
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


def test_teachers_of_a_mixed_step_are_both_asked_before_the_student_scores(tmp_path, tokenizer, start_server):
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


def test_time_of_a_teacher_that_is_asked_again_is_in_its_clock():
    class GoneAtFirst:
        name, asked = "gone at first", 0

        def score(self, token_ids, prompt_lens, top_k=0):
            return self.submit(token_ids, prompt_lens, top_k).result()

        def submit(self, token_ids, prompt_lens, top_k=0):
            self.asked += 1
            answers = Future()
            if self.asked == 1:
                answers.set_exception(TeacherError("no replica left"))
            else:
                scores = [TokenScores(-torch.ones(len(token_ids[0]) - prompt_lens[0]))]
                threading.Timer(0.4, answers.set_result, [scores]).start()
            return answers

    teacher, sample = GoneAtFirst(), make_sample(0, [5, 6], [7, 8])
    scorer = Scorer(make_forward(make_model(1)), {"general": teacher}, 2, list)
    scorer.ask(sample, None)
    clock = scorer.score([sample], ["general"])["general"]
    assert teacher.asked == 2 and sample.teacher_logps.tolist() == [-1, -1]
    assert clock.seconds >= 0.4 > 0.2 > clock.hidden_seconds


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_model_whose_logits_are_not_what_is_computed_is_refused_before_the_first_rollout(tmp_path, tokenizer, whose):
    bent = make_model(2)
    forward = bent.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output

    bent.forward = scaled
    changes = {"model": bent} if whose == "student" else {"teachers": {"general": bent, "domain": make_model(1)}}
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, **changes)
    trainer.engine.samples = lambda *args: pytest.fail("generated")
    with pytest.raises(ValueError, match=rf"{whose} .*\(LlamaForCausalLM\) that CaMOPD computes .* by \d.* nats"):
        trainer.train()
    assert not (tmp_path / "metrics.jsonl").exists()
