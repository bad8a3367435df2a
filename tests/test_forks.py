"""A program in a fork is what it is in an interpreter of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from forks import Forks


SHOW = """
import __main__, json, os, sys
json.dump([sys.argv, os.getcwd(), sys.path, os.environ["WORD"], sys.stdin.read(), __main__.__name__, __name__,
           getattr(__main__, "__file__", None), sorted(os.listdir("/proc/self/fd"))], sys.stdout)
sys.stdout.reconfigure(errors="backslashreplace")
print("last", file=sys.stderr)
"""
ENDS = {
    "well": "print('said')",
    "code": "import sys; print('said'); sys.exit(75)",
    "reason": "import sys; sys.exit('the reason')",
    "error": "def fail(): raise ValueError('what')\nfail()",
    "interrupt": "raise KeyboardInterrupt",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "atexit": "import atexit; atexit.register(print, 'at exit')",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
}


@pytest.fixture(scope="module")
def python():
    forks = Forks(["json"])
    subprocess.run([forks.python, "-m", "this"], stdout=subprocess.DEVNULL, check=True)  # from here on all are forks
    yield forks.python
    forks.close()


def of_both(python, words, **more):
    """What a program leaves in an interpreter of its own, and in a fork."""
    runs = [
        subprocess.run([each, *words], capture_output=True, text=True, timeout=60, **more)
        for each in (sys.executable, python)
    ]
    return [(run.returncode, run.stdout, run.stderr) for run in runs]


@pytest.mark.parametrize("how", ["script", "module", "package", "code", "option", "harmless"])
def test_forks_have_the_words_folder_paths_environment_and_files_of_their_command(how, python, tmp_path):
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / "__main__.py").write_text(SHOW)
    words = {
        "script": ["show.py"], "module": ["-m", "show"], "package": ["-m", "shown"], "code": ["-c", SHOW],
        "option": ["-s", "show.py"], "harmless": ["-B", "-u", "show.py"],
    }[how]  # fmt: skip
    environment = {**os.environ, "WORD": "word", "PYTHONPATH": str(tmp_path / "elsewhere")}
    alone, forked = of_both(python, [*words, "--one", "two"], cwd=tmp_path, env=environment, input="given")
    assert json.loads(alone[1])[4] == "given" and alone[2] == "last\n"
    assert forked == alone


def test_code_that_comes_early_does_not_wait_for_the_imports_and_a_module_does(tmp_path, monkeypatch):
    """`camopd serve` asks a Python for its vLLM and takes a minute without an answer for none."""
    go_on = tmp_path / "go-on"
    wait = f"import os, time\nwhile not os.path.exists({str(go_on)!r}): time.sleep(0.01)"
    (tmp_path / "takes_long.py").write_text(wait)
    (tmp_path / "shown.py").write_text("import sys; print('takes_long' in sys.modules)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    forks = Forks(["takes_long"])
    try:
        module = subprocess.Popen([forks.python, "-m", "shown"], stdout=subprocess.PIPE, text=True)
        code = [forks.python, "-c", "import sys; print('takes_long' in sys.modules)"]
        assert subprocess.run(code, capture_output=True, text=True, timeout=30).stdout == "False\n"
        assert module.poll() is None
        go_on.touch()
        assert module.communicate(timeout=30)[0] == "True\n"
        assert subprocess.run(code, capture_output=True, text=True, timeout=30).stdout == "True\n"
    finally:
        go_on.touch()
        forks.close()


@pytest.mark.parametrize("how", ENDS)
def test_forks_end_as_a_program_of_its_own_does(how, python):
    alone, forked = of_both(python, ["-c", ENDS[how]])
    assert forked[:2] == alone[:2]
    assert forked[2].splitlines()[-1:] == alone[2].splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_forks_get_the_signals_and_are_gone_with_their_command(number, python, tmp_path):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    process = subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    fork = int(process.stdout.readline())
    assert fork != process.pid
    process.send_signal(number)
    assert process.wait(10) == -number
    end = time.monotonic() + 10
    while time.monotonic() < end and os.path.exists(f"/proc/{fork}"):
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{fork}")


def test_forks_have_the_files_that_are_passed_and_are_the_last_to_have_them(python):
    reader, writer = os.pipe()
    other, there = os.pipe()
    code = (
        f"import os, time; os.write({writer}, b'one'); os.write({there}, b'two'); os.close({writer}); time.sleep(60)"
    )
    process = subprocess.Popen([python, "-c", code], pass_fds=[writer, there])
    for file in (writer, there):
        os.close(file)
    try:
        with open(reader, "rb") as first, open(other, "rb") as second:
            assert first.read() == b"one"  # to its end, while the program goes on
            assert second.read(3) == b"two" and process.poll() is None
            process.kill()
            assert second.read() == b""
    finally:
        process.kill()
        process.wait(10)


SPAWNS = """
import multiprocessing, os, sys, time
def square(number, answers):
    import forks_main
    answers.send(number ** 2)
    time.sleep(60 if number == 3 else 0)
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    for number in (2, 3):
        child = context.Process(target=square, args=(number, there))
        child.start()
        print(here.recv(), flush=True)
    time.sleep(60)
"""


def test_forks_spawn_forks_and_a_kill_ends_them_too(python, tmp_path):
    (tmp_path / "spawns.py").write_text(SPAWNS)
    process = subprocess.Popen([python, str(tmp_path / "spawns.py")], stdout=subprocess.PIPE, text=True)
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["4\n", "9\n"]
    finally:
        process.kill()
    assert process.stdout.read() == ""  # all that had it are gone
    assert process.wait(10) == -signal.SIGKILL


def test_forks_start_forks(python):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import forks_main; print(1)'], check=True)"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "1\n", "")
