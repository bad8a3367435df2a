"""Rollouts that are on their way: the teacher scores each one as it is written, and `rollout_lag` begins them a step ahead.

    lag 0    write 1 | score, train 1 | write 2 | score, train 2 | ...
    lag 1    write 1 | write 2 ...............  | write 3 ...............
                     | score, train 1           | score, train 2

With lag 1 a step's completions are of the weights before the last update. w_t is the ratio of the trained weights to those,
and is in the loss (Eq. 2 and 9).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import gather_object

from .errors import on_all_ranks
from .forward import evaluating
from .guards import LEAST
from .rollout_servers import Flight
from .rollouts import StreamingEngine
from .samples import Sample
from .scoring import CAMOPD
from .step import Clock, Step, StepCallback, Work
from .teachers.base import RemoteTeacher
from .token_rules import TokenRule


@dataclass
class Ahead:
    """The next step's rollouts. `clock` says how long they took and how much of it was hidden."""

    number: int  # of the step
    flight: Flight
    clock: Clock
    finished: list[Sample]  # so far
    samples: list[Sample] | None = None  # once all are there


class Rollouts:
    """Has the trainer's engine write completions. What an engine gives one by one goes to its teacher at once."""

    def __init__(self, trainer: Any):
        """`trainer` is asked at each call which step or evaluation is under way."""
        self._trainer = trainer
        self._ahead: Ahead | None = None
        self._looked_at: Counter[str] = Counter()  # by server: how often `compare` took a completion of it

    @property
    def streams(self) -> bool:
        """Whether the engine gives completions one by one, while it writes others."""
        return isinstance(self._trainer.engine, StreamingEngine)

    def take(self, rows: Sequence[dict[str, Any]], max_tokens: int, prefix: int | None) -> tuple[list[Sample], int]:
        """A completion of each row, in their order, and how many prompts were cut: those begun a step ago, or new ones.

        Of a completion the first `prefix` tokens are kept. Called by all ranks; what one of them meets is raised on all.
        """
        engine = self._trainer.engine
        if self.streams:
            samples, prompts_cut = self._stream(rows, max_tokens, prefix)
        else:
            places = {row.get("position", place): place for place, row in enumerate(rows)}
            samples = sorted(engine.samples(rows, max_tokens), key=lambda sample: places[sample.position])
            prompts_cut = engine.prompts_cut
        self._trainer.notify("on_rolled_out", samples)
        for sample in samples:
            sample.keep_prefix(prefix)
        return samples, prompts_cut

    def _stream(self, rows: Sequence[dict[str, Any]], max_tokens: int, prefix: int | None) -> tuple[list[Sample], int]:
        trainer = self._trainer
        step, begun = trainer.step if trainer.model.training else None, None
        if step is not None:  # an evaluation finds them drained, and leaves them
            begun, self._ahead = self._ahead, None
        if begun is None or step is None or begun.number != step.number:
            begun = self._start(None if step is None else step.number, rows, max_tokens, prefix)
        begun.clock.waited_for()
        samples = self._collect(begun, forward_early=self.student_is_free(rows), prefix=prefix)
        trainer.engine.log_lengths(samples)
        if step is not None:
            step.metrics["time/rollout/writing"] = begun.clock.seconds
            step.metrics["time/rollout/hidden"] = begun.clock.hidden_seconds
        return samples, begun.flight.prompts_cut

    def begin_next(self, step: Step) -> None:
        """With `rollout_lag`, begin the rollouts of the step after this one, by the weights of now. Called by all ranks."""
        trainer, number = self._trainer, step.number + 1
        if not (self.streams and trainer.args.rollout_lag) or number >= trainer.train_dataset.num_steps:
            return
        args = trainer.args
        rows = trainer.train_dataset.rows_of(number)
        self._ahead = self._start(number, rows, args.completion_length_at(number), args.loss_prefix_tokens, lag=1)

    def compare(self, step: Step) -> None:
        """Hold a finished completion of the next step against the student, who still has the weights that write it; after
        the update nothing would tell whether the servers have them. Of several servers that have finished one each has its
        turn. Called by all ranks, before the update."""
        ahead = self._ahead
        if ahead is None or not all(gather_object([bool(ahead.finished)])):  # none to compare yet
            return
        student = self._trainer.student
        sample = min(list(ahead.finished), key=self._telling)
        assert sample.rollout_logps is not None
        self._looked_at[sample.server] += 1
        with evaluating(student.model):
            ((logps, _),) = student.rows([sample.token_ids], [sample.prompt_len])
        apart = (logps.float() - sample.rollout_logps).abs()
        apart = apart[~apart.isnan()]
        step.ahead_apart = gather_object([(sample.server, float(apart.sum()), len(apart))])

    def _telling(self, sample: Sample) -> tuple[int, int, int]:
        """The order in which to compare: servers in turn, of each as many tokens as tell something, and few more."""
        tokens = len(sample.mask)
        return self._looked_at[sample.server], -min(tokens, LEAST), tokens

    def drain(self) -> tuple[list[Sample], int] | None:
        """The next step's rollouts where they are begun, as a checkpoint keeps them, and how many prompts were cut: the
        weights that write them are gone after the next update. Called by all ranks.

        Waits until all are written. Gives `None` for rollouts that are not, after a signal or where no server is left: the
        checkpoint is made without them, and the next step says what is wrong.
        """
        ahead, trainer = self._ahead, self._trainer
        if ahead is None:
            return None
        if any(gather_object([bool(trainer.stops.heard)])) and not all(gather_object([ahead.flight.done()])):
            return None
        if not all(gather_object([ahead.flight.settle()])):
            return None
        kept = [replace(sample) for sample in self._collect(ahead)]
        for sample in kept:
            sample.keep_prefix(trainer.args.loss_prefix_tokens)
        return kept, ahead.flight.prompts_cut

    def cancel(self) -> None:
        """Forget what is begun."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.flight.cancel()

    def _start(
        self, number: int | None, rows: Sequence[dict[str, Any]], max_tokens: int, prefix: int | None, lag: int = 0
    ) -> Ahead:
        """Begin the rollouts of a step, or of a batch of an evaluation."""
        trainer, work, clock = self._trainer, Work(), Clock()
        so_far: list[Sample] = []
        rule = CAMOPD if number is None else trainer.rule

        def finished(sample: Sample) -> None:
            sample.lag = lag
            trainer.scorer.ask(sample, prefix, rule)
            so_far.append(sample)
            if len(so_far) == len(rows):
                work.stop()

        trainer.engine.sync(trainer.held_out_results if number is None else trainer.step)
        words = ("evaluation",) if number is None else ("step", number)
        flight = trainer.engine.start(rows, max_tokens, words, finished)
        clock.add(work)
        return Ahead(number or 0, flight, clock, so_far)

    def student_is_free(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether the student may score finished samples while others are written.

        On one process alone: else ranks would wait for each other's completions. On a device of its own: a CPU is the
        servers', too. And for a teacher elsewhere: one in the process scores in the very batches of the student.
        """
        trainer = self._trainer
        teachers = [trainer.teachers[branch] for branch in {row["branch"] for row in rows}]
        return (
            trainer.args.world_size == 1
            and trainer.args.device.type != "cpu"
            and trainer.args.student_logps == "trainer"
            and type(trainer.rule) is TokenRule
            and all(isinstance(teacher, RemoteTeacher) for teacher in teachers)
        )

    def _collect(self, ahead: Ahead, forward_early: bool = False, prefix: int | None = None) -> list[Sample]:
        if ahead.samples is None:
            scorer, found, ready = self._trainer.scorer, [], []
            with on_all_ranks(gather_object), self._trainer.engine.waiting():
                for sample in ahead.flight.samples():
                    found.append(sample)
                    ready.append(sample)
                    if forward_early and len(ready) == scorer.student.batch_size:
                        scorer.read_student(ready, prefix)
                        ready = []
            ahead.samples = sorted(found, key=lambda sample: sample.position)
        return ahead.samples


class AheadCheck(StepCallback):
    """Has the completions of the next step compared in each step; `callbacks.guards` acts on what is found."""

    def __init__(self, rollouts: Rollouts):
        """`rollouts` of the run."""
        self._rollouts = rollouts

    def on_step_ready(self, step: Step) -> None:
        """While the servers write the next step."""
        self._rollouts.compare(step)
