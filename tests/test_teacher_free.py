"""The teacher-free control against values worked by hand; its step in a run is in test_methods.py."""

import math

import torch

from camopd.samples import Sample
from camopd.token_rules.teacher_free import TeacherFree


def test_control_trains_the_unlikely_tokens_alone_and_all_alike():
    probabilities = torch.tensor([0.9, 0.19, 0.21, 0.01])
    sample = Sample("general", 0, [4] * 6, 2, torch.tensor([True, True, True, False]), 3, False)
    sample.student_logps = probabilities.log()
    rule = TeacherFree(None)
    rule.weigh([sample], 0, list)
    assert sample.token_weights.tolist() == [0, 1, 0, 1]
    assert rule.count(sample) == {"trained": 1}  # the last one is not the student's own
    gaps = torch.tensor([[3.0, -7.0, 0.0, math.nan]])
    assert rule.advantages(gaps, sample.mask[None]).tolist() == [[-0.5, -0.5, -0.5, 0.0]]
