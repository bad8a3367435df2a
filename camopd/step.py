"""One optimizer step as one value: made when the step begins, replaced when the next one begins."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from .errors import CaMOPDError
from .samples import LossTerms, MicroBatch, Sample, SampleSummary
from .schedule import Schedule
from .watchdog import phase


@dataclass
class Step:
    """What belongs to one optimizer step, on this rank: from its prompts to the metrics of its update."""

    number: int  # counted from 0, as in the schedule
    branches: tuple[str, ...]
    samples: list[Sample] = field(default_factory=list)  # that this rank has rolled out
    prompts_cut: int = 0  # of their prompts, those longer than allowed
    engine_logps: bool = False  # whether the student's log-probs of scoring are those of the rollout engine
    rng_before: list[Tensor] = field(
        default_factory=list
    )  # random numbers of this rank, before and after the rollouts
    rng_after: list[Tensor] = field(default_factory=list)
    summaries: list[SampleSummary] = field(default_factory=list)  # of all ranks' samples
    kept: dict[int, int] = field(default_factory=dict)  # of all ranks: position -> its sampled tokens
    terms: LossTerms = field(default_factory=lambda: LossTerms(0, None, {}))  # of the kept samples' loss
    micro_batches: deque[MicroBatch | None] = field(default_factory=deque)  # that this rank has yet to train
    metrics: dict[str, Any] = field(default_factory=dict)  # its line in metrics.jsonl
    loss: Tensor | float = 0.0  # this rank's sum over micro-batches
    losses: list[tuple[list[int], Tensor]] = field(default_factory=list)  # of each of these, with positions of samples
    broken_losses: list[tuple[list[int], float]] = field(default_factory=list)  # of all ranks, those not finite
    # Position -> sum over tokens of |log-prob in the loss - engine's|, and how many tokens; of all ranks
    apart: dict[int, tuple[float, int]] = field(default_factory=dict)
    # Server, sum and count of the same, of completions of the next step with the weights that write them; of all ranks
    ahead_apart: list[tuple[str, float, int]] = field(default_factory=list)
    clocks: dict[str, Clock] = field(default_factory=dict)  # of the teachers that have worked for this rank

    def __post_init__(self) -> None:
        self.importance = ImportanceStats()
        self.trained = Trained()

    @classmethod
    def at(cls, number: int, schedule: Schedule, rows: Sequence[Mapping[str, Any]]) -> Step:
        """The step with this number, before anything has happened in it. Raises `CaMOPDError` unless `rows` are its own."""
        step = cls(number, tuple(schedule.shares(number)))
        found = {row["branch"] for row in rows}
        if not found <= set(step.branches):
            # The loader and the schedule each compute the branches of a step.
            raise CaMOPDError(
                f"optimizer step {number} got prompts of {sorted(found)}, but schedule {str(schedule)!r} wants "
                f"{sorted(step.branches)}. The data loader and the trainer disagree about the step; if you replaced "
                "either, keep `StepDataset`'s order."
            )
        step.metrics.update({"branch": step.label, "time/train": 0.0})
        return step

    @property
    def label(self) -> str:
        """Its branches as one name."""
        return label(self.branches)

    @property
    def lag(self) -> int:
        """Updates between the weights that wrote its samples and those that are trained."""
        return max((sample.lag for sample in self.samples), default=0)

    @property
    def log_ratio(self) -> float:
        """How far the log-probs of all ranks' losses are from the engine's, in nats per token; 0 without the engine's."""
        return sum(total for total, _ in self.apart.values()) / max(1, sum(count for _, count in self.apart.values()))

    @property
    def has_rollout_logps(self) -> bool:
        """Whether its samples have the log-probs of the engine that drew them."""
        return any(sample.rollout_logps is not None for sample in self.samples)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds of what happens inside to the metric `time/<what>`, and let the watchdog know of it."""
        started = time.perf_counter()
        try:
            with phase(f"step {self.number + 1}: {what}"):
                yield
        finally:
            self.metrics[f"time/{what}"] = self.metrics.get(f"time/{what}", 0.0) + time.perf_counter() - started

    def add_loss(self, batch: MicroBatch, loss: Tensor, logps: Tensor, importance: Tensor) -> None:
        """Take in a micro-batch that goes through the loss, with its log-probs and w_t, both (B, T)."""
        self.importance.add(logps.detach(), batch.rollout_logps, importance, batch.mask, batch.positions)
        self.trained.add(batch.positions, batch.mask)
        self.losses.append((batch.positions, loss.detach()))

    def not_finite(self) -> list[tuple[list[int], float]]:
        """This rank's micro-batches with a loss that is not finite: positions and loss."""
        return [(list(positions), float(loss)) for positions, loss in self.losses if not torch.isfinite(loss)]

    def check_trained(self, gather: Callable[[list[Any]], list[Any]]) -> None:
        """After the last micro-batch: `check_trained` of all ranks, which of their losses are not finite, and how far the
        loss's log-probs are from the engine's."""
        parts = gather([(self.trained.rows, self.not_finite(), self.importance.apart)])
        check_trained(self.kept, [row for rows, _, _ in parts for row in rows])
        self.broken_losses = [place for _, found, _ in parts for place in found]
        for position, (total, count) in (found for _, _, apart in parts for found in apart.items()):
            before = self.apart.get(position, (0.0, 0))
            self.apart[position] = (before[0] + total, before[1] + count)

    def logged(self) -> dict[str, float]:
        """Its numbers but those that transformers logs itself, and those that are not defined in it: TRL would log `None`
        for one that is in no step, and trackers warn of that each time."""
        own = ("loss", "learning_rate", "grad_norm")
        return {
            name: float(value)
            for name, value in self.metrics.items()
            if name not in own and isinstance(value, int | float) and not math.isnan(value)
        }

    def close(self, branches: Iterable[str], gather: Callable[[list[Any]], list[Any]]) -> None:
        """Put what all ranks have counted into the metrics; the loss is the mean over ranks, as the parent logs it.

        `branches` are those of the run, whose teachers were idle or not.
        """
        parts = gather([(float(self.loss), {name: clock.seconds for name, clock in self.clocks.items()})])
        record = self.metrics
        record["loss"] = sum(loss for loss, _ in parts) / len(parts)
        if self.has_rollout_logps:
            record.update(self.importance.summary(gather))
            if not record.get("importance/active"):  # w_t is not in the loss: nothing is left out of a band
                record["importance/outside_band"] = math.nan
            record["importance/engine_logps"] = float(self.engine_logps)
        record["rollout/lag"] = float(self.lag)
        record["time/step"] = record["time/rollout"] + record["time/score"] + record["time/train"]
        for branch, clock in self.clocks.items():
            record[f"time/{branch}/teacher"] = clock.seconds
            record[f"time/{branch}/teacher_hidden"] = clock.hidden_seconds
        for branch in branches:  # a teacher is busy as long as any rank waits for it
            busy = max(seconds.get(branch, 0.0) for _, seconds in parts)
            record[f"time/{branch}/teacher_idle"] = max(0.0, record["time/step"] - busy)


