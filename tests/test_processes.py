"""How a process ends: what a library's thread still does must not abort it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


# As the script ends, a thread of gloo still lets go of tensors of Python, and has half a second's work with the last.
SCRIPT = """
import atexit, sys, time
import torch
import torch.distributed as dist
from camopd.processes import let_threads_rest

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux whether the threads sleep")
def test_a_process_waits_for_the_threads_of_gloo_and_ends_with_0():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, "waits"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
