"""From the kept samples of an optimizer step to the micro-batches that this rank trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from . import metrics
from .balance import attention_cost, balance_micro_batches
from .config import CaMOPDConfig
from .errors import CaMOPDError
from .forward import Forward
from .samples import LossTerms, MicroBatch, Sample, SampleSummary
from .step import REPORT, Step


T = TypeVar("T")


class Batcher:
    """Makes the micro-batches of an optimizer step, on every rank as many."""

    def __init__(self, args: CaMOPDConfig, student: Forward, dummy: int, gather: Callable[[list[Any]], list[Any]]):
        """`dummy` is a token of the vocabulary, of which rows without a sample are made."""
        self.args, self.student, self.dummy, self._gather = args, student, dummy, gather
        self._attention_cost = attention_cost(student.model)

    def micro_batches(self, step: Step) -> deque[MicroBatch | None]:
        """An entry per micro-step for the kept samples of a step, of which `None` costs nothing; adds metrics of the plan.

        The work stands in the *last* micro-steps, because gradients are exchanged in the very last one. Every rank does
        as many as every other, with dummies of weight 0 where it has no samples: sharded models need every rank in every
        forward and backward.
        """
        args = self.args
        assert args.gradient_accumulation_steps is not None
        kept = [summary for summary in step.summaries if summary.position in step.kept]
        lengths = [summary.num_ids for summary in kept]
        ranks = self._plan(kept, lengths)
        step.metrics.update(metrics.of_micro_batches(ranks, lengths, self.student.packs))
        columns = self._columns(step)
        mine = {sample.position: sample for sample in step.samples}
        if args.rebalance and args.world_size > 1:
            to = {index: rank for rank, batches in enumerate(ranks) for batch in batches for index in batch}
            arrived = rebalance(
                mine, kept, [to[index] for index in range(len(kept))], args.process_index, columns, args.device
            )
            mine = {sample.position: sample for sample in arrived}
        batches = [[mine[kept[index].position] for index in batch] for batch in ranks[args.process_index]]
        found = [self._micro_batch(batch, columns, step.terms) for batch in batches]
        return deque(in_micro_steps(found, args.gradient_accumulation_steps))

    def _micro_batch(self, batch: Sequence[Sample], columns: Sequence[str], terms: LossTerms) -> MicroBatch:
        return MicroBatch.of(batch, columns, terms) if batch else MicroBatch.dummy(self.dummy, terms)

    def of_this_rank(self, samples: Sequence[Sample], step: Step) -> list[tuple[list[Sample], MicroBatch]]:
        """Micro-batches of some of this rank's own samples of a step, kept or not, on every rank as many."""
        (places,) = self._balance([len(sample.token_ids) for sample in samples], 1)
        batches = [[samples[place] for place in batch] for batch in places]
        batches += [[]] * (max(self._gather([len(batches)])) - len(batches))
        columns = self._columns(step)
        return [(batch, self._micro_batch(batch, columns, step.terms)) for batch in batches]

    def _plan(self, kept: Sequence[SampleSummary], lengths: Sequence[int]) -> list[list[list[int]]]:
        """`[rank][micro-batch]` -> indices into `kept`."""
        args = self.args
        if args.rebalance:
            return self._balance(lengths, args.world_size)
        ranks = []
        for rank in range(args.world_size):  # each keeps its own
            own = [index for index, summary in enumerate(kept) if summary.owner == rank]
            (batches,) = self._balance([lengths[index] for index in own], 1)
            ranks.append([[own[place] for place in batch] for batch in batches])
        busy = max(map(len, ranks))
        return [batches + [[]] * (busy - len(batches)) for batches in ranks]

    def _balance(self, lengths: Sequence[int], num_ranks: int) -> list[list[list[int]]]:
        args = self.args
        size: int | None = args.per_device_train_batch_size
        max_tokens = args.max_tokens_per_micro_batch
        if max_tokens is None:
            max_tokens = args.per_device_train_batch_size * (args.max_prompt_length + args.longest_completion)
        else:
            size = None
        packed = bool(self.student.packed)
        return balance_micro_batches(lengths, num_ranks, size, max_tokens, packed, self._attention_cost)

    def _columns(self, step: Step) -> list[str]:
        """What of a sample the loss reads: its gaps, or, where these were measured with the engine's log-probs, what gaps
        to those of its own forward are made of; and what all samples of all ranks have or all lack."""
        has = [
            name
            for name in ("rollout_logps", "token_weights")
            if any(getattr(sample, name) is not None for sample in step.samples)
        ]
        return ["teacher_logps" if step.engine_logps else "gaps", *has]


