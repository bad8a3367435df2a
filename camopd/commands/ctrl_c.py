"""Ctrl-C, and what schedulers send, where there is nothing to tidy up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..exit_codes import INTERRUPTED, REQUEUE, SIGNALS


WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # where accelerate looks
STOPPED = "camopd: stopped by Ctrl-C."


@contextmanager
def ends_at_once(requeue: bool = False) -> Iterator[None]:
    """Inside, Ctrl-C is a line and the end of the process. For imports, which take seconds.

    A KeyboardInterrupt in the middle of one does not always arrive: numpy, torch and others catch it as if a module were
    missing and go on half imported, and in the callback of a weak reference Python itself prints and forgets it.

    `requeue`: what a scheduler sends is a line and the end, too, with the exit code that has it start the run again. For a
    run before its training and after it, which `camopd.signals` hears in between. Not of one process of several: there it
    may come from the launcher, because another one has failed.
    """
    usual: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler}
    if requeue and all(os.environ.get(name, "1") in ("", "1") for name in WORLD_SIZES):
        usual |= {getattr(signal, name): signal.SIG_DFL for name in SIGNALS if hasattr(signal, name)} | usual
    # What is ignored, as in a script's background, or handled by whoever calls, is left to them.
    mine = {number: before for number, before in usual.items() if signal.getsignal(number) is before}
    if threading.current_thread() is not threading.main_thread():
        mine = {}
    end = _end_of(os.getpid())
    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, before in mine.items():
            signal.signal(number, before)


def _end_of(process: int) -> Callable[[int, Any], None]:
    """A handler that ends this process, and in one that is forked from it does what is usual."""

    def end(number: int, _: Any) -> None:
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        text, code = f"camopd: {name}: stopped outside of training; `camopd train ... --resume auto` goes on.", REQUEUE
        if number == signal.SIGINT:
            text, code = STOPPED, INTERRUPTED
        with suppress(OSError):  # of a terminal that is gone
            os.write(2, f"{text}\n".encode())  # not by print: the signal may come in the middle of another
        os._exit(code)

    end.gives_way = True  # type: ignore[attr-defined]  # to the signals that a run listens to
    return end
