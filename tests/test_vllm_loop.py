"""The thread of requests (camopd/vllm/loop.py)."""

import asyncio
import threading

import pytest

from camopd.vllm.loop import LoopThread


def test_work_is_done_in_a_thread_of_its_own_until_it_is_closed():
    loop, ended = LoopThread("mine"), []

    async def work():
        return threading.current_thread().name

    async def long():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("long")

    async def last():
        ended.append("last")

    assert loop.wait(work()) == "mine" != threading.current_thread().name
    under_way = loop.submit(long())
    loop.wait(work())  # it has begun
    loop.close(last)
    assert ended == ["long", "last"] and under_way.cancelled()
    loop.close(last)  # a second time does nothing
    assert ended == ["long", "last"] and "mine" not in {thread.name for thread in threading.enumerate()}


def test_error_of_a_piece_of_work_is_its_callers():
    loop = LoopThread("mine")

    async def fail():
        raise ZeroDivisionError

    async def last():
        pass

    with pytest.raises(ZeroDivisionError):
        loop.wait(fail())
    loop.close(last)
