"""Many things at a time (camopd/eval/together.py)."""

import threading
import time

import pytest

from camopd.eval.together import together


def test_results_are_in_order_and_so_many_are_made_at_a_time():
    both = threading.Barrier(2, timeout=30)

    def one(number):
        if number < 2:
            both.wait()
        return number * 10

    assert together(one, range(5), 2) == [0, 10, 20, 30, 40]
    assert together(one, [], 2) == []


def test_end_comes_at_once_and_nothing_else_is_begun():
    """Of what has begun, what waits for a server would go on for minutes."""
    begun, ended = [], threading.Event()

    def one(number):
        begun.append(number)
        ended.wait(60)

    def look():
        if len(begun) == 3:  # in this thread or in another one
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        together(one, range(99), 3, look, ended.set)
    assert begun == [0, 1, 2] and time.monotonic() - started < 30


def test_error_of_one_waits_for_those_that_are_begun_and_is_raised_once():
    begun, ended = [], []
    go_on = threading.Event()

    def one(number):
        begun.append(number)
        if number == 1:
            raise ValueError("no")
        go_on.wait(60)
        ended.append(number)

    looks = []

    def look():
        if threading.current_thread() is threading.main_thread():
            looks.append(1)
            if len(looks) == 3:  # it is looked for a signal meanwhile
                go_on.set()

    with pytest.raises(ValueError, match="no"):
        together(one, range(99), 2, look)
    assert sorted(ended) == [number for number in begun if number != 1] and len(begun) < 9


def test_interrupt_while_an_error_waits_is_an_end():
    stop = threading.Event()
    looks = []

    def one(number):
        if number == 1:
            raise ValueError("no")
        stop.wait(60)

    def look():
        if threading.current_thread() is threading.main_thread():
            looks.append(1)
            if len(looks) > 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together(one, range(9), 2, look, stop.set)
    assert stop.is_set()
