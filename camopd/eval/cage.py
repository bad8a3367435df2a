"""Code that a model has written runs in a cage of bubblewrap: no network, no files but its own, little memory and time.

The cage sees /usr and a Python in it, read-only, and a /tmp of its own in memory. It has no process but its own, no
variable of the environment, no key and no answer of another task. Nothing runs in it as root, but as nobody (or the user),
because limits on the number of processes do not hold root.
"""

from __future__ import annotations

import ast
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ..errors import CaMOPDError


SECONDS = 10.0  # of a program
MEMORY = 2 << 30  # bytes, of all its processes together
ADDRESSES = MEMORY  # bytes, of each of its processes
DISK = 64 << 20  # bytes of its /tmp
PROCESSES = 32
NOBODY = 65534
_SAID = 2000  # bytes of what a program has printed last
_PAUSE = 0.02  # seconds between two looks
_HAS = ("/usr", "/bin", "/lib", "/lib64")  # of the machine, in each cage
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_OF_PYTHON = "import os, sys; print(*map(ascii, (sys.base_prefix, os.path.realpath(sys.executable))), sep='\\n')"
# The token says that the program has come to its end: one that leaves early with exit code 0 has not.
_LIBRARIES = """
import platform
try:
    from numpy import __version__ as numpy
except ImportError:
    numpy = None
print(f"Python {platform.python_version()}, numpy {numpy}")
"""
_END = "\nimport os as _os, sys as _sys\n_sys.stdout.flush()\n_os.write(1, {token!r})\n"


@dataclass(frozen=True)
class Room:
    """What a program in a cage has: its limits, and what it sees beside /usr, all of it read-only."""

    seconds: float = SECONDS
    memory: int = MEMORY
    addresses: int = ADDRESSES
    processes: int = PROCESSES
    shown: Mapping[str, str] = field(default_factory=dict)  # paths of the machine, by those in the cage
    links: Mapping[str, str] = field(default_factory=dict)  # where symbolic links point to, by their paths in the cage
    files: Mapping[str, bytes] = field(default_factory=dict)  # contents, by paths in the cage
    semaphores: bool = False  # whether its processes may share some, in a /dev/shm of its own


def find() -> tuple[str, str]:
    """The paths of bubblewrap and of a Python that the cage can show, in which a program has come to its end.

    Raises `CaMOPDError` that says what to install, or why no cage can be made.
    """
    bwrap = shutil.which(os.environ.get("CAMOPD_BWRAP", "bwrap"))
    if bwrap is None:
        raise CaMOPDError(
            "code that models have written is run in a cage only, and there is no bubblewrap to make it: install the "
            "package `bubblewrap` (apt, dnf, pacman), name its bwrap by CAMOPD_BWRAP, or leave out the tasks with code."
        )
    pythons = [path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if Path(path).exists()]
    needed = [name for name in ("prlimit", *(("setpriv",) if os.geteuid() == 0 else ())) if shutil.which(name) is None]
    if not pythons or needed:
        missing = "python3 below /usr" if not pythons else f"{needed[0]} (package util-linux)"
        raise CaMOPDError(f"the cage for code that models have written needs {missing}. Install it.")
    cage = bwrap, pythons[0]
    made, how = run("pass", cage)  # in many containers it cannot be, and every answer would be wrong
    if not made:
        raise CaMOPDError(
            f"the cage for code that models have written cannot be made here: {how}. Bubblewrap needs user namespaces "
            "(sysctl kernel.unprivileged_userns_clone, the security profile of a container). Allow them, or leave out the "
            "tasks with code."
        )
    return cage


def about(cage: tuple[str, str]) -> str:
    """What a verdict depends on beside the answer: Python and numpy in the cage, and its memory."""
    with tempfile.TemporaryFile() as said:
        made, how = into(said, _LIBRARIES, cage, Room())
        if not made:
            raise CaMOPDError(f"the Python in the cage does not say which it is: {how}. Run the same command again.")
        said.seek(0)
        return f"{said.read().decode().strip()}, {MEMORY >> 30} GiB"


def words(bwrap: str, python: str, room: Room | None = None, given: Mapping[str, int] | None = None) -> list[str]:
    """The command line of a cage, with a Python in it that reads its program from /program.

    `given` has the open files whose contents are those of the room's `files`.
    """
    room = room or Room()
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
    return [
        *(as_nobody if os.geteuid() == 0 else ()),
        bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv",
        "--ro-bind", "/usr", "/usr",
        *(word for name in ("lib", "lib64", "bin") for word in ("--symlink", f"usr/{name}", f"/{name}")),
        "--proc", "/proc", "--dev", "/dev", "--size", str(DISK), "--tmpfs", "/tmp",
        *(("--size", str(DISK), "--tmpfs", "/dev/shm") if room.semaphores else ()),
        *(word for inside, path in room.shown.items() for word in ("--ro-bind", path, inside)),
        *(word for inside, target in room.links.items() for word in ("--symlink", target, inside)),
        *(word for inside, file in (given or {}).items() for word in ("--ro-bind-data", str(file), inside)),
        "--ro-bind-data", "0", "/program", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp",
        # A thread counts as a process, and numpy's would be as many as the machine has cores.
        *(word for name in _ONE_THREAD for word in ("--setenv", name, "1")),
        # Inside: a user's other processes do not count.
        "prlimit", f"--nproc={room.processes}", f"--as={room.addresses}", f"--fsize={DISK}", "--core=0",
        "--nofile=256", "--", python, "-I", "/program",
    ]  # fmt: skip


