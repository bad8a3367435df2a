"""Rollouts: what the engines drew, with the log-probs they drew it with, and how it is kept on disk.

TRL's engines give a list of tokens per prompt and throw the log-probs away; w_t of Eq. 2 is the ratio to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from trl.extras.profiling import profiling_context

from .generation import neutral_generation
from .logprobs import SampledLogps
from .messages import read_row
from .prompts import named
from .samples import Sample


class Turn(NamedTuple):
    """One request to an engine: token ids of its prompt and completion, and a log-prob per token of the latter."""

    prompt: list[int]
    completion: list[int]
    logps: list[float]


class RolloutEngine(Protocol):
    """Prompts in, samples out, one by one as they finish."""

    def samples(self, rows: Sequence[dict[str, Any]], max_tokens: int) -> Iterator[Sample]:
        """A sample of each row, in any order, with a completion of at most `max_tokens`.

        Rows have `branch` and `prompt`, and where they have them `position` and `category`. Called on all ranks.
        """
        ...


class TRLEngine:
    """The trainer's own generation, by transformers or vLLM. It gives all samples at the end.

    While it generates, the trainer tells it what was drawn: the log-probs do not come up through TRL.
    """

    def __init__(self, trainer: Any, ends: Collection[int]) -> None:
        """`ends`: tokens that end a completion."""
        self._trainer, self._ends = trainer, ends
        self.rows: list[dict[str, Any]] = []  # whose prompts are to be tokenized, with what they have beside these
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
        rows = self.rows  # of `samples`: what a row has beside its prompt does not come down to here
        if [row["prompt"] for row in rows] != prompts:
            rows = [named(read_row, {"prompt": prompt}) for prompt in prompts]
        prompt_ids, limit = self._trainer.reader.ids(rows), self._trainer.args.max_prompt_length
        self.start(prompts_cut=sum(len(ids) > limit for ids in prompt_ids))
        return [ids[-limit:] for ids in prompt_ids]

    def turn(self, prompt_ids: list[list[int]], generate: Callable[[], list[list[int]]]) -> list[list[int]]:
        """Completions of one batch of requests, by vLLM or else the parent trainer's `generate`."""
        trainer = self._trainer
        if trainer.use_vllm:  # every request names its sampling parameters, so that none is the server's default
            completion_ids, logps = generate_with_vllm(trainer, prompt_ids)
            self.add(prompt_ids, completion_ids, logps)
        else:
            model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
            wanted = trainer.args.student_logps == "engine"
            with neutral_generation(model), recorded(model, wanted, trainer.stops.ends_generation) as rows:
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
        self.rows = [named(read_row, row) for row in rows]  # held-out rows come as they lie in their dataset
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


def generate_with_vllm(trainer: Any, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """The parent trainer's vLLM branch, keeping the sampler's log-probs, which it throws away.

    Returns the completions and the sampled token's log-prob at each of their positions. vLLM's NaN arrives as `None`, and
    is NaN again: no weight for this token.
    """
    if trainer.state.global_step != trainer._last_loaded_step:
        with profiling_context(trainer, "sync_weights"):
            trainer.vllm_generation.sync_weights()
        trainer._last_loaded_step = trainer.state.global_step
    _, completion_ids, logprobs, _ = trainer.vllm_generation.generate(
        prompts=prompt_ids, images=None, num_generations=1, profiler=profiling_context(trainer, "vLLM.generate")
    )
    return completion_ids, [[math.nan if token[0] is None else token[0] for token in row] for row in logprobs]


@contextmanager
def recorded(model: Any, wanted: bool, stop: Callable[..., Tensor]) -> Iterator[Callable[[], list[list[float]]]]:
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
        sequences = generate(*args, stopping_criteria=[stop], **processors, **kwargs)
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


def save_rollouts(samples: Sequence[Sample], prompts_cut: int, path: Path) -> None:
    """Write what generation made, without scores, as safetensors."""
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
    branch = json.dumps([sample.branch for sample in samples])
    save_file(tensors, path, metadata={"branch": branch, "prompts_cut": str(prompts_cut)})


def load_rollouts(path: Path, rows: Sequence[dict[str, Any]]) -> tuple[list[Sample], int] | None:
    """The samples of exactly these rows (branch and position), and how many prompts were cut; `None` where the file is not
    there or not theirs."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            branch = json.loads(file.metadata()["branch"])
            prompts_cut = int(file.metadata()["prompts_cut"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, KeyError, TypeError, ValueError):  # cut short on a full disk: roll out again
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
        )
        for place, row in enumerate(rows)
    ]
    return samples, prompts_cut


def rng_state() -> list[Tensor]:
    """What rollouts are drawn with: the states of torch's random numbers on this process, CPU first."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_rng_state(states: Sequence[Tensor]) -> None:
    """Draw on from what `rng_state` gave."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
