"""Ctrl-C where there is nothing to tidy up: a line and the end, whoever would have caught it."""

import signal
import subprocess
import sys
import threading

import pytest

from camopd.commands.ctrl_c import STOPPED, ends_at_once


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
