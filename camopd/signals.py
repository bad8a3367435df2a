"""Asked to stop: SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP end a run at its next micro-step, with a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch


logger = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h: nothing is wrong, try again. What a scheduler is told to requeue.
REQUEUE = 75
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # SIGHUP: the terminal is gone


class RunInterrupted(SystemExit):
    """A signal has ended the run, and a checkpoint has been saved. Not caught, it ends the process with `REQUEUE`."""

    def __init__(self, text: str) -> None:
        """`text`: what is saved, and how to go on."""
        super().__init__(REQUEUE)
        self.text = text

    def __str__(self) -> str:
        return self.text


def interrupted(text: str) -> RunInterrupted:
    """Say a text, which the end of a process by its exit code would not, and give the error that ends it."""
    logger.warning(text)
    return RunInterrupted(text)


class StopAsked(Exception):
    """A rank has been asked to stop, by the signal of this name; `cut` says that rollouts under way have ended early."""

    def __init__(self, signal: str, cut: bool) -> None:
        super().__init__(signal)
        self.cut = cut


class StopRequests:
    """Whether a signal has asked one of the processes of a run to stop. A second one ends the process at once."""

    def __init__(self, gather: Callable[[list[Any]], list[Any]], announces: bool) -> None:
        """
        Args:
            gather: of a list over all ranks.
            announces: whether this process says that it has heard a signal.
        """
        self._gather, self._announces = gather, announces
        self.heard: str | None = None  # by this process
        self._cut = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals inside. Those that the program handles or ignores itself are left to it."""
        before = {}
        usual = (signal.SIG_DFL, signal.default_int_handler)
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
            before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) in usual}
        for number in before:
            signal.signal(number, self._hear)
        self.heard, self._cut = None, False
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.heard is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.heard = name
        if self._announces:  # by a plain write: a signal may come in the middle of another print
            again = "Ctrl-C" if name == "SIGINT" else name
            text = f"\ncamopd: {name}: the run will be saved and stop; a second {again} stops it at once, unsaved\n"
            os.write(2, text.encode())

    def check(self) -> None:
        """Raise `StopAsked` on all ranks where one of them has heard a signal. Called by all."""
        parts = self._gather([(self.heard, self._cut)])
        names = [name for name, _ in parts if name]
        if names:
            raise StopAsked(names[0], any(cut for _, cut in parts))

    def ends_generation(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """A stopping criterion of transformers, (B,): a run need not write for an hour before it can stop."""
        self._cut = self._cut or self.heard is not None
        return torch.full((len(input_ids),), self._cut, dtype=torch.bool, device=input_ids.device)
