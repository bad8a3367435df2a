"""How noisy the gradient of one step is: the sampled gap, its baseline, and the KL itself, at weights that stand still.

    make testbed ARGS="--only gradients"

A trainer with a learning rate of 0 draws prompts and completions anew in every step, and each estimator's gradient is taken
of the very same micro-batches. So the steps of a cell are draws of each estimator, paired. At two places: the specialised
model, and the same after `MIDDLE` steps of CaMOPD. The seeds are those of the first comparison, whose models are there; its
results are not read.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camopd import atomic
from camopd.loss import Loss
from camopd.report.page import table as markdown_table
from camopd.samples import MicroBatch
from camopd.step import Step, StepCallback
from camopd.token_rules import TokenRule

from .arms import ARMS
from .jobs import Benches, say
from .models import VOCABULARY
from .run import PROMPTS, Bench, recipe, trainer_of
from .signs import t_interval


DRAWS = 24  # steps of a cell
MIDDLE, MIDDLE_RATE = 16, 3e-4  # steps of CaMOPD after which the second place is, and their learning rate
LIKELIEST = 20  # tokens of the teacher that are asked for: the default
FEW = 5  # of them, a share of this vocabulary nearer to that of 20 in a large one
KINDS: dict[str, dict[str, str]] = {
    "sampled gap": {},
    "`baseline: kl`": {"baseline": "kl"},
    f"`divergence: top_k`, {FEW}": {"divergence": "top_k"},
    f"`divergence: top_k`, {LIKELIEST}": {"divergence": "top_k"},
    "`divergence: full`": {"divergence": "full"},
}
FULL = list(KINDS)[-1]
CELLS = (  # place, branch, selection
    ("start", "general", False),
    ("middle", "general", False),
    ("middle", "general", True),
)
COLUMNS = {  # what `noise` gives, in words
    "variance": "variance / squared mean",
    "ratio": "variance, of the sampled gap's",
    "cosine": "one step's cosine to the mean gradient",
    "same": "cosine to full on the same completions",
    "bias": "cosine of the means",
}


def work(out: Path, models: Path, until: float, seeds: Sequence[int]) -> None:
    """Measure the seeds whose file is not there, until a time of `time.monotonic`."""
    torch.set_num_threads(1)
    models.mkdir(parents=True, exist_ok=True)
    benches = None
    for seed in seeds:
        path = out / "gradients" / f"{seed}.json"
        if path.is_file():
            continue
        if time.monotonic() > until:
            return say("the time is up; the same command goes on from here")
        path.parent.mkdir(parents=True, exist_ok=True)
        benches = benches or Benches(models)
        started = time.perf_counter()
        atomic.write(path, json.dumps(measure(benches.of(seed), seed)) + "\n")
        say(f"gradients of seed {seed}: {time.perf_counter() - started:.0f} s")


def measure(bench: Bench, seed: int, draws: int = DRAWS, middle: int = MIDDLE) -> list[dict[str, Any]]:
    """A row for each cell and estimator, with the numbers of `noise`."""
    start = copy.deepcopy(bench.specialised).requires_grad_(True)
    moved = copy.deepcopy(start)
    _train(bench, moved, MIDDLE_RATE, seed, middle, StepCallback(), ARMS["camopd"])
    rows = []
    for place, branch, selection in CELLS:
        model = {"start": start, "middle": moved}[place]
        before = [weight.clone() for weight in model.parameters()]
        probe = Probe(model)
        # The teachers of a run of CaMOPD on one branch, which say their likeliest tokens as well.
        settings = {"schedule": branch, "selection": selection, "scale": 1, "divergence": "top_k",
                    "divergence_top_k": LIKELIEST}  # fmt: skip
        _train(bench, model, 0.0, seed, draws, probe, settings)
        assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
        for kind, found in noise(probe.draws).items():
            rows.append({"place": place, "branch": branch, "selection": selection, "kind": kind, **found})
    return rows


def _train(
    bench: Bench, model: Any, rate: float, seed: int, steps: int, callback: StepCallback, settings: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        trainer = trainer_of(bench, model, recipe(folder, rate, seed, steps, settings), callback)
        if isinstance(callback, Probe):
            callback.losses = losses_of(trainer.loss)
        trainer.train()


def losses_of(loss: Loss) -> dict[str, Loss]:
    """A run's loss with each estimator in place of its own, and without a token rule."""
    found = {}
    for kind, settings in KINDS.items():
        args = copy.copy(loss.args)
        for name, value in {"divergence": "sampled", "baseline": "none", **settings}.items():
            setattr(args, name, value)
        found[kind] = Loss(args, loss.student, loss.teachers, TokenRule(args))
    return found