def of_training(logs: Mapping[str, Any]) -> bool:
    """Whether what transformers logs is of training, whatever mode a callback has left the model in."""
    return "loss" in logs


def label(branches: Sequence[str]) -> str:
    """Branches of an optimizer step as one name."""
    return "+".join(branches)


class Clock:
    """How long a teacher worked, and how much of it while the trainer did something else. Seconds.

    Work that is done side by side counts once: a teacher that scores each sample as it is written works on many.
    """

    def __init__(self) -> None:
        self._work: list[Work] = []
        self._waited = math.inf  # since when the trainer has done nothing else

    def add(self, work: Work) -> None:
        """Count this work, done or under way."""
        self._work.append(work)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Work of which the trainer waits for the end."""
        self.waited_for()
        work = Work()
        self.add(work)
        try:
            yield
        finally:
            work.stop()

    def waited_for(self) -> None:
        """From here on the trainer does nothing else."""
        self._waited = min(self._waited, time.perf_counter())

    @property
    def seconds(self) -> float:
        """In which any of the work was under way."""
        return self._until(math.inf)

    @property
    def hidden_seconds(self) -> float:
        """Those before the trainer waited."""
        return self._until(self._waited)

    def _until(self, end: float) -> float:
        total, last = 0.0, -math.inf
        for work in sorted(self._work, key=lambda work: work.started):
            begin, stopped = max(work.started, last), min(work.stopped or work.started, end)
            total += max(0.0, stopped - begin)
            last = max(last, stopped)
        return total


class Work:
    """From when to when something was under way, on `time.perf_counter`."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.stopped: float | None = None

    def stop(self, _: Any = None) -> None:
        """It is done; the first call counts."""
        if self.stopped is None:
            self.stopped = time.perf_counter()


