"""Many things at a time, by threads, and an end that does not wait for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar


A = TypeVar("A")
B = TypeVar("B")
_PAUSE = 0.1  # seconds between two looks


def together(
    one: Callable[[A], B],
    items: Iterable[A],
    workers: int,
    look: Callable[[], None] = lambda: None,
    end: Callable[[], None] = lambda: None,
) -> list[B]:
    """What `one` makes of each item, in order; so many `workers` make it.

    `look` is called again and again by this thread, and by the others before each item. What it raises ends the call at
    once: no other item is begun, and `end` is to end those that are. What `one` raises ends the call when those that are
    begun are done.
    """

    def begin(item: A) -> B:
        look()
        return one(item)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(begin, item) for item in items]
        left, failed = set(futures), None
        try:
            while left:
                done, left = wait(left, _PAUSE)
                failed = failed or next((each for each in done if not each.cancelled() and each.exception()), None)
                for each in left if failed else ():
                    each.cancel()
                look()
        except BaseException:
            for each in futures:
                each.cancel()
            end()
            raise
    return [each.result() for each in ([failed] if failed else futures)]
