"""Scoring without a trainer: what a teacher is asked, and what becomes of its answers."""

import pytest
import torch
from conftest import LOGP, make_forward, make_model

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


def test_a_teacher_may_see_another_prompt_than_the_student():
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


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_rank_with_fewer_samples_adds_dummies_which_no_sample_gets(ranks):
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
