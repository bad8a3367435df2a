"""Runs that are done once each: one file for a run, models that are made when they are first asked for."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from camopd import atomic

from .models import Size, load_or_make, make_general, specialise
from .run import Bench


ROOT = Path(__file__).parent.parent.parent
Job = tuple[str, Any, Callable[[Bench], Mapping[str, Any]]]  # name of a run, its seed or key, and how it is made


def go_through(
    jobs: Iterable[Job], out: Path, models: Path, until: float, kind: Callable[[Path], Any] | None = None
) -> None:
    """Do those of the jobs, in their order, whose run is not there, until a time of `time.monotonic`.

    `kind` makes what gives each key of a job its `Bench`, of the folder of models: `Benches`, by seed.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for folder in (out / "runs", models):
        folder.mkdir(parents=True, exist_ok=True)
    benches = None
    for name, key, run_on in jobs:
        path = out / "runs" / f"{name}.json"
        if path.is_file():
            continue
        if time.monotonic() > until:
            return say("the time is up; the same command goes on from here")
        benches = benches or (kind or Benches)(models)  # which makes the general model, for minutes
        found = run_on(benches.of(key))
        atomic.write(path, json.dumps(found) + "\n")
        last = found["points"][-1]["report"]
        say(f"{name}: {found['seconds']} s, covered {last['covered']:.2f}, domain {last['domain']:.2f}")


class Benches:
    """Models by seed, made when they are first asked for and kept on disk."""

    def __init__(self, folder: Path, size: Size = Size()):  # noqa: B008 - it is frozen
        self.folder, self.size = folder, size
        self._general = load_or_make(folder / "general", lambda: make_general(size, say))
        self._last: tuple[int, Bench] | None = None

    def of(self, seed: int) -> Bench:
        """What runs of a seed share. Each seed has a specialised model of its own; the general one is the same."""
        if self._last is None or self._last[0] != seed:
            specialised = load_or_make(
                self.folder / f"specialised-{seed}", lambda: specialise(self._general, self.size, seed, say)
            )
            self._last = seed, Bench.of(self._general, specialised, self.size.skills, self.size.domain)
        return self._last[1]


def say(text: str) -> None:
    """A line with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)
