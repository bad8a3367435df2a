"""Rollouts by plain vLLM servers, `rollout_servers: [urls]`: every rank asks for the completions of its own prompts."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from .errors import RolloutError, on_all_ranks
from .messages import read_row
from .precision import compute_dtype
from .prompts import named
from .rollout_weights import WeightsFolder, check_adapter
from .rollouts import TRLEngine
from .samples import Sample
from .signals import StopRequests
from .tokens import head_size
from .vllm.sampler import Completion, Sampler, Sampling, Version
from .vllm_rollouts import ends_of, warn_of_type
from .watchdog import ROLLOUT_SERVERS, current, phase


T = TypeVar("T")
POLL = 0.5  # seconds between two looks whether a signal ends the wait for servers
STOPPED = "a signal has ended the wait for the rollout servers."


def connect(args: Any, tools: Any = None, max_tokens: int = 0) -> Sampler | None:
    """Reach the servers of `args.rollout_servers`; `None` where there are none.

    Args:
        tools: of the trainer.
        max_tokens: of the longest prompt and completion.

    Raises `ValueError` for tools, and `RolloutError` for a server that cannot be used.
    """
    if not args.rollout_servers:
        return None
    if tools:
        raise ValueError(
            "tools cannot be used with rollout_servers: a conversation with tools has several turns, and a request is one "
            "completion. Use use_vllm=True with vllm_mode='colocate'."
        )
    sampler = Sampler(args.rollout_servers, args.teacher_timeout)
    try:
        sampler.check_context(max_tokens)
    except RolloutError:
        sampler.close()
        raise
    return sampler


def make_engine(trainer: Any) -> Any:
    """What the trainer rolls out with, once it is made. Called on all ranks."""
    if trainer.run.sampler is not None:
        return ServerEngine(trainer, trainer.run.sampler)
    return TRLEngine(trainer, ends=set(ends_of(trainer)))


class Flight:
    """The completions of a batch of prompts, under way.

    They are asked for as soon as this is made. Everything here is of this rank alone, errors as well: to raise one on all
    ranks, wrap what reads `samples` into [`camopd.errors.on_all_ranks`], outside of which nothing collective is needed.
    """

    def __init__(
        self, count: int, prompts_cut: int, stops: StopRequests | None, finished: Callable[[Sample], None] | None
    ):
        """
        Args:
            count: samples to come.
            prompts_cut: prompts of them that were longer than allowed.
            stops: what ends a wait.
            finished: called once with each sample as it is finished, in the thread of the requests, which it must not keep.
                An error of it ends the flight.
        """
        self.count, self.prompts_cut = count, prompts_cut
        self._stops, self._callback = stops, finished
        self._finished: list[Sample] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition(threading.RLock())
        self._futures: list[Future[Completion]] = []

    def samples(self) -> Iterator[Sample]:
        """The samples as they finish, each once; again from the start when called again.

        Raises `RolloutError` where a completion cannot be had, a signal has asked the run to stop, or `cancel` was called.
        """
        for place in range(self.count):
            yield self._sample(place)

    def done(self) -> bool:
        """Whether all samples are there, or never will be."""
        with self._changed:
            return self._error is not None or len(self._finished) == self.count

    def wait(self) -> None:
        """Until all samples are there. Raises as `samples`."""
        for _ in self.samples():
            pass

    def settle(self) -> bool:
        """Wait until `done` or a signal, and raise nothing. Gives whether all samples are there."""
        with self._changed:
            while not self.done() and not (self._stops is not None and self._stops.heard):
                self._changed.wait(POLL)
            return len(self._finished) == self.count

    def cancel(self) -> None:
        """Give up what is not finished; the servers stop writing it. Does nothing where all is."""
        self._fail(RolloutError("the rollouts under way were given up."))

    def _sample(self, place: int) -> Sample:
        with self._changed:
            while len(self._finished) <= place and self._error is None:
                if self._stops is not None and self._stops.heard:
                    self._fail(RolloutError(STOPPED))
                    break
                self._changed.wait(POLL)
            if len(self._finished) > place:
                return self._finished[place]
            assert self._error is not None
            raise self._error

    def _add(self, make: Callable[[Completion], Sample], future: Future[Completion]) -> None:
        """In the thread of the requests, which is told of nothing that is raised here."""
        try:
            completion = future.result()
            with self._changed:
                if self._error is None:
                    sample = make(completion)
                    if self._callback is not None:
                        self._callback(sample)
                    self._finished.append(sample)
                    self._changed.notify_all()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self.done():
                return
            self._error = error
            self._changed.notify_all()
        for future in self._futures:
            future.cancel()

    def _start(self, futures: Sequence[tuple[Future[Completion], Callable[[Completion], Sample]]]) -> None:
        self._futures = [future for future, _ in futures]
        for future, make in futures:
            future.add_done_callback(partial(self._add, make))


class ServerEngine:
    """Rollouts by vLLM servers that hold the whole student each; `ahead.Rollouts` makes those of a step of them.

    `sync` gives the servers the student's weights, `start` asks for completions by them and returns at once.
    """

    def __init__(self, trainer: Any, sampler: Sampler):
        """Called on all ranks, with a `sampler` that is connected.

        Raises `ValueError` for an adapter that servers cannot apply; warns of a server of another type than the student's.
        """
        student = trainer.accelerator.unwrap_model(trainer.model)
        check_adapter(student)
        args = trainer.args
        self._trainer, self._sampler = trainer, sampler
        self._ends = ends_of(trainer)
        self._vocab_size = head_size(student)
        self._weights = WeightsFolder(args.output_dir, args.process_index == 0)
        self._versions: list[Version] = []  # that are on the disk, the newest last
        self._under_way: Callable[[], Any] = lambda: None
        self._flights: list[Flight] = []
        trainer.add_callback(_WeightsGo(self))
        if args.process_index == 0:
            dtype = compute_dtype(trainer.accelerator, student)
            for url, theirs in sampler.types().items():
                warn_of_type(url, theirs, dtype)

    def log_lengths(self, samples: Sequence[Sample]) -> None:
        """File the numbers of a rollout that TRL files as it generates, for the parent's log. Called on all ranks."""
        trainer = self._trainer
        training = trainer.model.training
        found = gather_object([(sample.prompt_len, sample.length, sample.truncated) for sample in samples])
        if training:
            trainer.state.num_input_tokens_seen += sum(prompt + length for prompt, length, _ in found)
        logged = trainer._metrics["train" if training else "eval"]
        logged["num_tokens"] = [trainer.state.num_input_tokens_seen]
        logged["completions/clipped_ratio"].append(sum(cut for *_, cut in found) / len(found))
        ended = [length for _, length, cut in found if not cut] or [0]
        for name, lengths in (("", [length for _, length, _ in found]), ("terminated_", ended)):
            logged[f"completions/mean_{name}length"].append(sum(lengths) / len(lengths))
            logged[f"completions/min_{name}length"].append(float(min(lengths)))
            logged[f"completions/max_{name}length"].append(float(max(lengths)))

    def sync(self, under_way: Any) -> None:
        """Give all servers the student's weights, unless these were given last for the same object.

        Called on all ranks, once for each step and each evaluation (see `vllm_rollouts.VLLMTurns`). Waits for completions
        under way, unless it is an adapter that is given: servers keep those of a version and the one before apart.

        Args:
            under_way: the step or evaluation for which they are; it is not kept alive.

        Raises `RolloutError` and `CaMOPDError` on all ranks.
        """
        if self._under_way() is under_way:
            return
        version = self._weights.write(self._trainer)
        with on_all_ranks(gather_object):
            for flight in self._still_under_way() if not version.is_adapter else ():
                flight.wait()
        self._sampler.hold()
        holders: dict[str, str] = {}
        try:
            gather_object([None])  # no rank sends the weights of before to a server that has come back
            with on_all_ranks(gather_object):
                if self._trainer.args.process_index == 0:
                    with phase(f"{current().what}: weights of the student for {self._sampler.where}"):
                        holders = self._wait(self._sampler.give(version))
        except BaseException:
            self._sampler.release()
            raise
        self._sampler.adopt(version, gather_object([holders])[0])
        self._under_way = weakref.ref(under_way)
        self._forget(version)

    def start(
        self,
        rows: Sequence[dict[str, Any]],
        max_tokens: int,
        words: tuple[Any, ...],
        finished: Callable[[Sample], None] | None = None,
    ) -> Flight:
        """Ask for a completion of each row, longest prompts first, by the weights that were given last.

        Called on all ranks. The same rows with the same words give the same completions, up to how the servers round,
        whatever the number of ranks and servers and whoever else asks them.

        Args:
            rows: with `branch` and `prompt`, and where they have them `position` and `category`.
            max_tokens: of a completion.
            words: which draw of these rows it is, as ("step", 12): with the run's seed, a row's branch and its position
                they are what is drawn with.
            finished: see [`Flight`].

        Raises on all ranks what `PromptReader.ids` raises, and `RolloutError` where no server is left.
        """
        trainer = self._trainer
        with on_all_ranks(gather_object):
            read = [named(read_row, row) for row in rows]  # held-out rows come as they lie in their dataset
            prompt_ids = trainer.reader.ids(read)
            for_teachers = trainer.teacher_prompts.ids(read, prompt_ids)
            self._wait(self._sampler.begin())
        limit = trainer.args.max_prompt_length
        prompts_cut = sum(len(ids) > limit for ids in prompt_ids)
        flight = Flight(len(rows), prompts_cut, self._stops, finished)
        sampling = Sampling(max_tokens, frozenset(self._ends), self._vocab_size)
        asked = []
        for place in sorted(range(len(rows)), key=lambda place: -len(prompt_ids[place])):
            prompt, row = prompt_ids[place][-limit:], rows[place]
            position = row.get("position", place)
            seed = seed_of(trainer.args.seed, *words, row["branch"], position)
            make = self._maker(row, position, prompt, for_teachers[place])
            asked.append((self._sampler.submit(prompt, seed, sampling), make))
        flight._start(asked)
        self._flights = [*self._still_under_way(), flight]
        return flight

    def waiting(self) -> AbstractContextManager[None]:
        """Inside, the watchdog says that it is the servers who are waited for."""
        return phase(f"{current().what}: {ROLLOUT_SERVERS} ({self._sampler.where})")

    @property
    def _stops(self) -> StopRequests | None:
        """What ends a wait. An evaluation that decides something is finished, see `trainer.prediction_step`."""
        trainer = self._trainer
        return trainer.stops if trainer.model.training or trainer.args.metric_for_best_model is None else None

    def _wait(self, future: Future[T]) -> T:
        """What a request gives. Raises `RolloutError` after a signal: servers may read weights for a quarter of an hour."""
        while not wait([future], timeout=POLL).done:
            if self._stops is not None and self._stops.heard:
                future.cancel()
                raise RolloutError(STOPPED)
        return future.result()

    def _still_under_way(self) -> list[Flight]:
        return [flight for flight in self._flights if not flight.done()]

    def _maker(
        self, row: dict[str, Any], position: int, prompt: list[int], for_teacher: list[int] | None
    ) -> Callable[[Completion], Sample]:
        def make(completion: Completion) -> Sample:
            count = len(completion.token_ids)
            return Sample(
                branch=row["branch"],
                position=position,
                token_ids=prompt + completion.token_ids,
                prompt_len=len(prompt),
                mask=torch.ones(count, dtype=torch.bool),
                length=count,
                truncated=completion.token_ids[-1] not in self._ends,
                category=row.get("category"),
                rollout_logps=torch.tensor(completion.logps),
                server=completion.url,
                teacher_prompt=for_teacher,
            )

        return make

    def _forget(self, version: Version) -> None:
        """Let go of older weights. Of adapters the one before may have completions under way."""
        self._versions.append(version)
        keep = 2 if version.is_adapter else 1
        for old in self._versions[:-keep]:
            if self._trainer.args.process_index == 0:
                self._sampler.drop(old)
            self._weights.drop(old)
        self._versions = self._versions[-keep:]

    def end(self) -> None:
        """Remove the weights from the disk, and adapters from the servers; the next `sync` gives new ones."""
        if self._trainer.args.process_index == 0:
            for version in self._versions:
                self._sampler.drop(version)
        self._weights.remove()
        self._versions, self._under_way = [], lambda: None


class _WeightsGo(TrainerCallback):
    """Calls `ServerEngine.end` at the end of training."""

    def __init__(self, engine: ServerEngine):
        self._engine = engine

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """As transformers has it."""
        self._engine.end()


def seed_of(*words: Any) -> int:
    """A number from 0 to 2^63 - 1 for what is named by words and numbers: another one for another name."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # vLLM takes signed numbers of 64 bits