class ImportanceStats:
    """Running statistics of pi_train / pi_rollout over the tokens of a step's micro-batches on this rank."""

    def __init__(self) -> None:
        self.total = self.count = self.outside = 0.0
        self.largest = -math.inf
        self.apart: dict[int, tuple[float, int]] = {}  # position -> sum of |log ratio|, in nats, and how many tokens

    def add(
        self,
        train_logps: Tensor,
        rollout_logps: Tensor | None,
        weights: Tensor,
        mask: Tensor,
        positions: Sequence[int],
    ) -> None:
        """Take in one micro-batch, all (B, T), with the B samples' positions. Tokens without a rollout log-prob do not
        count."""
        if rollout_logps is None:
            return
        mask, rollout_logps = mask.to(train_logps.device), rollout_logps.to(train_logps.device)
        known = mask & ~rollout_logps.isnan()
        ratio = torch.exp(train_logps - rollout_logps)[known].double()
        if len(ratio):
            self.total += ratio.sum().item()
            apart = torch.where(known, train_logps - rollout_logps, 0).abs().double().sum(dim=1)
            for position, total, count in zip(positions, apart.tolist(), known.sum(dim=1).tolist(), strict=True):
                before = self.apart.get(position, (0.0, 0))
                self.apart[position] = (before[0] + total, before[1] + count)
            self.count += len(ratio)
            self.largest = max(self.largest, ratio.max().item())
            # Weights differ from the ratio exactly where it lies outside the band ("mask" and "truncate" alike).
            self.outside += (weights[known].double() != ratio).sum().item()

    def summary(self, gather: Callable[[list[Any]], list[Any]]) -> dict[str, float]:
        """Mean, maximum and share outside the band over all ranks, and the mean of |log ratio|: how far trainer and engine
        are from each other, in nats per token. NaN where no token counts."""
        apart = sum(total for total, _ in self.apart.values())
        parts = gather([(self.total, self.count, self.outside, self.largest, apart)])
        total, count, zeroed, _, log_ratio = (sum(part[index] for part in parts) for index in range(5))
        return {
            "importance/ratio_mean": total / count if count else math.nan,
            "importance/ratio_max": max(part[3] for part in parts) if count else math.nan,
            "importance/outside_band": zeroed / count if count else math.nan,
            "importance/log_ratio": log_ratio / count if count else math.nan,
        }


REPORT = (
    "Unless you have replaced a method of the trainer, this is a fault of camopd: please report it with the settings."
)


class Trained:
    """What has gone through an optimizer step's loss on this rank, to be held against what was kept of the step.

    Every rank adds the rows of each loss; at the end of the step the rows of all ranks are checked together.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []  # position and tokens inside the loss's mask

    def add(self, positions: Sequence[int], mask: Tensor) -> None:
        """Take in the rows of one loss. Rows of `mask` (B, T) after those with a position are dummies."""
        tokens = mask.sum(dim=1).tolist()
        if any(tokens[len(positions) :]):
            raise CaMOPDError(f"a dummy row has {sum(tokens[len(positions) :])} tokens in the loss. {REPORT}")
        self.rows += zip(positions, tokens[: len(positions)], strict=True)


def check_trained(kept: Mapping[int, int], rows: Sequence[tuple[int, int]]) -> None:
    """Raise `CaMOPDError` unless the rows of all ranks are the kept samples, each once and with all its tokens.

    `kept` has the sampled tokens of each kept sample of all ranks, by its position in the step's global batch.
    """
    times = Counter(position for position, _ in rows)
    found = {
        "not trained": [position for position in kept if not times[position]],
        "trained more than once": [position for position, count in times.items() if count > 1],
        "trained but not kept": [position for position in times if position not in kept],
        "trained with other tokens": [position for position, tokens in rows if kept.get(position, tokens) != tokens],
    }
    if any(found.values()):
        wrong = "; ".join(
            f"{len(places)} {what} (positions {sorted(places)[:8]})" for what, places in found.items() if places
        )
        raise CaMOPDError(
            f"of {len(kept)} kept samples with {sum(kept.values())} tokens, {len(rows)} samples with "
            f"{sum(tokens for _, tokens in rows)} tokens have gone through the loss: {wrong}. The run ends here; its "
            f"last checkpoint is from before that. {REPORT}"
        )


class StepCallback(TrainerCallback):
    """A callback that is also told of what happens inside an optimizer step. On every rank, since it may gather.

    A callback that measures adds its numbers to `step.metrics`. What else it needs, it gets where it is made.
    """

    def on_optimizer_created(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer itself, under what accelerate or DeepSpeed wraps around it."""

    def on_saving(self, folder: Path) -> None:
        """A checkpoint to go on from is being written; what is added to its folder is there again in `on_resumed`."""

    def on_resumed(self, checkpoint: Path) -> None:
        """The run goes on from a checkpoint, which is whole."""

    def on_step_started(self, step: Step) -> None:
        """Before the rollouts."""

    def on_rolled_out(self, samples: list[Sample]) -> None:
        """This rank's samples of a step, or of a batch of an evaluation, before they are scored."""

    def on_evaluation_started(self, name: str, prompts: int) -> None:
        """Before the first of so many prompts is rolled out; `name` is that of their branch."""

    def on_evaluation_scored(self, rows: Sequence[SampleSummary]) -> None:
        """After each batch of an evaluation: all that is measured so far, on all ranks."""

    def on_step_ready(self, step: Step) -> None:
        """Rolled out, scored and selected; before the first forward of the loss."""

    def on_optimizer_stepped(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """After an update, with the gradients still there. ZeRO-3 makes several in a step."""

    def on_step_closed(self, step: Step) -> None:
        """After the update, before the metrics are logged."""


class StepEnd(TrainerCallback):
    """Calls a function after each update, before transformers logs."""

    def __init__(self, end: Callable[[], None]):
        """`end` closes the step."""
        self._end = end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log, evaluate and save as often as the config says: a checkpoint's state has the numbers of before."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As transformers has it."""
        self._end()
