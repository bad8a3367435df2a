"""After selection: spread the kept samples over ranks and micro-batches, so that all have the same work and little padding.

Selection keeps other samples on every rank, and completions differ in length by orders of magnitude. Without an exchange
every rank runs as many micro-batches as the fullest one, and pads each to its longest sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from .rollouts import Rollouts


class Kept(NamedTuple):
    """One kept sample, as every rank knows it."""

    position: int  # in the step's global batch
    branch: str
    prompt_len: int
    length: int  # prompt + completion
    owner: int  # the rank that rolled it out


def exchange(rollouts: Rollouts, kept: Sequence[Kept], to: Sequence[int], rank: int, device: torch.device) -> Rollouts:
    """Send each kept sample to the rank it is to be trained on; only token ids, the mask and log-probs travel.

    Args:
        rollouts: this rank's, scored.
        kept: the kept samples of all ranks, in the same order on every rank.
        to: rank of each of them.
        rank: this one.
        device: where the process group's tensors live.

    Returns the samples that have come to this rank, without entropy.
    """
    row_of = {position: row for row, position in enumerate(rollouts.position)}
    leaving = [(sample, target) for sample, target in zip(kept, to, strict=True) if sample.owner == rank]
    arriving = [sample for sample, target in zip(kept, to, strict=True) if target == rank]
    columns = 2 if rollouts.rollout_logps is None else 3
    world = dist.get_world_size()

    tokens: list[list[torch.Tensor]] = [[] for _ in range(world)]
    numbers: list[list[torch.Tensor]] = [[] for _ in range(world)]
    for sample, target in leaving:
        row = row_of[sample.position]
        tokens[target] += [torch.tensor(rollouts.token_ids[row], dtype=torch.int32), rollouts.mask[row].int()]
        numbers[target] += [rollouts.teacher_logps[row], rollouts.student_logps[row]]
        if rollouts.rollout_logps is not None:
            numbers[target].append(rollouts.rollout_logps[row])
    from_rank = [[sample for sample in arriving if sample.owner == source] for source in range(world)]
    token_sizes = [sum(2 * sample.length - sample.prompt_len for sample in samples) for samples in from_rank]
    number_sizes = [columns * sum(sample.length - sample.prompt_len for sample in samples) for samples in from_rank]
    all_tokens = iter(_all_to_all(tokens, token_sizes, torch.int32, device))
    all_numbers = iter(_all_to_all(numbers, number_sizes, torch.float32, device))

    found: dict[int, tuple[torch.Tensor, ...]] = {}
    for samples, from_tokens, from_numbers in zip(from_rank, all_tokens, all_numbers, strict=True):
        lengths = [size for sample in samples for size in (sample.length, sample.length - sample.prompt_len)]
        pieces = from_tokens.split(lengths)
        parts = from_numbers.split([sample.length - sample.prompt_len for sample in samples for _ in range(columns)])
        for place, sample in enumerate(samples):
            logps = parts[place * columns : (place + 1) * columns]
            found[sample.position] = (*pieces[2 * place : 2 * place + 2], *logps)
    rows = [found[sample.position] for sample in arriving]
    return Rollouts(
        branch=[sample.branch for sample in arriving],
        position=[sample.position for sample in arriving],
        token_ids=[row[0].tolist() for row in rows],
        prompt_len=[sample.prompt_len for sample in arriving],
        mask=[row[1].bool() for row in rows],
        truncated=[False] * len(arriving),  # selection has counted them where they were rolled out
        rollout_logps=None if rollouts.rollout_logps is None else [row[4] for row in rows],
        teacher_logps=[row[2] for row in rows],
        student_logps=[row[3] for row in rows],
    )


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


def plan(lengths: Sequence[int], num_ranks: int, batch_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Which samples go where: `[rank][micro-batch]` -> indices into `lengths`, the same for the same arguments.

    Samples next to each other in length share a micro-batch; its work is its number of samples times its longest one,
    padding included. The cut is the one whose heaviest micro-batch is lightest, and ranks get micro-batches of about the
    same total, heaviest first, so that the ranks' n-th micro-batches take about the same time as well.

    Args:
        lengths: tokens of each sample, prompt + completion.
        num_ranks: ranks to spread them over; each gets the same number of micro-batches, some of which may be empty.
        batch_size: as many micro-batches are made as batches of so many samples would need. Short samples then share
            one in larger numbers, long ones in smaller.
        max_tokens: what a micro-batch may hold, padding included.

    Raises `ValueError` when a sample alone is longer than `max_tokens`.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if not order:
        return [[[]] for _ in range(num_ranks)]
    longest = lengths[order[0]]
    if longest > max_tokens:
        raise ValueError(f"a sample of {longest} tokens does not fit into a micro-batch of {max_tokens}.")
    ordered = [lengths[index] for index in order]
    at_least = max(-(-len(order) // batch_size), len(_cut(ordered, max_tokens)))
    per_rank = -(-at_least // num_ranks)
    groups = _split_more(_lightest_cut(ordered, per_rank * num_ranks, max_tokens), ordered, per_rank * num_ranks)

    ranks: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for start, end in sorted(groups, key=lambda group: -_work(group, ordered)):
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < per_rank), key=lambda r: (totals[r], r))
        ranks[rank].append((start, end))
        totals[rank] += _work((start, end), ordered)
    return [[order[start:end] for start, end in mine] + [[]] * (per_rank - len(mine)) for mine in ranks]


def _work(group: tuple[int, int], ordered: Sequence[int]) -> int:
    """Tokens of a micro-batch, padding included."""
    return (group[1] - group[0]) * ordered[group[0]]


def _cut(ordered: Sequence[int], cap: int) -> list[tuple[int, int]]:
    """Fewest runs of `ordered` (longest first) whose padded tokens stay within `cap`; a longer sample stands alone."""
    groups, start = [], 0
    while start < len(ordered):
        end = min(len(ordered), start + max(1, cap // ordered[start]))
        groups.append((start, end))
        start = end
    return groups


def _lightest_cut(ordered: Sequence[int], num_groups: int, max_tokens: int) -> list[tuple[int, int]]:
    """At most `num_groups` runs, with the smallest cap that allows it."""
    low, high = ordered[0], max_tokens  # the cut at `max_tokens` is known to fit
    while low < high:
        middle = (low + high) // 2
        if len(_cut(ordered, middle)) <= num_groups:
            high = middle
        else:
            low = middle + 1
    return _cut(ordered, high)


def _split_more(groups: list[tuple[int, int]], ordered: Sequence[int], num_groups: int) -> list[tuple[int, int]]:
    """Use the micro-batches that are left over: split where it saves the most padding."""
    groups = list(groups)
    while len(groups) < num_groups:
        saved, place, middle = max(
            (
                ((end - at) * (ordered[start] - ordered[at]), place, at)
                for place, (start, end) in enumerate(groups)
                for at in range(start + 1, end)
            ),
            default=(0, 0, 0),
        )
        if saved == 0:
            break
        start, end = groups[place]
        groups[place : place + 1] = [(start, middle), (middle, end)]
    return groups