def run(
    program: str, cage: tuple[str, str], seconds: float = SECONDS, look: Callable[[], None] = lambda: None
) -> tuple[bool, str]:
    """Whether a program comes to its end in a cage, and how it ended. Nothing of it is left after. `look`: see `into`."""
    with tempfile.TemporaryFile() as said:
        passed, how = into(said, program, cage, Room(seconds), look=look)
    return passed, how


def into(
    said: IO[bytes],
    program: str,
    cage: tuple[str, str],
    room: Room,
    errors: IO[bytes] | None = None,
    look: Callable[[], None] = lambda: None,
) -> tuple[bool, str]:
    """As `run`, with another room; what the program prints is in the file `said`, before the token at its end.

    Its errors are there as well, or in a file of their own. Both files are to be temporary ones, as the program can read
    and change them. `look` is called while it runs, and may raise to end it.
    """
    token = secrets.token_hex(16).encode()
    source = (program + _END.format(token=token)).encode(errors="replace")
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(tempfile.TemporaryFile()) for _ in (program, *room.files)]
        for file, content in zip(files, (source, *room.files.values()), strict=True):
            file.write(content)
            file.seek(0)
        given = dict(zip(room.files, (file.fileno() for file in files[1:]), strict=True))
        child = subprocess.Popen(
            words(*cage, room, given),
            stdin=files[0],
            stdout=said,
            stderr=subprocess.STDOUT if errors is None else errors,
            start_new_session=True,
            env={"PATH": os.environ["PATH"]},
            pass_fds=list(given.values()),
        )
        try:
            how = _wait(child, room, (said,) if errors is None else (said, errors), look)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with bubblewrap goes all that is in its cage
            child.wait()
    said.seek(max(0, said.seek(0, os.SEEK_END) - _SAID))
    text = said.read()
    if how is not None:
        return False, how
    if child.returncode == 0 and text.endswith(token):
        said.truncate(said.tell() - len(token))
        return True, "passed"
    last = text.decode(errors="replace").strip().splitlines()
    return False, last[-1][:300] if last and child.returncode else "left before its end"


def _wait(
    child: subprocess.Popen[bytes], room: Room, written: Sequence[IO[bytes]], look: Callable[[], None]
) -> str | None:
    """Wait for the end of a cage; what it has too much of, or `None`."""
    deadline = time.monotonic() + room.seconds

    def full() -> bool:  # at its limit: it may have ended because it could write no more
        return any(os.fstat(file.fileno()).st_size >= DISK for file in written)

    while child.poll() is None:
        look()
        if time.monotonic() > deadline:
            return "out of time"
        if memory_of(child.pid) > room.memory:
            return "out of memory"
        if full():
            break
        time.sleep(_PAUSE)
    return "printed too much" if full() else None


def of_python(environment: Path, private: Sequence[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """What `Room.shown` and `Room.links` need for the Python of a virtual environment, beside the environment itself.

    The Python is asked, as what `pyvenv.cfg` names may be a link in any folder. Raises `CaMOPDError` where it does not
    start, and where its own files lie in a folder that holds one of the `private` ones.
    """
    environment = environment.resolve()
    python = environment / "bin" / "python"
    try:
        asked = [str(python), "-I", "-S", "-c", _OF_PYTHON]  # -S: without its packages, some of which run code
        answer = subprocess.run(asked, capture_output=True, encoding="utf-8", check=True, timeout=60).stdout
        prefix, program = map(ast.literal_eval, answer.strip().split("\n"))
    except (OSError, subprocess.SubprocessError, ValueError, SyntaxError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().split("\n")
        raise CaMOPDError(f"{python} does not start: {said[-1]}.") from None
    base, had = Path(prefix).resolve(), (*_HAS, str(environment))
    shown = {} if _within(program, had) else {program: program}
    if not _within(str(base), had):
        held = [path for path in private if path.resolve().is_relative_to(base)]
        if held:
            raise CaMOPDError(
                f"the Python of {environment} has its files in {base}, and {held[0]} is in that folder, too: code that "
                "models have written would see more than the Python. Make the environment anew with another one: that of "
                "/usr/bin/python3, or one that uv, pyenv or conda has put into a folder of its own."
            )
        shown |= {str(path): str(path) for path in (base / "lib", base / "lib64") if path.is_dir()}
    links = [*_links(str(python)), *_links(prefix)]
    return shown, {place: target for place, target in links if not _within(place, (*had, *shown))}


def _within(path: str, folders: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _links(path: str) -> Iterator[tuple[str, str]]:
    """The symbolic links on the way to a file that is there: where each really is, and what is written in it."""
    at, left = Path("/"), [*reversed(Path(path).parts)]
    while left:
        part = left.pop()
        if part == "..":
            at = at.parent
        elif (at / part).is_symlink():
            target = os.readlink(at / part)
            yield str(at / part), target
            left += reversed(Path(target).parts)
        else:
            at = at / part  # of "/" it is that


def memory_of(root: int) -> int:
    """Bytes of memory that a process and all below it have."""
    total, left = 0, [root]
    page = os.sysconf("SC_PAGE_SIZE")
    while left:
        pid = left.pop()
        with contextlib.suppress(OSError, ValueError, IndexError):  # gone meanwhile
            total += int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * page
            for thread in Path(f"/proc/{pid}/task").iterdir():
                left += map(int, (thread / "children").read_text(encoding="ascii").split())
    return total
