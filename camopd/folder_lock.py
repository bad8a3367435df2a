"""One run at a time in a folder: a lock that a run holds while it trains, across processes and machines."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from .errors import CaMOPDError


logger = logging.getLogger(__name__)

LOCK_FILE = "_lock"  # what begins with _ is never sent to the Hub
TOUCH_SECONDS = 60.0  # so often its holder shows that it is there
STALE_SECONDS = 300.0  # after which a holder on another machine that has not done so is taken to be gone
_PAUSE = 1.0
NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_held: set[int] = set()  # descriptors of this process


def _let_go_in_child() -> None:
    """A process that is forked from this one, as the worker of a data loader, must not keep the lock beyond its end."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


class FolderLock:
    """The lock of a folder, held between `take` and `release`.

    It is the kernel's (`flock`), which ends with its process, however that ends. Some network file systems have it within
    a machine only, others not at all: there the file counts, which says who holds it and is touched once a minute. It is
    never removed, because another process might have just opened it.
    """

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / LOCK_FILE
        self._descriptor: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Hold the lock. May wait for some minutes until it is clear whether a holder on another machine is gone.

        Raises `CaMOPDError` when it is held, and `OSError` when the folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._take(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(descriptor)
        self._stop.clear()
        self._thread = threading.Thread(target=self._touch, args=(descriptor,), name="folder-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let go; nothing happens where the lock is not held."""
        if self._descriptor is None or self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
        _held.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = self._thread = None

    def _take(self, descriptor: int) -> None:
        has_flock = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise _in_use(self._folder, _read(descriptor)) from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            has_flock = False
            logger.warning(
                "the file system of %s has no locks (%s): two runs that start in it in the same moment are not noticed",
                self._folder, error.strerror,
            )  # fmt: skip
        holder = _read(descriptor)
        if holder:
            if self._is_there(holder, descriptor, has_flock):
                raise _in_use(self._folder, holder)
            logger.warning("%s: the run of %s is gone, and its lock is taken over", self._folder, _who(holder))
        mine = {
            "host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "process_started": _started(os.getpid()),
        }  # fmt: skip
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(mine).encode(), 0)

    def _is_there(self, holder: dict[str, Any], descriptor: int, has_flock: bool) -> bool:
        """Whether the run that has written the file still trains, where this process could lock it, or no one can."""
        if holder.get("host") == socket.gethostname():
            return not has_flock and _is_running(holder)  # on this machine a lock ends with its process
        seen = os.fstat(descriptor).st_mtime_ns
        left = STALE_SECONDS - (self._now() - seen) / 1e9
        if left > 0:
            logger.warning(
                "%s was in use %.0f seconds ago, by %s; waiting up to %.0f seconds for a sign of it",
                self._folder, STALE_SECONDS - left, _who(holder), left,
            )  # fmt: skip
        end = time.monotonic() + left
        while time.monotonic() < end:
            if os.stat(self._path).st_mtime_ns != seen:
                return True
            time.sleep(min(_PAUSE, STALE_SECONDS / 10))
        return False

    def _now(self) -> int:
        """The time of the file system, whose clock need not be this machine's, in nanoseconds."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            return os.fstat(file.fileno()).st_mtime_ns

    def _touch(self, descriptor: int) -> None:
        while not self._stop.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(descriptor)


def need_free(folder: Path) -> None:
    """Raise `CaMOPDError` where the kernel says that a run trains in a folder.

    Nothing is left there, and nobody is waited for: of a file system without locks `FolderLock.take` finds out more.
    """
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:  # no run has been here
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look do not see each other
    except (BlockingIOError, PermissionError):
        raise _in_use(folder, _read(descriptor)) from None
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _in_use(folder: Path, holder: dict[str, Any]) -> CaMOPDError:
    return CaMOPDError(
        f"{str(folder)!r} is in use: a run trains in it, {_who(holder)}. Two runs in one folder would overwrite "
        "each other's checkpoints. Stop that one, wait for it, or give this one another output_dir."
    )


def _read(descriptor: int) -> dict[str, Any]:
    """Who has written the file; empty where no one holds it, or what is there is cut short."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # also of UTF-8
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else {}


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "which has not said yet who it is"
    return f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')}"


def _is_running(holder: dict[str, Any]) -> bool:
    """Whether the process is there, and not another one with its number."""
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    return _started(holder["pid"]) == holder.get("process_started")


def _started(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the machine did, as Linux has it."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19])
    except (OSError, ValueError, IndexError):
        return None
