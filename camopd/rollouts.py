"""Rollouts: what the engines drew, with the log-probs they drew it with, and how it is kept on disk.

TRL's engines give a list of tokens per prompt and throw the log-probs away; w_t of Eq. 2 is the ratio to them.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import on_all_ranks
from .generation import neutral_generation
from .logprobs import SampledLogps
from .messages import read_row
from .prompts import named
from .samples import Sample
from .vllm_rollouts import VLLMTurns


logger = logging.getLogger(__name__)


class Turn(NamedTuple):
    """One request to an engine: token ids of its prompt and completion, and a log-prob per token of the latter."""

    prompt: list[int]
    completion: list[int]
    logps: list[float]


class RolloutEngine(Protocol):
    """Prompts in, samples out. What gives them while it writes others is a [`StreamingEngine`]."""

    prompts_cut: int  # of the rows of the last `samples`, those whose prompts were longer than allowed

    def samples(self, rows: Sequence[dict[str, Any]], max_tokens: int) -> Iterator[Sample]:
        """A sample of each row, in any order, with a completion of at most `max_tokens`.

        Rows have `branch` and `prompt`, and where they have them `position` and `category`. Called on all ranks.
        """
        ...


@runtime_checkable
class StreamingEngine(Protocol):
    """Prompts in, and each sample as it is finished, while others are written: teachers score it by then, and with
    `rollout_lag` all are begun a step before. `rollout_servers.ServerEngine` is one."""

    def sync(self, under_way: Any) -> None:
        """Draw by the student's weights of now, for this step or evaluation. Called on all ranks, as the others are."""
        ...

    def start(
        self,
        rows: Sequence[dict[str, Any]],
        max_tokens: int,
        words: tuple[Any, ...],
        finished: Callable[[Sample], None] | None = None,
    ) -> Any:
        """Begin, and return at once something that has the methods of `rollout_servers.Flight`. Rows are as in
        `RolloutEngine.samples`; equal rows and `words` give equal completions; `finished` is called with each sample."""
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """Inside, the watchdog says what is waited for."""
        ...

    def log_lengths(self, samples: Sequence[Sample]) -> None:
        """File the numbers of a rollout that TRL files as it generates, for the parent's log."""
        ...


