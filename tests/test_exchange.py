"""The plan of who trains what. That the gradient is the same with it and without is in test_trainer.py."""

import math

import numpy as np
import pytest

from camopd.exchange import plan


def log_normal_lengths(count=512, seed=0):
    return np.maximum(1, np.random.default_rng(seed).lognormal(6, 1, count).round()).astype(int).tolist()


def padded(batch, lengths):
    return len(batch) * max(lengths[index] for index in batch) if batch else 0


def padding(ranks, lengths):
    total = sum(padded(batch, lengths) for batches in ranks for batch in batches)
    return 1 - sum(lengths) / total


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_sample_has_one_place_and_every_rank_as_many_micro_batches(count, num_ranks, batch_size):
    lengths = log_normal_lengths(count)
    ranks = plan(lengths, num_ranks, batch_size, max_tokens=10**9)
    assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(count))
    assert len(ranks) == num_ranks
    assert {len(batches) for batches in ranks} == {max(1, math.ceil(math.ceil(count / batch_size) / num_ranks))}


@pytest.mark.parametrize(("micro_batches", "allowed", "random"), [(64, 0.05, 0.6), (32, 0.07, 0.7), (8, 0.25, 0.8)])
@pytest.mark.parametrize("seed", range(5))
def test_log_normal_lengths_are_hardly_padded(micro_batches, allowed, random, seed):
    lengths = log_normal_lengths(seed=seed)
    ranks = plan(lengths, 1, 512 // micro_batches, max_tokens=10**9)
    assert len(ranks[0]) == micro_batches
    assert padding(ranks, lengths) <= allowed
    order = np.random.default_rng(seed).permutation(512).reshape(micro_batches, -1).tolist()
    assert padding([order], lengths) > random  # as they come


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_have_the_same_work_to_3_percent(num_ranks, seed):
    lengths = log_normal_lengths(seed=seed)
    ranks = plan(lengths, num_ranks, batch_size=512 // (num_ranks * 16), max_tokens=10**9)
    work = [sum(padded(batch, lengths) for batch in batches) for batches in ranks]
    tokens = [sum(lengths[index] for batch in batches for index in batch) for batches in ranks]
    assert max(work) <= 1.03 * sum(work) / num_ranks
    assert max(tokens) <= 1.03 * sum(tokens) / num_ranks


def test_no_micro_batch_holds_more_than_it_may():
    lengths = log_normal_lengths()
    budget = 2 * max(lengths)
    ranks = plan(lengths, 4, batch_size=256, max_tokens=budget)
    assert max(padded(batch, lengths) for batches in ranks for batch in batches) <= budget


def test_micro_batches_of_all_ranks_are_as_heavy_in_turn():
    lengths = log_normal_lengths()
    for batches in plan(lengths, 4, batch_size=8, max_tokens=10**9):
        work = [padded(batch, lengths) for batch in batches]
        assert work == sorted(work, reverse=True)


def test_equal_lengths_make_equal_batches():
    ranks = plan([100] * 24, 2, batch_size=4, max_tokens=400)
    assert [[len(batch) for batch in batches] for batches in ranks] == [[4, 4, 4], [4, 4, 4]]


def test_a_sample_that_fits_nowhere_is_an_error():
    with pytest.raises(ValueError, match="a sample of 9 tokens does not fit into a micro-batch of 8"):
        plan([3, 9], 1, 1, max_tokens=8)
