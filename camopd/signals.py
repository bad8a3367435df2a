"""Asked to stop: SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP end a run at its next micro-step, with a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from .exit_codes import REPEATS, REQUEUE, SIGNALS


logger = logging.getLogger(__name__)


END = b"\0"  # no signal has this number
_in_child: list[Callable[[], None]] = []


def _forget_in_child() -> None:
    """What a worker of a data loader is sent, and it is sent SIGTERM at its end, is not for the run that has forked it."""
    while _in_child:
        _in_child.pop()()


os.register_at_fork(after_in_child=_forget_in_child)


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
    """Whether a signal has asked one of the processes of a run to stop. A later one ends the process at once.

    A thread speaks and ends: Python runs no handler while the main thread is inside a collective.
    """

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
        usual = (signal.SIG_DFL, signal.default_int_handler)
        found = {getattr(signal, name) for name in SIGNALS if hasattr(signal, name)}
        handlers = {number: signal.getsignal(number) for number in found}
        before = {
            number: handler
            for number, handler in handlers.items()
            if handler in usual or getattr(handler, "gives_way", False)  # of commands/ctrl_c.py
        }
        if threading.current_thread() is not threading.main_thread() or not before:  # no other may set handlers
            yield
            return
        heard, woken = socket.socketpair()
        woken.setblocking(False)
        thread = threading.Thread(target=self._listen, args=(heard, set(before)), name="camopd-signals", daemon=True)
        thread.start()
        fd_before = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        for number in before:
            signal.signal(number, self._hear)

        def undo() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(fd_before)

        def forget() -> None:
            undo()
            heard.close()
            woken.close()

        _in_child.append(forget)
        try:
            yield
        finally:
            undo()
            _in_child.remove(forget)
            woken.send(END)  # and not its closing, as a process that was started meanwhile may have it, too
            thread.join()
            heard.close()
            woken.close()
            self.heard, self._cut = None, False  # an evaluation afterwards is not asked to stop

    def _hear(self, number: int, _: Any = None) -> None:
        self.heard = self.heard or signal.Signals(number).name

    def _listen(self, heard: socket.socket, mine: set[int]) -> None:
        first = None
        while (byte := heard.recv(1)) not in (END, b""):
            if byte[0] in mine and first is None:
                first = time.monotonic()
                self._hear(byte[0])
                again = "Ctrl-C" if self.heard == "SIGINT" else self.heard
                self._say(f"{self.heard}: the run will be saved and stop; another {again} stops it at once, unsaved")
            elif byte[0] in mine and time.monotonic() - (first or 0.0) > REPEATS:
                self._say("stopped at once, unsaved")
                os._exit(128 + byte[0])

    def _say(self, text: str) -> None:
        if self._announces:
            with suppress(OSError):  # of a terminal that is gone
                os.write(2, f"\ncamopd: {text}\n".encode())

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
