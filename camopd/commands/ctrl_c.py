"""Ctrl-C where there is nothing to tidy up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


STOPPED = "camopd: stopped by Ctrl-C."
EXIT_CODE = 130  # of a process that SIGINT has ended, as shells have it


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Inside, Ctrl-C is a line and the end of the process. For imports, which take seconds.

    A KeyboardInterrupt in the middle of one does not always arrive: numpy, torch and others catch it as if a module were
    missing and go on half imported, and in the callback of a weak reference Python itself prints and forgets it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield  # ignored, as in a script's background, or handled by whoever calls
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    os.write(2, f"{STOPPED}\n".encode())  # not by print: the signal may come in the middle of another
    os._exit(EXIT_CODE)
