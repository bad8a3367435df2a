"""Who is waited for: told when a process has been in one phase for a minute, and again.

A collective waits for the slowest rank, and for one that is frozen `ddp_timeout` seconds without a word. So each rank notes
what it does (`phase`, which costs as much as setting an attribute), and a thread puts that into the store of the process
group every few seconds. A rank that has been in one phase for long reads what the others have put there, and logs it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple


logger = logging.getLogger(__name__)

# Seconds. Tests shorten them.
BEAT = 10.0  # between two signs of life
LOOK = 1.0  # between two looks at the own phase
REPORTS = (60.0, 300.0, 600.0)  # in one phase, at which it is told; then whenever that has doubled
SILENCE = 25.0  # without a sign of life, counted here: two are missing
END = 5.0  # that the end of a run waits for a thread which a frozen store may hold

SHOWN = 8  # ranks in a message
ENDED = "ended"
ROLLOUT_SERVERS = "rollout servers"  # in the phase of a rank that waits for them
PUSH = "push to the Hub"  # of the first process, for which the others do not wait


class Phase(NamedTuple):
    """What the main thread does, and since when (`time.monotonic`)."""

    what: str
    since: float  # where it had parts, since the last of them ended
    before: float = 0.0  # seconds that it had lasted until then

    @property
    def lasts(self) -> float:
        """Seconds since it began, its parts included."""
        return self.before + time.monotonic() - self.since

    @property
    def said(self) -> str:
        """What is done, and for how long."""
        part = f", {time.monotonic() - self.since:.0f} s since its last part ended" if self.before else ""
        return f"{self.what}, for {self.lasts:.0f} s so far{part}"


_now = Phase("start", time.monotonic())  # one for a process, as the main thread is


def current() -> Phase:
    """The phase of this process."""
    return _now


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Note what is done inside, and afterwards that what was done before goes on.

    A part of that, whose name begins with the other's and a colon, counts as time of both.
    """
    global _now
    outer = _now
    _now = Phase(what, time.monotonic())
    try:
        yield
    finally:
        _now = Phase(outer.what, time.monotonic(), outer.lasts if what.startswith(f"{outer.what}:") else 0.0)


class Beat(NamedTuple):
    """A rank's latest sign of life, as it is seen from here."""

    who: str  # rank, host and pid
    what: str
    seconds: float  # that it had been doing this when it gave the sign
    sent: float  # `time.time` over there
    number: int
    seen: float  # `time.monotonic` here, when this number was first read

    @property
    def unchanged(self) -> float:
        """Seconds since it was first read; what counts, as the clocks of two machines may differ."""
        return time.monotonic() - self.seen


class Board:
    """Where the ranks put their signs of life: a store of `torch.distributed`, of which no call may wait for a key."""

    def __init__(self, store: Any, rank: int, world_size: int):
        """`store`: a connection of its own, so that the main thread never waits behind this one."""
        self._store, self._rank = store, rank
        self._keys = [f"camopd/beat/{each}" for each in range(world_size)]
        self._count = 0

    def put(self, now: Phase) -> None:
        """A sign of life of this rank."""
        self._count += 1
        who = f"rank {self._rank} ({socket.gethostname()}, pid {os.getpid()})"
        beat = (who, now.what, now.lasts, time.time(), self._count)
        self._store.set(self._keys[self._rank], json.dumps(beat))

    def read(self, before: dict[int, Beat]) -> dict[int, Beat]:
        """The latest sign of each other rank that has given one; `before` is what was read before."""
        ranks = [rank for rank in range(len(self._keys)) if rank != self._rank]
        keys = [self._keys[rank] for rank in ranks]
        if self._store.check(keys) and self._store.has_extended_api():  # `get` would wait for a key that is not there
            texts = self._store.multi_get(keys)
        else:
            texts = [self._store.get(key) if self._store.check([key]) else None for key in keys]
        found = {}
        for rank, text in zip(ranks, texts, strict=True):
            if text is not None:
                beat = Beat._make([*json.loads(text), time.monotonic()])
                old = before.get(rank)
                found[rank] = old if old is not None and old.number == beat.number else beat
        return found


