"""A long run with a teacher that fails one request in twenty: memory, descriptors, threads and tasks must stay level.

    python tests/faults/soak.py [--steps 300] [--leak 0]

The server answers with errors, cuts answers in half and drops lines. Exits with 1 when resident memory grows by more than
1 MB per 100 steps after the first 100, or when descriptors, threads or tasks grow.
`--leak 20000` keeps so many bytes in each step, which must be seen.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from kills import CaMOPDConfig, CaMOPDTrainer, FakeVLLM, make_model, make_prompts, make_tokenizer
from transformers import TrainerCallback


WARM_UP = 100  # steps in which caches fill
MB_PER_100 = 1.0


def serve(told: Path) -> int:
    """A server that misbehaves, in a process of its own."""
    process = os.fork()
    if process:
        return process
    chance = random.Random(0)
    server = FakeVLLM(model=make_model(2), tokenizer=make_tokenizer())

    def fail_sometimes() -> None:
        if chance.random() < 0.05:
            server.answers.append(chance.choice([(500, "out of luck"), (503, "busy"), "cut", None]))

    server.before = fail_sometimes
    told.with_suffix(".part").write_text(server.url)
    told.with_suffix(".part").rename(told)
    while True:
        server.requests.clear()
        time.sleep(0.05)


class Watch(TrainerCallback):
    """Notes what the process holds every 20 steps."""

    def __init__(self, leak: int) -> None:
        """`leak`: bytes that are kept in each step."""
        self._leak, self._kept = leak, []
        self.rows: list[tuple[int, float, int, int, int]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self._kept.append(b"x" * self._leak)
        if state.global_step % 20:
            return
        gc.collect()
        # Pages that are free and that glibc keeps come and go by whole blocks of 4 MB, which is no growth and hides one.
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        tasks = sum(isinstance(thing, asyncio.Task) and not thing.done() for thing in gc.get_objects())
        self.rows.append((
            state.global_step, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd")),
            threading.active_count(), tasks,
        ))  # fmt: skip
        print("step {:4d}: {:7.1f} MB, {} descriptors, {} threads, {} tasks".format(*self.rows[-1]), flush=True)


def slope(rows) -> float:
    """MB per 100 steps, by least squares."""
    mean_step, mean_size = (sum(row[place] for row in rows) / len(rows) for place in range(2))
    return (
        100
        * sum((row[0] - mean_step) * (row[1] - mean_size) for row in rows)
        / sum((row[0] - mean_step) ** 2 for row in rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--leak", type=int, default=0, help="bytes a step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="camopd-soak-") as folder:
        told = Path(folder) / "url"
        server = serve(told)
        while not told.exists():
            time.sleep(0.01)
        watch = Watch(options.leak)
        trainer = CaMOPDTrainer(
            model=make_model(1),
            teachers={"general": told.read_text(), "domain": make_model(1)},
            args=CaMOPDConfig(
                output_dir=str(Path(folder) / "run"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
                save_steps=25, save_total_limit=2, gradient_checkpointing=False, max_steps=options.steps,
                prompts_per_step=4, per_device_train_batch_size=2, max_completion_length=6, max_prompt_length=64,
                logging_steps=100, log_level="error", learning_rate=1e-4,
            ),
            train_dataset={branch: make_prompts(branch) for branch in ("general", "domain")},
            processing_class=make_tokenizer(),
            callbacks=[watch],
        )  # fmt: skip
        try:
            trainer.train()
        finally:
            os.kill(server, signal.SIGKILL)
    rows = [row for row in watch.rows if row[0] > WARM_UP]
    grown = slope(rows)
    level = all(rows[-1][place] <= rows[0][place] for place in (2, 3, 4))
    print(f"{options.steps} steps with 5 % faults: {grown:+.2f} MB per 100 steps after step {WARM_UP}, the rest "
          f"{'level' if level else 'has grown'}")  # fmt: skip
    if grown > MB_PER_100 or not level:
        sys.exit(1)


if __name__ == "__main__":
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if others.keys() != os.environ.keys():  # the Makefile's keep freed pages, which would count as memory in use
        os.execve(sys.executable, [sys.executable, *sys.argv], others)
    main()