def in_micro_steps(batches: Sequence[T], micro_steps: int) -> list[T | None]:
    """Micro-batches as the last of the micro-steps, `None` before them. Raises `CaMOPDError` where they do not fit."""
    if len(batches) > micro_steps:
        raise CaMOPDError(
            f"{len(batches)} micro-batches do not fit into the {micro_steps} micro-steps of an optimizer step "
            f"(gradient_accumulation_steps): some kept samples would not be trained. {REPORT}"
        )
    return [*[None] * (micro_steps - len(batches)), *batches]


def rebalance(
    mine: dict[int, Sample],
    kept: Sequence[SampleSummary],
    to: Sequence[int],
    rank: int,
    columns: Sequence[str],
    device: torch.device,
) -> list[Sample]:
    """Send each kept sample to the rank it is to be trained on. Only token ids, the mask and what the loss reads travel.

    Args:
        mine: this rank's samples by position.
        kept: the kept samples of all ranks, in the same order on every rank.
        to: rank of each of them.
        rank: this one.
        columns: names of the (T,) fields that travel.
        device: where the process group's tensors live.

    Returns the samples that have come to this rank, with nothing else filled in.
    """
    leaving = [(summary, target) for summary, target in zip(kept, to, strict=True) if summary.owner == rank]
    arriving = [summary for summary, target in zip(kept, to, strict=True) if target == rank]
    world = dist.get_world_size()
    tokens: list[list[torch.Tensor]] = [[] for _ in range(world)]
    numbers: list[list[torch.Tensor]] = [[] for _ in range(world)]
    for summary, target in leaving:
        sample = mine[summary.position]
        tokens[target] += [torch.tensor(sample.token_ids, dtype=torch.int32), sample.mask.int()]
        numbers[target] += [getattr(sample, name) for name in columns]

    from_rank = [[summary for summary in arriving if summary.owner == source] for source in range(world)]
    token_sizes = [sum(2 * each.num_ids - each.prompt_len for each in group) for group in from_rank]
    number_sizes = [len(columns) * sum(each.num_ids - each.prompt_len for each in group) for group in from_rank]
    all_tokens = _all_to_all(tokens, token_sizes, torch.int32, device)
    all_numbers = _all_to_all(numbers, number_sizes, torch.float32, device)

    found: dict[int, Sample] = {}
    for group, from_tokens, from_numbers in zip(from_rank, all_tokens, all_numbers, strict=True):
        pieces = iter(from_tokens.split([n for each in group for n in (each.num_ids, each.num_ids - each.prompt_len)]))
        parts = iter(from_numbers.split([each.num_ids - each.prompt_len for each in group for _ in columns]))
        for each in group:
            found[each.position] = Sample(
                branch=each.branch, position=each.position, prompt_len=each.prompt_len, length=each.length,
                truncated=each.truncated, token_ids=next(pieces).tolist(), mask=next(pieces).bool(),
                **{name: next(parts) for name in columns},
            )  # fmt: skip
    return [found[each.position] for each in arriving]


def _all_to_all(
    outgoing: list[list[torch.Tensor]], sizes: list[int], dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """What the other ranks have for this one, a flat tensor per rank, of `sizes` items."""
    mine = [torch.cat(parts).to(dtype) if parts else torch.zeros(0, dtype=dtype) for parts in outgoing]
    received = torch.empty(sum(sizes), dtype=dtype, device=device)
    dist.all_to_all_single(
        received, torch.cat(mine).to(device), output_split_sizes=sizes, input_split_sizes=[len(part) for part in mine]
    )
    return list(received.cpu().split(sizes))
