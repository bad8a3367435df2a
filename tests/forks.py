"""A Python that has imported torch, transformers, TRL and camopd already, and starts a program as fast as a fork.

`Forks(MODULES).python` is a command to use in place of `sys.executable` with `SCRIPT`, `-m MODULE` or `-c CODE`:
the program runs in a fork of one process that has imported the modules on one thread. It has the environment, the folder,
the open files, the signals and the exit code of that command, and ends as any other does. So do programs that it starts
by `sys.executable`, the ranks of `accelerate launch`, and processes of multiprocessing that it spawns. A fresh interpreter
runs with other options (-I, -X, ...), and where `-c` comes before all is imported: who asks a Python for its version
does not wait for that.

What differs: what the modules read of the environment as they were imported, the number of threads among it; all forks have
one seed of hashes; SIGKILL ends the processes that a fork has started, too, in its own session.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path


HERE = Path(__file__).resolve().parent
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OPTIONS = ("-c", "-m", "-u", "-B")  # that are understood here


class Forks:
    """The process that is forked, until `close`. `environment` is added to this process's."""

    def __init__(self, modules: list[str], **environment: str):
        import subprocess
        import tempfile

        self.folder = tempfile.TemporaryDirectory(prefix="forks-")  # a socket's path has to be short
        address = f"{self.folder.name}/socket"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen(100)  # who comes while it imports has to wait
        self.python = f"{self.folder.name}/python"
        Path(self.python).write_text(
            f"#!/bin/sh\nexec '{sys.executable}' -IS '{__file__}' run '{sys.executable}' '{address}' \"$@\"\n"
        )
        os.chmod(self.python, 0o755)
        paths = f"{HERE}{os.pathsep}{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve", self.python, str(listener.fileno()), f"{address}.ready", *modules],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()], start_new_session=True,
        )  # fmt: skip
        listener.close()

    def close(self) -> None:
        self.process.stdin.close()  # ends it, and all that still runs in a fork
        self.process.wait(60)
        self.folder.cleanup()


def run(python: str, address: str, words: list[str]) -> None:
    """Start a fork, hand on the signals that this process gets, and end as the fork does."""
    early = words[:1] == ["-c"] and not os.path.exists(f"{address}.ready")
    if not words or early or (words[0].startswith("-") and words[0] not in OPTIONS):
        os.execv(python, [python, *words])
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    opened = [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
    files = [0, 1, 2, *(file for file in opened if file > 2)]
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [b"."], files)
    request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ), "files": files}
    connection.sendall(f"{json.dumps(request)}\n".encode())
    for file in files[3:]:  # who waits for the end of one waits for the fork alone
        os.close(file)
    answers = connection.makefile(encoding="utf-8")
    process = int(answers.readline())

    def hand_on(number: int, _frame: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(process, number)

    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    code = int(answers.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(python: str, descriptor: int, ready: str, modules: list[str]) -> tuple[object, dict]:
    """Import, make the file `ready`, and fork for each that comes.

    Returns in the forks alone: their program, and the names it is to have.
    """
    import gc
    import importlib
    import select

    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    names = {Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")[1:]}
    # That of pyarrow's allocator knows of forks. Any other is one that the forks would lack.
    assert names <= {"jemalloc_bg_thd"}, f"an import has started the threads {names}"
    listener = socket.socket(fileno=descriptor)
    Path(ready).touch()
    wake, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    forks: dict[int, socket.socket | None] = {}  # by process, who waits for it; None: gone
    while True:
        waiting = {connection: process for process, connection in forks.items() if connection}
        ready, _, _ = select.select([0, wake, listener, *waiting], [], [])
        if 0 in ready:  # the tests have ended
            for process in forks:
                os.kill(process, signal.SIGKILL)
            os._exit(0)
        for connection in waiting.keys() & set(ready):  # killed, and its fork with it
            with suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(waiting[connection], signal.SIGKILL)
            os.kill(waiting[connection], signal.SIGKILL)
            connection.close()
            forks[waiting[connection]] = None
        if wake in ready:
            os.read(wake, 4096)
            for process in list(forks):
                done, status = os.waitpid(process, os.WNOHANG)
                if done and (connection := forks.pop(process)):
                    with suppress(OSError):
                        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                    connection.close()
        if listener in ready:
            connection, _ = listener.accept()
            _, files, _, _ = socket.recv_fds(connection, 1, 250)
            request = connection.makefile(encoding="utf-8").readline()
            process = os.fork() if files and request.endswith("\n") else None
            if process == 0:
                for open_one in (listener, connection, *filter(None, forks.values())):
                    open_one.close()
                for file in (wake, wakeup):
                    os.close(file)
                request = json.loads(request)
                have_files(files, request.pop("files"))
                return become(python, **request)
            for file in files:
                os.close(file)
            if process is not None:
                forks[process] = connection
                with suppress(OSError):
                    connection.sendall(f"{process}\n".encode())


def have_files(files: list[int], numbers: list[int]) -> None:
    """Give the open files these numbers, and no other."""
    above = 1 + max(files + numbers)
    moved = [
        fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files
    ]  # or one would be lost behind the number of another
    for file in files:
        os.close(file)
    for file, number in zip(moved, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def become(python: str, words: list[str], folder: str, environment: dict[str, str]) -> tuple[object, dict]:
    """Make this fork what `python WORDS` would be, up to its first line."""
    import importlib.util
    import types

    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    own = os.environ["PYTHONPATH"].split(os.pathsep)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = python
    if "multiprocessing.spawn" in sys.modules:
        sys.modules["multiprocessing.spawn"].set_executable(python)
    paths = [path for path in sys.path[1:] if path not in own]
    # One of them may also be named by an editable install, and then stays, at the end.
    files = [file for path in paths if path.endswith("site-packages") for file in sorted(Path(path).glob("*.pth"))]
    paths += [path for file in files for path in file.read_text(encoding="utf-8").splitlines() if path in own]
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path] + paths
    for number, name in enumerate(("stdin", "stdout", "stderr")):  # they know what kind of file it was before
        own = getattr(sys, name)
        setattr(sys, name, open(number, own.mode, encoding=own.encoding, errors=own.errors, closefd=False))  # noqa: SIM115
    sys.stderr.reconfigure(line_buffering=True)
    while words[0] in ("-u", "-B"):
        if words[0] == "-u":
            sys.stdout.reconfigure(line_buffering=True)
        words = words[1:]
    main = types.ModuleType("__main__")
    if words[0] == "-c":
        sys.path = ["", *paths]
        code, sys.argv = compile(words[1], "<string>", "exec"), ["-c", *words[2:]]
    elif words[0] == "-m":
        sys.path = [os.getcwd(), *paths]
        spec = importlib.util.find_spec(words[1])
        if spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{words[1]}.__main__")
        code, sys.argv = spec.loader.get_code(spec.name), [spec.origin, *words[2:]]
        main.__spec__, main.__package__, main.__file__ = spec, spec.parent, spec.origin
    else:
        sys.path = [str(Path(words[0]).resolve().parent), *paths]
        code, sys.argv = compile(Path(words[0]).read_bytes(), os.path.abspath(words[0]), "exec"), words
        main.__file__ = os.path.abspath(words[0])
    sys.modules["forks_main"] = sys.modules["__main__"]  # whose last line runs the program
    sys.modules["__main__"] = main
    return code, main.__dict__


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(*sys.argv[2:4], sys.argv[4:])
    else:
        exec(*serve(sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5:]))
