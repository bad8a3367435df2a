"""The machines that ranks run on: who shares a disk, and errors that are raised on all of them."""

from __future__ import annotations

import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from accelerate.utils import gather_object

from .errors import on_all_ranks


T = TypeVar("T")
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells machines of one name apart


def raise_of_any(work: Callable[[], T], kinds: tuple[type[BaseException], ...] = (Exception,)) -> T:
    """What `work` gives; an error of one of `kinds` is raised on all ranks. Called by all of them."""
    with on_all_ranks(gather_object, kinds):
        return work()


class Machine:
    """That of this rank. Asked for by all ranks at once, when it is first needed.

    `part` of `parts` is this rank's place on it. `commits` says that this rank puts checkpoints in place: the first
    process, and on each machine that does not see its files the first there. `prepare` finds that out.
    """

    def __init__(self) -> None:
        self._known: tuple[str, int, int] | None = None
        self.commits = False

    def _look(self) -> tuple[str, int, int]:
        if self._known is None:
            boot = _BOOT.read_text(encoding="ascii").strip() if _BOOT.exists() else ""
            name, own = f"{socket.gethostname()} {boot}", uuid.uuid4().hex
            ranks = gather_object([(name, own)])
            here = [each for place, each in ranks if place == name]
            self._first, self._known = ranks[0][1] == own, (name, here.index(own), len(here))
        return self._known

    @property
    def name(self) -> str:
        """Differs between machines."""
        return self._look()[0]

    @property
    def part(self) -> int:
        """Place of this rank on its machine, from 0."""
        return self._look()[1]

    @property
    def parts(self) -> int:
        """Ranks on this machine."""
        return self._look()[2]

    def in_turn(self, work: Callable[[], None]) -> None:
        """Do something to a disk on the first process, and then, for disks of their own, on each other machine."""
        self._look()
        raise_of_any(lambda: work() if self._first else None)
        raise_of_any(lambda: work() if self.part == 0 and not self._first else None)

    def prepare(self, folder: Path) -> None:
        """Make an empty folder on each disk, and find out which machines have one of their own."""
        self._look()
        marker = folder.parent / f"seen-{gather_object([uuid.uuid4().hex])[0]}"
        raise_of_any(lambda: _make(folder, marker) if self._first else None)
        seen = marker.exists()  # of a name that nobody has asked for before: no cache of the file system has it
        self.commits = self._first or (self.part == 0 and not seen)
        raise_of_any(lambda: _make(folder, None) if self.commits and not self._first else None)
        marker.unlink(missing_ok=True)  # all have looked


def _make(folder: Path, marker: Path | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if marker is not None:
        marker.touch()
