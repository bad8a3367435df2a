"""Ctrl-C where there is nothing to tidy up: a line and the end, whoever would have caught it."""

import os
import pty
import signal
import subprocess
import sys
import threading

import pytest

from camopd.commands.ctrl_c import STOPPED, ends_at_once
from camopd.exit_codes import REQUEUE
from camopd.signals import StopAsked, StopRequests


CAUGHT = """
import signal
from camopd.commands.ctrl_c import ends_at_once

class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

with ends_at_once():
    {body}
print("still here")
"""
REQUEUED = CAUGHT.replace("ends_at_once():", "ends_at_once(requeue=True):")


@pytest.mark.parametrize(
    "body",
    [
        "Dying()",
        "try: signal.raise_signal(signal.SIGINT)\n    except BaseException: pass",
        "signal.raise_signal(signal.SIGINT)",
    ],
)
def test_ctrl_c_ends_the_process_though_the_code_inside_catches_everything(body):
    command = [sys.executable, "-c", CAUGHT.format(body=body)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", f"{STOPPED}\n")


def test_signal_while_a_run_is_looked_at_starts_it_again():
    """Before anything heavy is imported."""
    text = """
import os, signal
from camopd import cli, early
early.check_early = lambda *_, **__: signal.raise_signal(signal.SIGTERM)
cli.run("train", ["run.yaml"])
"""
    found = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=50, check=False)
    assert found.returncode == REQUEUE, found.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_what_a_scheduler_sends_ends_the_process_with_the_code_that_starts_it_again(name):
    text = REQUEUED.format(body=f"signal.raise_signal(signal.{name})")
    found = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=50, check=False)
    assert (found.returncode, found.stdout) == (REQUEUE, "")
    assert name in found.stderr and "--resume auto" in found.stderr and len(found.stderr.splitlines()) == 1


def test_closed_terminal_ends_the_process_with_the_code_that_starts_it_again():
    child, terminal = pty.fork()
    if not child:
        text = REQUEUED.format(body="import time; print('begun', flush=True); time.sleep(50)")
        os.execv(sys.executable, [sys.executable, "-c", text])
    assert b"begun" in os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == REQUEUE


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_one_process_of_several_is_ended_by_the_signal_of_its_launcher(variable, monkeypatch):
    """Which has another reason: a process that cannot start must not be started again for ever."""
    monkeypatch.setenv(variable, "2")
    text = REQUEUED.format(body="signal.raise_signal(signal.SIGTERM)")
    found = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=50, check=False)
    assert (found.returncode, found.stderr) == (-signal.SIGTERM, "")


def test_worker_that_is_forked_inside_ends_as_usual():
    text = REQUEUED.format(
        body="""import os
    child = os.fork()
    if not child:
        signal.raise_signal(signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"""
    )
    found = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=50, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{-signal.SIGTERM}\nstill here\n", "")


def test_run_that_trains_hears_the_signals_itself():
    stops = StopRequests(lambda mine: mine, announces=False)
    with ends_at_once(requeue=True):
        before = signal.getsignal(signal.SIGTERM)
        assert before is not signal.SIG_DFL
        with stops.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(StopAsked, match="SIGTERM"):
                stops.check()
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ctrl_c_is_a_keyboard_interrupt_again_afterwards():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="inside"), ends_at_once():
        assert signal.getsignal(signal.SIGINT) is not before
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler


def test_handler_of_the_program_stays():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        with ends_at_once():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_imports_may_go_on_in_other_threads():
    entered = []

    def work():
        with ends_at_once():
            entered.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [signal.default_int_handler]