class Probe(StepCallback):
    """Takes each estimator's gradient of a step before the step trains on it."""

    def __init__(self, model: Any):
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.losses: dict[str, Loss] = {}
        self.draws = Draws()

    def on_step_ready(self, step: Step) -> None:
        """Of all its micro-batches."""
        batches = [batch for batch in step.micro_batches if batch is not None]

        def gradient_of(kind: str) -> Tensor:
            cut = kind == f"`divergence: top_k`, {FEW}"
            total = sum(self.losses[kind](_with_few(batch) if cut else batch)[0] for batch in batches)
            assert isinstance(total, Tensor)
            return torch.cat([each.flatten() for each in torch.autograd.grad(total, self.weights)])

        self.draws.add(gradient_of)


def _with_few(batch: MicroBatch) -> MicroBatch:
    """With the likeliest of the likeliest tokens, which stand first."""
    return replace(batch, seen=[{name: values[:, :FEW] for name, values in seen.items()} for seen in batch.seen])


class Draws:
    """Paired draws of each estimator's gradient: what `noise` needs of them, without the gradients themselves."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}
        self.powers: dict[str, list[float]] = {kind: [] for kind in KINDS}  # squared norm of each draw
        self.with_full: dict[str, list[float]] = {kind: [] for kind in KINDS}  # inner product with that of `FULL`

    def add(self, gradient_of: Callable[[str], Tensor]) -> None:
        """Ask for the gradient of each kind, one after the other, as vectors of one length."""
        full = gradient_of(FULL)
        for kind in KINDS:
            gradient = full if kind == FULL else gradient_of(kind)
            self.powers[kind].append(product(gradient, gradient))
            self.with_full[kind].append(product(gradient, full))
            self.sums[kind] = self.sums[kind].add_(gradient) if self.count else gradient.clone()
        self.count += 1


def product(one: Tensor, other: Tensor) -> float:
    """Inner product, in double precision: of squared sums and sums of squares only the difference is of interest."""
    pieces = zip(one.split(1 << 22), other.split(1 << 22), strict=True)
    return sum(float(piece.double() @ its.double()) for piece, its in pieces)


def noise(draws: Draws) -> dict[str, dict[str, float]]:
    """Numbers of `COLUMNS` for each estimator.

    Products of means are taken over pairs of different draws, so that the noise of a draw does not count as signal: they
    are the product of the sums, less the products of each draw with itself.
    """

    def signal(one: str, other: str, of_draws: list[float]) -> float:
        every = product(draws.sums[one], draws.sums[other])
        return (every - sum(of_draws)) / (draws.count * (draws.count - 1))

    found = {}
    full = signal(FULL, FULL, draws.powers[FULL])
    for kind in KINDS:
        power = statistics.fmean(draws.powers[kind])
        own, with_full = signal(kind, kind, draws.powers[kind]), signal(kind, FULL, draws.with_full[kind])
        cosines = [both / math.sqrt(one * other) if one * other else math.nan for both, one, other in
                   zip(draws.with_full[kind], draws.powers[kind], draws.powers[FULL], strict=True)]  # fmt: skip
        found[kind] = {
            "variance": (power - own) / own if own > 0 else math.nan,
            "spread": power - own,
            "cosine": with_full / math.sqrt(power * full) if full > 0 else math.nan,
            "same": statistics.fmean(cosines),
            "bias": with_full / math.sqrt(own * full) if own > 0 and full > 0 else math.nan,
        }
    plain = found[next(iter(KINDS))]["spread"]
    return {kind: {**each, "ratio": each["spread"] / plain} for kind, each in found.items()}


def write(out: Path) -> None:
    """gradients.md, of the seeds that are there."""
    seeds = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "gradients").glob("*.json"))]
    if not seeds:
        return say("no seed has been measured yet")
    parts = [
        "# How noisy the gradient of one step is\n",
        f'Exploratory. `make testbed ARGS="--only gradients"`: {len(seeds)} seeds, in each cell {DRAWS} steps of {PROMPTS} '
        "prompts at weights that stand still, every estimator on the same completions; ± 95 % over seeds (Student's t). "
        f"*Middle* is the student after {MIDDLE} steps of CaMOPD. *Variance* is that of a step's gradient over prompts, "
        f"completions and sampled tokens, summed over the weights. The vocabulary has {len(VOCABULARY)} tokens.",
    ]
    for cell in CELLS:
        place, branch, selection = cell
        words = "selected by Eq. 8" if selection else "all samples"
        of = [[row for row in seed if (row["place"], row["branch"], row["selection"]) == cell] for seed in seeds]
        parts += [f"\n## {place.capitalize()}, {branch} prompts, {words}\n", table(of)]
    atomic.write(out / "gradients.md", "\n".join(parts) + "\n")
    print("\n".join(parts))


def table(seeds: list[list[dict[str, Any]]]) -> str:
    """A line for each estimator, of the rows that each seed has of it."""
    rows = [["gradient", *COLUMNS.values()]]
    for kind in KINDS:
        of = [next(row for row in seed if row["kind"] == kind) for seed in seeds]
        rows.append([kind, *(_said([row[name] for row in of]) for name in COLUMNS)])
    return markdown_table(rows)


def _said(values: Sequence[float]) -> str:
    found = t_interval(values)
    return f"{found.value:.3f}" + ("" if math.isnan(found.high) else f" ± {found.high - found.value:.3f}")
