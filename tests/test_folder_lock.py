"""One run at a time in a folder: across processes, machines, file systems without locks, and after every kind of end."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import camopd
from camopd import folder_lock
from camopd.errors import CaMOPDError
from camopd.folder_lock import LOCK_FILE, FolderLock, need_free


HOLDER = """
import sys, time, os
from pathlib import Path
from camopd.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.take()
if "fork" in sys.argv:  # a worker that outlives its parent
    reads, writes = os.pipe()
    if os.fork() == 0:
        os.write(writes, b"x")
        time.sleep(600)
        os._exit(0)
    os.read(reads, 1)  # its own copy of the lock is closed
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def log(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("camopd"), "propagate", True)
    return caplog


@pytest.fixture
def start(tmp_path):
    """Start a process that holds the lock of `tmp_path`."""
    started = []

    def start(*words):
        environment = {**os.environ, "PYTHONPATH": str(Path(camopd.__file__).parent.parent)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", HOLDER, str(tmp_path), *words], env=environment, stdout=subprocess.PIPE,
                text=True, start_new_session=True,
            )
        )  # fmt: skip
        assert started[-1].stdout.readline() == "taken\n"
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        process.stdout.close()


def leave(folder, age=0.0, **changes):
    """A lock file as another run has left it `age` seconds ago."""
    content = {
        "host": "another-machine",
        "pid": 12345,
        "since": "2026-11-26 08:00:00",
        "process_started": 7,
        **changes,
    }
    path = folder / LOCK_FILE
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - age,) * 2)
    return path


def no_flock(monkeypatch, number=errno.ENOLCK):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_lock_is_taken_released_and_taken_again_and_its_file_stays(tmp_path):
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        lock = FolderLock(folder)
        lock.take()
        content = json.loads((folder / LOCK_FILE).read_text())
        assert content["pid"] == os.getpid() and content["host"]
        lock.release()
        lock.release()
        assert (folder / LOCK_FILE).read_text() == ""


def test_lock_that_is_held_in_the_same_process_is_refused(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    with pytest.raises(CaMOPDError, match=rf"is in use: a run trains in it, process {os.getpid()} on .* since 20"):
        second.take()
    first.release()
    second.take()
    second.release()


def test_look_at_a_lock_refuses_one_that_is_held_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 0.5)  # `take` waits for so long below
    need_free(tmp_path / "new")
    need_free(tmp_path)
    assert not any(tmp_path.iterdir())
    lock = FolderLock(tmp_path)
    lock.take()
    with pytest.raises(CaMOPDError, match=rf"is in use: a run trains in it, process {os.getpid()} on .* since 20"):
        need_free(tmp_path)
    lock.release()
    need_free(tmp_path)
    (tmp_path / LOCK_FILE).write_text('{"pid": 1, "host": "another"}')  # a run that was killed; `take` looks longer
    need_free(tmp_path)
    lock.take()
    lock.release()


@pytest.mark.parametrize("worker", [False, True])
def test_lock_that_another_process_holds_is_refused_until_that_is_killed(worker, start, tmp_path, log):
    process = start(*["fork"] * worker)
    with pytest.raises(
        CaMOPDError, match=rf"is in use: .*process {process.pid} on .*Stop that one, wait for it, or give"
    ):
        FolderLock(tmp_path).take()
    process.kill()
    process.wait()
    lock = FolderLock(tmp_path)
    lock.take()
    lock.release()
    (line,) = [entry.message for entry in log.records if "taken over" in entry.message]
    assert f"the run of process {process.pid} on " in line


def test_number_of_a_process_that_another_one_has_by_now_is_no_holder(tmp_path, log):
    leave(tmp_path, host=folder_lock.socket.gethostname(), pid=os.getpid())
    lock = FolderLock(tmp_path)
    lock.take()
    lock.release()
    assert "taken over" in log.text


@pytest.mark.parametrize("with_flock", [True, False])
def test_holder_on_another_machine_is_gone_after_five_minutes_without_a_touch(with_flock, tmp_path, monkeypatch, log):
    if not with_flock:
        no_flock(monkeypatch)
    leave(tmp_path, age=folder_lock.STALE_SECONDS + 1)
    lock = FolderLock(tmp_path)
    started = time.monotonic()
    lock.take()
    assert time.monotonic() - started < 2
    lock.release()
    assert "the run of process 12345 on another-machine since 2026-11-26 08:00:00 is gone" in log.text


def test_holder_on_another_machine_that_was_there_just_now_is_waited_for(tmp_path, monkeypatch, log):
    """A job that is put back into the queue starts elsewhere within seconds, and must not fail."""
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 0.5)
    leave(tmp_path)
    lock = FolderLock(tmp_path)
    lock.take()
    lock.release()
    assert "waiting up to" in log.text and "taken over" in log.text


def test_holder_on_another_machine_that_shows_a_sign_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 6.0)
    path = leave(tmp_path, age=1)
    timer = threading.Timer(0.2, os.utime, [path])
    timer.start()
    with pytest.raises(CaMOPDError, match="process 12345 on another-machine since 2026-11-26 08:00:00"):
        FolderLock(tmp_path).take()
    timer.join()
    assert json.loads(path.read_text())["pid"] == 12345  # it is still that one's


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_file_system_without_locks_goes_by_the_file(number, tmp_path, monkeypatch, log):
    no_flock(monkeypatch, number)
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    assert "has no locks" in log.text
    with pytest.raises(CaMOPDError, match=f"process {os.getpid()} on"):
        second.take()
    first.release()
    second.take()
    second.release()
    leave(tmp_path, host=folder_lock.socket.gethostname(), pid=2**22 + 1)  # a number that Linux gives no process
    second.take()
    second.release()
    assert "taken over" in log.text


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": "x"}', "\x00" * 100])
def test_lock_file_that_says_nothing_is_taken(content, tmp_path):
    (tmp_path / LOCK_FILE).write_text(content)
    lock = FolderLock(tmp_path)
    lock.take()
    lock.release()


def test_holder_shows_that_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "TOUCH_SECONDS", 0.01)
    lock = FolderLock(tmp_path)
    lock.take()
    path = tmp_path / LOCK_FILE
    os.utime(path, (0, 0))
    deadline = time.monotonic() + 60
    while path.stat().st_mtime < 1e9 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.stat().st_mtime > time.time() - 60
    lock.release()
    assert not [thread for thread in threading.enumerate() if thread.name == "folder-lock"]


def test_folder_that_cannot_be_written_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        FolderLock(tmp_path / "file").take()