class Watchdog:
    """Two threads of a rank. One gives and reads signs of life, the other reports: a store that is frozen with its process
    keeps nobody from being told."""

    def __init__(self, rank: int = 0, board: Board | None = None):
        """`rank`: of this process; `board`: where there are others."""
        self._rank, self._board = rank, board
        self._end = threading.Event()
        self._others: dict[int, Beat] = {}
        self._answered = time.monotonic()  # when the board last has
        self._told: tuple[Phase | None, int, bool] = (None, 0, False)  # phase, times, whether it was an alarm
        work = [self._look_often, *([self._beat_often] if board is not None else [])]
        self._threads = [threading.Thread(target=each, name="camopd-watchdog", daemon=True) for each in work]

    def start(self) -> None:
        """Watch from now on."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads; waits for them no longer than `END`."""
        self._end.set()
        for thread in self._threads:
            thread.join(END)

    def _beat_often(self) -> None:
        assert self._board is not None
        while True:
            done = self._end.is_set()
            try:
                if done:
                    self._board.put(Phase(ENDED, time.monotonic()))
                else:
                    self.beat()
            except (
                RuntimeError
            ) as error:  # it may pass; where it does not, `report` says that the store does not answer
                logger.debug("no sign of life: %s", error)
            if done:
                return
            self._end.wait(BEAT)

    def _look_often(self) -> None:
        while not self._end.wait(LOOK):
            text, alarm = self.report()
            if text:
                logger.log(logging.ERROR if alarm else logging.INFO, text)

    def beat(self) -> None:
        """Give a sign of life, and where it may soon matter read those of the others."""
        assert self._board is not None
        self._board.put(current())
        waits = time.monotonic() - current().since > REPORTS[0] / 3
        self._others = self._board.read(self._others) if waits else {}
        self._answered = time.monotonic()

    def report(self) -> tuple[str, bool]:
        """What there is to tell now, or "", and whether a rank is silent or has left. Of a phase once at each of `REPORTS`,
        and once when that begins."""
        now = current()
        told, alarmed = self._told[1:] if self._told[0] == now else (0, False)
        due = time.monotonic() - now.since >= report_at(told)
        if not due and (alarmed or not told):
            return "", False
        self._told = (now, told + due, alarmed)
        unanswered = 0.0 if self._board is None else time.monotonic() - self._answered
        if unanswered > SILENCE:  # then nothing is known of the others
            text = (
                f"{now.said}. The store of the process group has not answered for "
                f"{unanswered:.0f} s: the process that has it, rank 0 or the launcher, is stopped or gone"
            )
            self._told = (now, told + due, True)
            return (text, True) if self._rank < 2 else ("", False)
        others = self._others
        ended = [rank for rank, beat in others.items() if beat.what == ENDED]
        silent = [rank for rank, beat in others.items() if rank not in ended and beat.unchanged > SILENCE]
        if set(range(self._rank)) - set(silent) - set(ended):
            return "", False  # a rank below says it
        alarm = bool(silent or (ended and now.what != PUSH))
        # Which may well take a minute.
        writes = now.what.endswith("rollout") or f": {ROLLOUT_SERVERS} (" in now.what
        if not alarm and (not due or (not told and writes)):
            return "", False
        self._told = (now, told + due, alarmed or alarm)
        lines = [now.said, *self._of_others(now, others, silent)]
        return ". ".join(lines), alarm

    def _of_others(self, now: Phase, others: dict[int, Beat], silent: Sequence[int]) -> list[str]:
        lines = [
            f"{beat.who} has given no sign of life for {max(beat.unchanged, time.time() - beat.sent):.0f} s; it was in "
            f"{beat.what}. Where it stays so, the run ends after ddp_timeout seconds"
            for beat in (others[rank] for rank in silent)
        ]
        lines += [
            f"{beat.who} has left training"
            if beat.what == ENDED
            else f"{beat.who} is in {beat.what}, for {beat.seconds + beat.unchanged:.0f} s"
            for rank, beat in others.items()
            if rank not in silent and beat.what != now.what
        ]
        more = [f"and {len(lines) - SHOWN} ranks more"] if len(lines) > SHOWN else []
        return lines[:SHOWN] + more


def report_at(told: int) -> float:
    """Seconds in a phase at which it is told, after so many times.

    >>> [report_at(told) for told in range(6)]
    [60.0, 300.0, 600.0, 1200.0, 2400.0, 4800.0]
    """
    return REPORTS[told] if told < len(REPORTS) else REPORTS[-1] * 2 ** (told - len(REPORTS) + 1)


@contextmanager
def watching() -> Iterator[None]:
    """A `Watchdog` of this process while it trains; of all ranks where there are several."""
    board, rank = None, 0
    import torch.distributed as dist  # here, as every command imports this module

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        rank = dist.get_rank()
        store: Any = dist.distributed_c10d._get_default_store()
        board = Board(store.clone(), rank, dist.get_world_size())
    dog = Watchdog(rank, board)
    dog.start()
    try:
        with phase("training, between the phases of a step"):
            yield
    finally:
        dog.stop()
