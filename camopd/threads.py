"""How the processes of a run end."""

from __future__ import annotations

import time
from pathlib import Path


THREADS = Path("/proc/self/task")  # Linux; elsewhere there is nothing to look at
_OF_TORCH = "pt_"  # how torch names its threads: pt_gloo_runloop, pt_nccl_watchdg
_PAUSE = 0.01  # seconds; longer than the 5 ms after which a thread that waits for the GIL wakes to ask again
_PATIENCE = 10.0  # seconds, for a thread that never rests


def let_threads_rest() -> None:
    """Wait until torch's own threads sleep with nothing left to do; registered with `atexit` by the trainer.

    A thread of a gloo process group lets go of the tensors of a collective after the collective has returned. To let go of
    a tensor that Python knows it takes the GIL, in a function that is `noexcept` (`TensorImpl::decref_pyobject`). When
    the interpreter is shutting down by then, Python before 3.14 ends the thread by unwinding its stack, which must not
    leave that function: "terminate called without an active exception", and SIGABRT after all work is done.
    `destroy_process_group` ends the threads only with the last reference to their group, and DeepSpeed and the device
    meshes of FSDP2 keep theirs.

    The main thread releases the GIL here, so that a thread that wants it gets it. A thread that sleeps through a pause
    neither runs nor waits for the GIL.
    """
    end = time.monotonic() + _PATIENCE
    before = None
    while (now := _threads_of_torch()) and time.monotonic() < end:
        if now == before and all(state.startswith("S") for state, _ in now.values()):
            return
        before = now
        time.sleep(_PAUSE)


def _threads_of_torch() -> dict[str, tuple[str, str]]:
    """State and number of voluntary context switches of each thread of torch, as Linux has them."""
    found = {}
    for folder in THREADS.glob("*") if THREADS.is_dir() else ():
        try:
            lines = (folder / "status").read_text(encoding="utf-8").splitlines()
        except OSError:  # it has just ended
            continue
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        if status["Name"].startswith(_OF_TORCH):
            found[folder.name] = (status["State"], status["voluntary_ctxt_switches"])
    return found
