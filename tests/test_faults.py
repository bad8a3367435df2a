"""The scripts of `make test-faults`, with a few of their kills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


FAULTS = Path(__file__).parent / "faults"


@pytest.mark.slow
def test_killed_runs_go_on_as_if_they_had_not_been():
    done = subprocess.run(
        [sys.executable, FAULTS / "kills.py", "--share", "0.05"], capture_output=True, text=True, timeout=900, check=False,
        env={**os.environ, "PYTHONPATH": str(FAULTS.parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    kills = int(done.stdout.splitlines()[-1].split(" kills")[0])
    assert kills >= 15 and done.stdout.splitlines()[-1].endswith("0 different, 0 stuck")
