"""A thread in which requests are under way while the main one does something else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from . import limits


T = TypeVar("T")


class LoopThread:
    """An event loop in a thread of its own, until `close`."""

    def __init__(self, name: str):
        """`name` of the thread."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin a piece of work and return at once."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        """What a piece of work gives. Requests have time limits of their own."""
        return self.submit(work).result(seconds)

    def close(self, last: Callable[[], Awaitable[None]]) -> None:
        """Cancel what is under way, do `last`, and end the thread."""
        if self._loop.is_closed():
            return

        async def shut() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # their futures end with them
            await last()

        with suppress(TimeoutError):  # the thread is a daemon, and what it does not end ends with the process
            self.wait(shut(), limits.ANSWER_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(limits.ANSWER_SECONDS)

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()
