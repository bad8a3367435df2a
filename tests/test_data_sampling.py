"""Texts and samples: what makes two texts one, what a long prompt loses, and which rows are kept."""

from hypothesis import given
from hypothesis import strategies as st

from camopd.data import sampling
from camopd.data.sampling import normalise, shorten


def test_normalised_texts_differ_in_what_makes_another_question_only():
    assert normalise(" What\tIS\n\nx\u00b2? ") == "what is x2?"
    assert normalise("a b") != normalise("ab")
    assert normalise("1.5") != normalise("15")


def messages(*sizes):
    return [{"role": ("user", "assistant")[place % 2], "content": "x" * size} for place, size in enumerate(sizes)]


def test_shorten_takes_the_longest_run_of_last_turns_that_begins_with_the_user():
    system = {"role": "system", "content": "s" * 10}
    turns = messages(50, 50, 50, 50, 50)
    assert shorten([system, *turns], 260) == [system, *turns]
    assert shorten([system, *turns], 259) == [system, *turns[2:]]
    assert shorten([system, *turns], 159) == [system, *turns[4:]]
    assert shorten([system, *turns], 59) is None
    assert shorten(turns, 249) == turns[2:]
    calls = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [{"id": "y" * 50}]}]
    assert shorten([*calls, {"role": "tool", "content": "z"}], 40) is None  # the result would have lost its call


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 8), st.sets(st.integers(0, 30), max_size=5))
def test_smallest_numbers_are_kept_whatever_their_order(numbers, size, taken):
    """Against sorting what is not taken, each number once; a number that is there or taken is told."""
    rows = sampling.Smallest(size, taken)
    for place, number in enumerate(numbers):
        assert rows.add(number, {"place": place}) or number in taken or number in numbers[:place]
    assert sorted(rows.found) == sorted(set(numbers) - taken)[:size]
    assert all(row["place"] == numbers.index(number) for number, row in rows.found.items())