class TRLEngine:
    """The trainer's own generation, by transformers or vLLM. It gives all samples at the end.

    While it generates, the trainer tells it what was drawn: the log-probs do not come up through TRL.
    """

    def __init__(self, trainer: Any, ends: Collection[int]) -> None:
        """`ends`: tokens that end a completion."""
        self._trainer, self._ends, self._vllm = trainer, ends, VLLMTurns(trainer)
        self.rows: list[dict[str, Any]] = []  # that are rolled out, with what they have beside their prompts
        self.prompt_ids: list[list[int]] = []  # of these prompts, not cut
        self.start(0)

    def start(self, prompts_cut: int) -> None:
        """Forget what was; `prompts_cut` of the prompts to come are longer than allowed."""
        self.prompts_cut = prompts_cut
        self._turns: list[Turn] = []
        self._empty: set[int] | None = None  # rows without a token; `None` before the first turn

    def add(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], logps: Sequence[list[float]]
    ) -> None:
        """Take in one batch of requests; without `logps`, an engine whose log-probs are not asked for."""
        if not logps:
            return
        self._turns += [
            Turn(list(prompt), list(completion), row[: len(completion)])
            for prompt, completion, row in zip(prompts, completions, logps, strict=True)
        ]

    def tokenize(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Ids of the prompts, the last `max_prompt_length` of each: the generation prompt is among them."""
        prompt_ids, limit = self.prompt_ids, self._trainer.args.max_prompt_length
        if [
            row["prompt"] for row in self.rows
        ] != prompts:  # not those of `samples`, whose rows have more than a prompt
            prompt_ids = self._trainer.reader.ids([named(read_row, {"prompt": prompt}) for prompt in prompts])
        self.start(prompts_cut=sum(len(ids) > limit for ids in prompt_ids))
        return [ids[-limit:] for ids in prompt_ids]

    def turn(self, prompt_ids: list[list[int]], generate: Callable[[], list[list[int]]]) -> list[list[int]]:
        """Completions of one batch of requests, by vLLM or else the parent trainer's `generate`."""
        trainer = self._trainer
        if trainer.use_vllm:  # every request names its sampling parameters, so that none is the server's default
            completion_ids, logps = self._vllm.generate(prompt_ids)
            self.add(prompt_ids, completion_ids, logps)
        else:
            model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
            wanted = trainer.args.student_logps != "trainer"
            # An evaluation that decides something is finished, see `trainer.prediction_step`.
            cut_short = trainer.model.training or trainer.args.metric_for_best_model is None
            stop = trainer.stops.ends_generation if cut_short else None
            with neutral_generation(model), recorded(model, wanted, stop) as rows:
                completion_ids = generate()
            self.add(prompt_ids, completion_ids, rows())
        return self.without_empty(completion_ids, trainer._tokenizer.eos_token_id)

    def without_empty(self, completions: list[list[int]], end: int) -> list[list[int]]:
        """Completions with an `end` token in place of none, until `samples` takes it out again: the parent reads the last
        token of each. Only the first turn of a conversation can be a row's whole completion."""
        if self._empty is not None:
            return completions
        self._empty = {row for row, ids in enumerate(completions) if not ids}
        return [ids or [end] for ids in completions]

    def samples(self, rows: Sequence[dict[str, Any]], max_tokens: int) -> Iterator[Sample]:
        """See [`RolloutEngine.samples`]."""
        trainer = self._trainer
        trainer.max_completion_length = trainer.generation_config.max_new_tokens = max_tokens
        trainer.generation_kwargs["max_new_tokens"] = max_tokens
        if trainer.use_vllm:
            trainer.vllm_generation.max_completion_length = max_tokens
        with on_all_ranks(gather_object):
            self.rows = [named(read_row, row) for row in rows]  # held-out rows come as they lie in their dataset
            self.prompt_ids = trainer.reader.ids(self.rows)
            for_teachers = trainer.teacher_prompts.ids(self.rows, self.prompt_ids)
        # Of tool conversations the masks are 0 on tokens of a completion that a tool wrote; else there are none.
        prompts, completions, tool_masks, *_ = trainer._generate([row["prompt"] for row in self.rows])
        for place, row in enumerate(rows):
            completion = [] if place in (self._empty or ()) else list(completions[place])
            mask = torch.ones(len(completion), dtype=torch.bool)
            if tool_masks is not None:
                mask = torch.tensor(tool_masks[place][: len(completion)], dtype=torch.bool)
            prompt = list(prompts[place])
            logps = logps_of_turns(self._turns, place, len(rows), prompt, completion) if self._turns else None
            yield Sample(
                branch=row["branch"],
                position=row.get("position", place),
                token_ids=prompt + completion,
                prompt_len=len(prompt),
                mask=mask,
                length=int(mask.sum()),
                truncated=bool(completion) and completion[-1] not in self._ends,
                category=row.get("category"),
                rollout_logps=logps,
                teacher_prompt=for_teachers[place],
            )


def logps_of_turns(turns: Sequence[Turn], row: int, num_rows: int, prompt: list[int], completion: list[int]) -> Tensor:
    """The sampler's log-prob of each completion token of a row, NaN on tokens it did not sample (tool results).

    The first turn has the rows in order. Later turns of a tool conversation hold some of the rows, whose prompt is then
    the conversation so far: a turn belongs to the row that its prompt and completion are a piece of.
    """
    logps = torch.full((len(completion),), math.nan)
    sequence = prompt + completion
    for index, turn in enumerate(turns):
        if index < num_rows and index != row:
            continue
        start = len(turn.prompt)
        end = min(start + len(turn.completion), len(sequence))  # the parent cuts the last turn at the length limit
        if sequence[:start] == turn.prompt and sequence[start:end] == turn.completion[: end - start]:
            logps[start - len(prompt) : end - len(prompt)] = torch.tensor(turn.logps[: end - start])
    return logps


@contextmanager
def recorded(
    model: Any, wanted: bool, stop: Callable[..., Tensor] | None
) -> Iterator[Callable[[], list[list[float]]]]:
    """A call of `model.generate` inside keeps the log-prob of each token as it is drawn, where that is `wanted`, and ends
    by the stopping criterion `stop` as well.

    Yields a function that gives a row of them per completion, or none. The parent of the trainer passes neither logits
    processors nor stopping criteria on.
    """
    recorder = SampledLogps()
    generate = model.generate
    own = vars(model).get("generate")  # transformers wraps it under FSDP2

    def generate_and_record(*args: Any, **kwargs: Any) -> Any:
        processors = {"logits_processor": [recorder]} if wanted else {}
        sequences = generate(*args, stopping_criteria=[stop] if stop else [], **processors, **kwargs)
        if wanted:
            recorder.finish(sequences)
        return sequences

    model.generate = generate_and_record
    try:
        yield recorder.rows
    finally:
        del model.generate  # of the object; that of its class is there again
        if own is not None:
            model.generate = own


def save_rollouts(samples: Sequence[Sample], prompts_cut: int, path: Path, scored: bool = False) -> None:
    """Write what generation made as safetensors; with `scored` also what scoring has found of all the samples."""
    tensors = {
        "token_ids": torch.tensor([token for sample in samples for token in sample.token_ids], dtype=torch.int32),
        "lengths": torch.tensor([len(sample.token_ids) for sample in samples]),
        "prompt_len": torch.tensor([sample.prompt_len for sample in samples]),
        "position": torch.tensor([sample.position for sample in samples]),
        "truncated": torch.tensor([sample.truncated for sample in samples]),
        "sampled": torch.tensor([sample.length for sample in samples]),
        "mask": torch.cat([torch.zeros(0, dtype=torch.bool), *(sample.mask for sample in samples)]),
    }
    logps = [sample.rollout_logps for sample in samples if sample.rollout_logps is not None]
    if logps:
        tensors["rollout_logps"] = torch.cat(logps)
    for name in _SCORED if scored else ():
        found = [getattr(sample, name) for sample in samples]
        if all(len(row) == len(sample.mask) for row, sample in zip(found, samples, strict=True)):
            tensors[name] = torch.cat(found)
    branch = json.dumps([sample.branch for sample in samples])
    lag = str(max((sample.lag for sample in samples), default=0))
    save_file(tensors, path, metadata={"branch": branch, "prompts_cut": str(prompts_cut), "lag": lag})


def load_rollouts(path: Path, rows: Sequence[dict[str, Any]]) -> tuple[list[Sample], int] | None:
    """The samples of exactly these rows (branch and position), and how many prompts were cut; `None` where the file is not
    there or not theirs, or with a warning where it is damaged: they are rolled out again then."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            branch = json.loads(file.metadata()["branch"])
            prompts_cut, lag = int(file.metadata()["prompts_cut"]), int(file.metadata().get("lag", 0))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        _check_saved(tensors, branch, prompts_cut)
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, RuntimeError) as error:
        # Cut short on a full disk, or changed.
        logger.warning("%s cannot be used (%s): the step is rolled out again", path, str(error)[:200])
        return None
    position = tensors["position"].tolist()
    if [(row["branch"], row["position"]) for row in rows] != list(zip(branch, position, strict=True)):
        return None
    lengths, prompt_len = tensors["lengths"].tolist(), tensors["prompt_len"].tolist()
    sizes = [length - prompt for length, prompt in zip(lengths, prompt_len, strict=True)]
    token_ids, masks = tensors["token_ids"].split(lengths), tensors["mask"].split(sizes)
    logps: Sequence[Tensor | None] = [None] * len(rows)
    if "rollout_logps" in tensors:
        logps = tensors["rollout_logps"].split(sizes)
    samples = [
        Sample(
            branch=row["branch"],
            position=row["position"],
            token_ids=token_ids[place].tolist(),
            prompt_len=prompt_len[place],
            mask=masks[place],
            length=int(tensors["sampled"][place]),
            truncated=bool(tensors["truncated"][place]),
            category=row.get("category"),
            rollout_logps=logps[place],
            lag=lag,
        )
        for place, row in enumerate(rows)
    ]
    return samples, prompts_cut


# Tensors of the file: their type, and whether they have a number for each sample or for each of its tokens.
_SAVED = {
    "lengths": (torch.int64, "sample"), "prompt_len": (torch.int64, "sample"), "position": (torch.int64, "sample"),
    "sampled": (torch.int64, "sample"), "truncated": (torch.bool, "sample"), "token_ids": (torch.int32, "token"),
    "mask": (torch.bool, "completion token"), "rollout_logps": (torch.float32, "completion token"),
}  # fmt: skip
_SCORED = ("teacher_logps", "student_logps", "gaps")  # which may be there, float32 like "rollout_logps"
_SAVED |= dict.fromkeys(_SCORED, _SAVED["rollout_logps"])


def _check_saved(tensors: dict[str, Tensor], branch: Any, prompts_cut: int) -> None:
    """Raise `ValueError`, or `KeyError` for a tensor that is not there, unless `save_rollouts` may have written it."""
    if not isinstance(branch, list) or not all(isinstance(name, str) for name in branch):
        raise ValueError("its branches are not a list of names")
    lengths, prompt_len = tensors["lengths"].tolist(), tensors["prompt_len"].tolist()
    count = {"sample": len(branch), "token": 0, "completion token": 0}
    if tensors["lengths"].shape == tensors["prompt_len"].shape == (len(branch),):
        if not all(1 <= prompt <= length for prompt, length in zip(prompt_len, lengths, strict=True)):
            raise ValueError("a prompt is longer than its sequence, or empty")
        count["token"] = sum(lengths)
        count["completion token"] = count["token"] - sum(prompt_len)
    if missing := set(_SAVED) - set(tensors) - {"rollout_logps", *_SCORED}:
        raise ValueError(f"{min(missing)} is missing")
    for name, tensor in tensors.items():
        dtype, each = _SAVED.get(name, (None, "sample"))
        if tensor.dtype != dtype or tensor.shape != (count[each],):
            raise ValueError(f"{name} has {tuple(tensor.shape)} numbers of type {tensor.dtype}")
    if not 0 <= prompts_cut <= len(branch) or (tensors["token_ids"] < 0).any() or (tensors["position"] < 0).any():
        raise ValueError("a number is out of its range")
    sizes = [length - prompt for length, prompt in zip(lengths, prompt_len, strict=True)]
    for mask, sampled in zip(tensors["mask"].split(sizes), tensors["sampled"].tolist(), strict=True):
        if len(mask) and not mask[0]:
            raise ValueError("a completion begins with a token that the student has not sampled")
        if not int(mask.sum()) <= sampled:
            raise ValueError("more tokens are marked as sampled than there were")
    logps = tensors.get("rollout_logps")  # NaN where the engine gave none
    if logps is not None and logps.isinf().any():
        raise ValueError("a log-prob is infinite")


def rng_state() -> list[Tensor]:
    """What rollouts are drawn with: the states of torch's random numbers on this process, CPU first."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_rng_state(states: Sequence[Tensor]) -> None:
    """Draw on from what `rng_state` gave."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
