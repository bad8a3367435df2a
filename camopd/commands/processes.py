"""Child processes: start them, and end them together with everything that they have started."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any


PAUSE = 0.1  # seconds between two looks at processes


@contextlib.contextmanager
def noted_signals(repeats: float = 0.0) -> Iterator[list[int]]:
    """Ctrl-C, a scheduler's SIGTERM and SIGUSR1 and a closed terminal's SIGHUP only add their number to what is yielded.

    For so many seconds of `repeats` after the first one another is the same one.

    `start` inside: a child must not inherit that SIGINT is ignored, as it is in a script's background.
    """
    # No threading.Event: its lock is not for signal handlers, which would wait forever for the thread they interrupt.
    signals: list[int] = []
    first = math.inf

    def note(number: int, frame: Any) -> None:
        nonlocal first
        first = min(first, time.monotonic())
        hung_up = number == signal.SIGHUP and number in signals  # which a shell sends twice, and nobody insists by it
        if not signals or (time.monotonic() - first > repeats and not hung_up):
            signals.append(number)

    handled = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        handled.append(signal.SIGHUP)  # the children, in sessions of their own, would outlive the terminal
    before = {number: signal.signal(number, note) for number in handled}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(words: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a process that reads nothing and writes its errors where its output goes; `options` are those of `Popen`.

    It has a session of its own: Ctrl-C reaches it through `end` alone, and `end` reaches what it has started, too.
    """
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True, **options
    )


def end(
    children: Sequence[subprocess.Popen[Any]],
    signals: Sequence[int],
    first: signal.Signals = signal.SIGTERM,
    grace: float = math.inf,
) -> None:
    """Send `first` to the children that run and to all processes they have started, and wait for them.

    SIGKILL ends what is left when the children are gone, after `grace` seconds, or when `signals` gets another one.
    """
    asked = len(signals)
    for child in children:
        if child.poll() is None:
            _send(child, first)
    deadline = time.monotonic() + grace
    while any(child.poll() is None for child in children):
        if time.monotonic() > deadline or len(signals) > asked:
            break
        time.sleep(PAUSE)
    for child in children:  # of those too that are gone: what they have started may not be
        _send(child, signal.SIGKILL)
        child.wait()


def _send(child: subprocess.Popen[Any], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of its group have ended
        os.killpg(child.pid, number)


def how_it_ended(status: int) -> str:
    """`Popen.returncode` in words.

    >>> how_it_ended(7), how_it_ended(-9)
    ('exit code 7', 'signal SIGKILL')
    """
    return f"exit code {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
