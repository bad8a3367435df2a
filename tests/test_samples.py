"""A sample on its way from the rollout to the loss."""

import torch

from camopd.samples import LossTerms, MicroBatch, Sample


TERMS = LossTerms(num_kept=5, num_tokens=None, scale={"general": 2.0, "domain": 1.0})


def make_sample(position, branch="general", completion=(7, 8, 9), mask=(1, 1, 1), **columns):
    return Sample(
        branch, position, [4, 5, *completion], 2, torch.tensor(mask).bool(), sum(mask), False,
        **{name: torch.tensor(values) for name, values in columns.items()},
    )  # fmt: skip


def test_sample_counts_the_tokens_that_were_sampled():
    assert make_sample(0, mask=(1, 0, 1)).num_tokens == 2


def test_sample_is_seen_by_the_teacher_with_its_own_prompt_or_the_students():
    sample = make_sample(0)
    assert sample.for_teacher == ([4, 5, 7, 8, 9], 2)
    sample.teacher_prompt = [10, 11, 12]
    assert sample.for_teacher == ([10, 11, 12, 7, 8, 9], 3)
    sample.teacher_prompt = [10]
    assert sample.for_teacher == ([10, 7, 8, 9], 1)


def test_sample_keeps_a_prefix_of_all_that_has_a_value_per_token():
    sample = make_sample(0, rollout_logps=[-1.0, -2.0, -3.0])
    for prefix, expected in ((None, 3), (9, 3), (2, 2), (0, 0)):
        sample.keep_prefix(prefix)
        assert sample.token_ids == [4, 5, *(7, 8, 9)[:expected]]
        assert sample.rollout_logps.tolist() == [-1.0, -2.0, -3.0][:expected]
        assert sample.num_tokens == expected
    assert sample.length == 3  # what was generated


def test_micro_batch_pads_the_columns_that_are_asked_for_on_the_right():
    samples = [
        make_sample(6, gaps=[0.5, 1.0, 1.5], rollout_logps=[-1.0, -2.0, -3.0]),
        make_sample(1, "domain", (7,), (1,), gaps=[2.5], rollout_logps=[-4.0]),
    ]
    batch = MicroBatch.of(samples, ["gaps"], TERMS)
    assert batch.positions == [6, 1]
    assert batch.token_ids == [[4, 5, 7, 8, 9], [4, 5, 7]]
    assert batch.prompt_lens == [2, 2]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.gaps.tolist() == [[0.5, 1.0, 1.5], [2.5, 0.0, 0.0]]
    assert (batch.teacher_logps, batch.rollout_logps, batch.token_weights) == (None, None, None)
    assert batch.scale.tolist() == [2.0, 1.0]
    assert (batch.num_kept, batch.num_tokens) == (5, None)


def test_micro_batch_is_moved_as_a_whole_and_as_a_copy():
    batch = MicroBatch.of([make_sample(0, gaps=[0.5, 1.0, 1.5])], ["gaps"], TERMS)
    moved = batch.to(torch.device("meta"))
    assert {moved.mask.device.type, moved.gaps.device.type, moved.scale.device.type} == {"meta"}
    assert moved.rollout_logps is None
    assert batch.gaps.device.type == "cpu"
    assert (moved.token_ids, moved.positions) == (batch.token_ids, batch.positions)


def test_dummy_has_a_row_with_nothing_in_the_loss():
    dummy = MicroBatch.dummy(3, TERMS)
    assert (dummy.positions, dummy.token_ids, dummy.prompt_lens) == ([], [[3, 3]], [1])
    assert dummy.mask.tolist() == [[False]] and dummy.scale.tolist() == [0.0]
    assert MicroBatch.dummy(3, LossTerms(0, None, {})).num_kept == 1  # by which the loss divides
