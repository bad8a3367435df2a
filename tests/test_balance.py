"""The plan of who trains what. That the gradient is the same with it and without is in test_trainer.py."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from camopd.balance import FULL, LONGEST_PACKED, balance_micro_batches, score_batches


def log_normal_lengths(count=512, seed=0):
    return np.maximum(1, np.random.default_rng(seed).lognormal(6, 1, count).round()).astype(int).tolist()


def padded(batch, lengths):
    return len(batch) * max(lengths[index] for index in batch) if batch else 0


def real(batch, lengths):
    return sum(lengths[index] for index in batch)


def padding(ranks, lengths):
    total = sum(padded(batch, lengths) for batches in ranks for batch in batches)
    return 1 - sum(lengths) / total


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_plan_gives_every_sample_one_place_and_every_rank_as_many_micro_batches(
    count, num_ranks, batch_size, padding_free
):
    lengths = log_normal_lengths(count)
    ranks = balance_micro_batches(
        lengths, num_ranks, batch_size, max_tokens=(batch_size or 1) * 10_000, padding_free=padding_free
    )
    assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(count))
    assert len(ranks) == num_ranks
    (per_rank,) = {len(batches) for batches in ranks}
    assert 1 <= per_rank <= max(1, math.ceil(math.ceil(count / (batch_size or 1)) / num_ranks))


@pytest.mark.parametrize(("micro_batches", "allowed", "random"), [(64, 0.05, 0.6), (32, 0.07, 0.7), (8, 0.25, 0.8)])
@pytest.mark.parametrize("seed", range(5))
def test_log_normal_lengths_are_hardly_padded(micro_batches, allowed, random, seed):
    lengths = log_normal_lengths(seed=seed)
    ranks = balance_micro_batches(lengths, 1, 512 // micro_batches, max_tokens=10**9)
    assert len(ranks[0]) == micro_batches
    assert padding(ranks, lengths) <= allowed
    order = np.random.default_rng(seed).permutation(512).reshape(micro_batches, -1).tolist()
    assert padding([order], lengths) > random  # as they come


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_have_the_same_work_to_3_percent(num_ranks, seed):
    lengths = log_normal_lengths(seed=seed)
    ranks = balance_micro_batches(lengths, num_ranks, batch_size=512 // (num_ranks * 16), max_tokens=10**9)
    work = [sum(padded(batch, lengths) for batch in batches) for batches in ranks]
    tokens = [sum(lengths[index] for batch in batches for index in batch) for batches in ranks]
    assert max(work) <= 1.03 * sum(work) / num_ranks
    assert max(tokens) <= 1.03 * sum(tokens) / num_ranks


@pytest.mark.parametrize("batch_size", [1, 2, 256, None])
@pytest.mark.parametrize("attention_cost", [0, 1e-3])
@pytest.mark.parametrize("spread", ["log-normal", "near the limit"])
def test_micro_batches_hold_no_more_than_they_may(batch_size, attention_cost, spread):
    lengths = log_normal_lengths() if spread == "log-normal" else [100 - index % 7 for index in range(61)] + [3, 2, 1]
    budget = max(2, batch_size or 2) * max(lengths)
    for tokens_of, padding_free in ((padded, False), (real, True)):
        ranks = balance_micro_batches(lengths, 4, batch_size, budget, padding_free, attention_cost)
        assert max(tokens_of(batch, lengths) for batches in ranks for batch in batches) <= budget
        assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(len(lengths)))


@pytest.mark.parametrize("padding_free", [False, True])
def test_token_budget_fills_its_micro_batches(padding_free):
    lengths = log_normal_lengths()
    budget = 4 * max(lengths)
    ranks = balance_micro_batches(lengths, 4, None, budget, padding_free)
    fewest = math.ceil(sum(lengths) / budget / 4)  # the best there can be
    assert len(ranks[0]) <= fewest + (0 if padding_free else 2)


@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_and_ranks_have_the_same_tokens_without_padding(seed):
    lengths = log_normal_lengths(seed=seed)
    ranks = balance_micro_batches(lengths, 8, batch_size=4, max_tokens=10**9, padding_free=True)
    per_rank = [sum(real(batch, lengths) for batch in batches) for batches in ranks]
    assert max(per_rank) <= 1.03 * sum(per_rank) / 8
    for turn in range(len(ranks[0])):  # sharded models wait for the slowest rank in every turn
        loads = [real(batches[turn], lengths) for batches in ranks]
        assert max(loads) <= max(1.05 * sum(loads) / 8, sum(loads) / 8 + min(lengths))


def test_ranks_are_balanced_by_squared_lengths_where_attention_dominates():
    lengths = log_normal_lengths()
    cost = 1e-3  # a sample of 1000 tokens costs as much in attention as in the rest of the model
    for padding_free, work_of in (
        (True, lambda batch: sum(lengths[i] + cost * lengths[i] ** 2 for i in batch)),
        (False, lambda batch: len(batch) * max(lengths[i] + cost * lengths[i] ** 2 for i in batch)),
    ):
        with_cost, without = (
            [
                sum(map(work_of, batches))
                for batches in balance_micro_batches(lengths, 4, 2, 10**9, padding_free, attention_cost)
            ]
            for attention_cost in (cost, 0.0)
        )
        assert max(with_cost) <= 1.03 * sum(with_cost) / 4
        assert max(with_cost) < max(without)
    long_and_short = balance_micro_batches(
        [1000, 500, 500, 500, 500, 500, 500], 2, 4, 10**9, True, 1.0
    )  # squares: 4 to 6 times 1
    samples = [[lengths_ for batch in batches for lengths_ in batch] for batches in long_and_short]
    assert sorted(len(mine) for mine in samples) == [2, 5]


def test_micro_batches_of_all_ranks_are_as_heavy_in_turn():
    lengths = log_normal_lengths()
    for batches in balance_micro_batches(lengths, 4, batch_size=8, max_tokens=10**9):
        work = [padded(batch, lengths) for batch in batches]
        assert work == sorted(work, reverse=True)


def test_batches_of_equal_lengths_are_equal():
    ranks = balance_micro_batches([100] * 24, 2, batch_size=4, max_tokens=400)
    assert [[len(batch) for batch in batches] for batches in ranks] == [[4, 4, 4], [4, 4, 4]]


def test_sample_that_fits_nowhere_is_an_error():
    with pytest.raises(ValueError, match="a sample of 9 tokens does not fit into a micro-batch of 8"):
        balance_micro_batches([3, 9], 1, 1, max_tokens=8)


@pytest.mark.parametrize("count", [1, 5, 16, 64, 300])
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_forwards_without_gradient_are_as_many_on_every_rank_for_as_many_rows(count, batch_size):
    for lengths in (log_normal_lengths(count), [7] * count, [2] * (count - 1) + [900]):
        batches = score_batches(lengths, batch_size, False, 32, several_ranks=True)
        assert len(batches) == len(score_batches([9] * count, batch_size, False, 32, several_ranks=True))
        without_padding = score_batches(lengths, batch_size, True, 32)
        assert len(without_padding) == math.ceil(count / batch_size)
        for found in (batches, without_padding):
            assert sorted(row for batch in found for row in batch) == list(range(count))
            assert all(found)
            longest = [max(lengths[row] for row in batch) for batch in found]
            assert longest == sorted(longest, reverse=True)
            assert max(padded(batch, lengths) for batch in found) <= batch_size * max(lengths)
    assert score_batches([], batch_size, False, 32) == []


@pytest.mark.parametrize("seed", range(5))
def test_forwards_without_gradient_are_hardly_padded(seed):
    for count in (16, 64, 512):
        lengths = log_normal_lengths(count, seed)
        for cost in (32, 256):
            assert padding([score_batches(lengths, 1000, False, cost)], lengths) <= 0.12


def test_forwards_without_gradient_take_no_more_memory_than_the_longest_row_or_a_full_one():
    for lengths in (log_normal_lengths(), [30] * 500, [3000] * 9):
        batches = score_batches(lengths, 10**6, False, 32)
        assert max(padded(batch, lengths) for batch in batches) <= max(*lengths, 32 * FULL)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=9), st.integers(1, 6), st.integers(0, 400),
    st.sampled_from((False, None)), st.sampled_from((0.0, 1e-3, 1e-2)),
)  # fmt: skip
def test_forwards_without_gradient_cost_least_of_all_ways_to_cut_the_sorted_rows(
    lengths, batch_size, cost, padding_free, square
):
    def price(batches):
        total = 0.0
        for batch in batches:
            tokens, longest = real(batch, lengths), padded(batch, lengths) // len(batch)
            work = len(batch) * (longest + square * longest**2)
            without = tokens + square * tokens**2 if tokens <= LONGEST_PACKED else math.inf
            total += cost + (min(work, without) if padding_free is None else work)
        return total

    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    limit = min(batch_size * max(lengths), max(*lengths, 0, cost * FULL))
    ways = []
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        places = [0, *(place for place, cut in enumerate(cuts, 1) if cut), len(order)]
        way = [order[start:end] for start, end in itertools.pairwise(places)]
        if all(padded(batch, lengths) <= limit for batch in way):
            ways.append(price(way))
    found = score_batches(lengths, batch_size, padding_free, cost, square_cost=square)
    assert price(found) == pytest.approx(min(ways), rel=1e-12)


# ------------------------------------------------------------------------------------------- what goes in must come out

LENGTHS = st.one_of(
    st.lists(st.integers(1, 5000), max_size=40),
    st.builds(lambda length, count: [length] * count, st.integers(1, 5000), st.integers(0, 60)),
    st.lists(st.sampled_from([1, 2, 117, 118, 40_000]), max_size=60),
)
COSTS = st.one_of(st.just(0.0), st.floats(1e-7, 1e-3), st.floats(0, 1e12, allow_nan=False, allow_infinity=False))


BATCH_SIZES = st.one_of(st.just("all"), st.none(), st.integers(1, 8))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 5), BATCH_SIZES, st.floats(1, 50), st.booleans(), COSTS)
@example([117] * 3, 1, "all", 1e6, False, 1 / 56_000)
@example([1247] * 4, 2, 1, 1.0, False, 1 / 56_000)
def test_plans_lose_no_sample_and_fit_into_the_micro_steps(lengths, num_ranks, batch_size, room, padding_free, cost):
    if batch_size == "all":  # one micro-batch for each rank
        batch_size = max(1, math.ceil(len(lengths) / num_ranks))
    # As the trainer has it: room for `batch_size` of the longest, or a budget of one sample or more.
    max_tokens = int(room * (batch_size or 1) * max(lengths, default=1))
    ranks = balance_micro_batches(lengths, num_ranks, batch_size, max_tokens, padding_free, cost)
    assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(len(lengths)))
    assert len(ranks) == num_ranks
    (per_rank,) = {len(batches) for batches in ranks}
    assert 1 <= per_rank <= max(1, math.ceil(len(lengths) / (num_ranks * (batch_size or 1))))
    tokens_of = real if padding_free else padded
    assert all(tokens_of(batch, lengths) <= max_tokens for batches in ranks for batch in batches)


@pytest.mark.parametrize("padding_free", [False, True])
def test_samples_of_one_length_that_fit_into_one_micro_batch_are_in_one(padding_free):
    for length in range(1, 1500, 7):
        for count in (1, 3, 8):
            for cost in (1 / 56_000, 1e-7, 0.1):
                assert len(balance_micro_batches([length] * count, 1, count, 10**9, padding_free, cost)[0]) == 1, (
                    length,
                    count,
                    cost,
                )


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 70), st.sampled_from((False, True, None)), st.booleans())
def test_forwards_without_gradient_lose_no_row_whatever_their_lengths(lengths, batch_size, padding_free, several):
    batches = score_batches(lengths, batch_size, padding_free, 32, several, 1e-3)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(batches)
    if padding_free or several:  # as on every other rank
        assert len(batches) == len(score_batches([9] * len(lengths), batch_size, padding_free, 32, several, 1e-3))
    assert all(padded(batch, lengths) <= batch_size * max(lengths) for batch in batches)
