"""How a process ends: what a library's thread still does must not abort it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from camopd import threads


# As the script ends, a thread of gloo still lets go of tensors of Python, and has half a second's work with the last.
SCRIPT = """
import atexit, sys, time
import torch
import torch.distributed as dist
from camopd.threads import let_threads_rest

class SlowToGo(torch.Tensor):
    def __del__(self):
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            pass

if "waits" in sys.argv:
    atexit.register(let_threads_rest)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = dist.group.WORLD  # as DeepSpeed keeps one
dist.all_reduce_coalesced([torch.zeros(1) for _ in range(20_000)] + [torch.zeros(1).as_subclass(SlowToGo)])
dist.destroy_process_group()
"""


def test_wait_lasts_until_no_thread_of_torch_runs_or_has_woken(monkeypatch, tmp_path):
    """Each state of one thread is seen once: running, asleep, asleep again after a wake-up, and still asleep then."""
    states = iter([("R", 1), ("S", 1), ("S", 2), ("S", 2)])
    pauses = []
    for number, name in ((1, "python"), (2, "pt_gloo_runloop")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "status").write_text(f"Name:\t{name}\n", encoding="utf-8")

    def look(pause=0.0):
        pauses.append(pause)
        state, switches = next(states)
        text = f"Name:\tpt_gloo_runloop\nState:\t{state} (...)\nvoluntary_ctxt_switches:\t{switches}\n"
        (tmp_path / "2" / "status").write_text(text, encoding="utf-8")

    look()
    monkeypatch.setattr(threads, "THREADS", tmp_path)
    monkeypatch.setattr(threads.time, "sleep", look)
    threads.let_threads_rest()
    assert len(pauses) == 4 and next(states, None) is None


def test_wait_is_none_where_threads_cannot_be_looked_at(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "THREADS", tmp_path / "none")
    monkeypatch.setattr(threads.time, "sleep", lambda _: pytest.fail("waits"))
    threads.let_threads_rest()


@pytest.mark.slow
def test_process_waits_for_the_threads_of_gloo_and_ends_with_0():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, "waits"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
