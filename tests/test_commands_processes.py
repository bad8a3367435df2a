"""Child processes of commands end with everything that they have started (camopd/commands/processes.py)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from camopd.commands import processes


# Starts a process that ignores SIGTERM, says both ids, and does what the argument says when a signal comes.
PARENT = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(300)"])
def come(number, frame):
    print("got", number, flush=True)
    if sys.argv[1] == "obeys":
        sys.exit(3)
signal.signal(signal.SIGTERM, come)
signal.signal(signal.SIGINT, come)
print(child.pid, file=sys.stderr, flush=True)
while True:
    time.sleep(300)
"""


@pytest.fixture
def start():
    """Start PARENT; returns it and the id of its own child. What a failed test leaves is killed."""
    started = []

    def start(how):
        process = processes.start([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        processes.end([process], [], signal.SIGKILL)
        process.stdout.close()


def wait_until_gone(pid, seconds=10.0):
    """Whether a process ends; one that waits to be collected has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_end_sends_the_first_signal_and_kills_what_the_process_has_left_behind(start, first):
    process, child = start("obeys")
    processes.end([process], [], first)
    assert process.stdout.readline() == f"got {int(first)}\n"
    assert process.returncode == 3
    assert wait_until_gone(child)


def test_end_kills_after_the_grace(start):
    process, child = start("stays")
    started = time.monotonic()
    processes.end([process], [], grace=0.5)
    assert 0.5 <= time.monotonic() - started < 10
    assert process.returncode == -signal.SIGKILL
    assert wait_until_gone(child)


def test_end_kills_at_once_when_another_signal_comes(start):
    process, child = start("stays")
    with processes.noted_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({os.getpid()}, 2)"])
        processes.end([process], signals)
    assert signals == [signal.SIGINT, signal.SIGINT]
    assert process.returncode == -signal.SIGKILL
    assert wait_until_gone(child)


def test_end_of_a_process_that_is_gone_ends_what_it_has_left_behind(start):
    process, child = start("obeys")
    process.kill()
    process.wait()
    processes.end([process], [])
    assert wait_until_gone(child)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_are_noted_and_the_handlers_put_back(number):
    before = signal.getsignal(number)
    with processes.noted_signals() as signals:
        os.kill(os.getpid(), number)
        assert signals == [number]
    assert signal.getsignal(number) is before


def test_terminal_that_is_closed_is_noted_once():
    with processes.noted_signals() as signals:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert signals == [signal.SIGHUP, signal.SIGTERM]


def test_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.noted_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_child_of_a_command_that_ignores_ctrl_c_does_not_ignore_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        with processes.noted_signals():
            code = "import signal; print(signal.getsignal(2) is signal.SIG_IGN)"
            process = processes.start([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            assert process.communicate()[0] == "False\n"
    finally:
        signal.signal(signal.SIGINT, before)
