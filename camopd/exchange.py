"""After selection: spread the kept samples over ranks and micro-batches, so that all have the same work and little padding.

Selection keeps other samples on every rank, and completions differ in length by orders of magnitude. Without an exchange
every rank runs as many micro-batches as the fullest one, and pads each to its longest sample.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from .errors import CaMOPDError
from .rollouts import Rollouts


T = TypeVar("T")


class Kept(NamedTuple):
    """One kept sample, as every rank knows it."""

    position: int  # in the step's global batch
    branch: str
    prompt_len: int
    length: int  # prompt + completion
    owner: int  # the rank that rolled it out


def exchange(rollouts: Rollouts, kept: Sequence[Kept], to: Sequence[int], rank: int, device: torch.device) -> Rollouts:
    """Send each kept sample to the rank it is to be trained on; only token ids, the mask, log-probs
    and the weights of a token rule travel.

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
    columns = [rollouts.teacher_logps, rollouts.student_logps]
    columns += [column for column in (rollouts.rollout_logps, rollouts.token_weights) if column is not None]
    world = dist.get_world_size()

    tokens: list[list[torch.Tensor]] = [[] for _ in range(world)]
    numbers: list[list[torch.Tensor]] = [[] for _ in range(world)]
    for sample, target in leaving:
        row = row_of[sample.position]
        tokens[target] += [torch.tensor(rollouts.token_ids[row], dtype=torch.int32), rollouts.mask[row].int()]
        numbers[target] += [column[row] for column in columns]
    from_rank = [[sample for sample in arriving if sample.owner == source] for source in range(world)]
    token_sizes = [sum(2 * sample.length - sample.prompt_len for sample in samples) for samples in from_rank]
    number_sizes = [
        len(columns) * sum(sample.length - sample.prompt_len for sample in samples) for samples in from_rank
    ]
    all_tokens = iter(_all_to_all(tokens, token_sizes, torch.int32, device))
    all_numbers = iter(_all_to_all(numbers, number_sizes, torch.float32, device))

    found: dict[int, tuple[torch.Tensor, ...]] = {}
    for samples, from_tokens, from_numbers in zip(from_rank, all_tokens, all_numbers, strict=True):
        lengths = [size for sample in samples for size in (sample.length, sample.length - sample.prompt_len)]
        pieces = from_tokens.split(lengths)
        parts = from_numbers.split([sample.length - sample.prompt_len for sample in samples for _ in columns])
        for place, sample in enumerate(samples):
            own = parts[place * len(columns) : (place + 1) * len(columns)]
            found[sample.position] = (*pieces[2 * place : 2 * place + 2], *own)
    rows = [found[sample.position] for sample in arriving]
    return Rollouts(
        branch=[sample.branch for sample in arriving],
        position=[sample.position for sample in arriving],
        token_ids=[row[0].tolist() for row in rows],
        prompt_len=[sample.prompt_len for sample in arriving],
        mask=[row[1].bool() for row in rows],
        length=[sample.length - sample.prompt_len for sample in arriving],
        truncated=[False] * len(arriving),  # selection has counted them where they were rolled out
        teacher_logps=[row[2] for row in rows],
        student_logps=[row[3] for row in rows],
        rollout_logps=None if rollouts.rollout_logps is None else [row[4] for row in rows],
        token_weights=None if rollouts.token_weights is None else [row[-1] for row in rows],
    )


class Trained:
    """What has gone through an optimizer step's loss on this rank, to be held against what was kept of the step.

    Every rank adds the rows of each loss; at the end of the step the rows of all ranks are checked together.
    """

    def __init__(self, kept: Mapping[int, int]):
        """`kept` has the sampled tokens of each kept sample of all ranks, by its position in the step's global batch."""
        self.kept = kept
        self.rows: list[tuple[int, int]] = []  # position and tokens inside the loss's mask

    def add(self, positions: Sequence[int], mask: torch.Tensor) -> None:
        """Take in the rows of one loss. Rows of `mask` (B, T) behind those with a position are stand-ins."""
        tokens = mask.sum(dim=1).tolist()
        if any(tokens[len(positions) :]):
            raise CaMOPDError(f"a stand-in has {sum(tokens[len(positions) :])} tokens in the loss. {_REPORT}")
        self.rows += zip(positions, tokens[: len(positions)], strict=True)

    def check(self, rows: Sequence[tuple[int, int]]) -> None:
        """Raise `CaMOPDError` unless the rows of all ranks are the kept samples, each once and with all its tokens."""
        times = Counter(position for position, _ in rows)
        found = {
            "not trained": [position for position in self.kept if not times[position]],
            "trained more than once": [position for position, count in times.items() if count > 1],
            "trained but not kept": [position for position in times if position not in self.kept],
            "trained with other tokens": [
                position for position, tokens in rows if self.kept.get(position, tokens) != tokens
            ],
        }
        if any(found.values()):
            wrong = "; ".join(
                f"{len(places)} {what} (positions {sorted(places)[:8]})" for what, places in found.items() if places
            )
            raise CaMOPDError(
                f"of {len(self.kept)} kept samples with {sum(self.kept.values())} tokens, {len(rows)} samples with "
                f"{sum(tokens for _, tokens in rows)} tokens have gone through the loss: {wrong}. The run ends here; its "
                f"last checkpoint is from before that. {_REPORT}"
            )


_REPORT = (
    "Unless you have replaced a method of the trainer, this is a fault of camopd: please report it with the settings."
)


def in_micro_steps(batches: Sequence[T], micro_steps: int) -> list[T | None]:
    """Micro-batches as the last of the micro-steps, `None` before them. Raises `CaMOPDError` where they do not fit."""
    if len(batches) > micro_steps:
        raise CaMOPDError(
            f"{len(batches)} micro-batches do not fit into the {micro_steps} micro-steps of an optimizer step "
            f"(gradient_accumulation_steps): some kept samples would not be trained. {_REPORT}"
        )
    return [*[None] * (micro_steps - len(batches)), *batches]


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


def attention_cost(model: Any) -> float:
    """Work of a pair of tokens in causal attention, in units of a token's work in the rest of the model.

    A token costs 2 operations a weight, and attention 2 x width a pair and layer (products with keys and values, each over
    half the square). Layers with a sliding window count as if they had none of it. For Qwen3-8B it is 1/56,000: a sample of
    56,000 tokens costs as much in attention as in everything else.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    # ZeRO-3 keeps a parameter's size elsewhere
    weights = sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters())
    return kinds.count("full_attention") * width / weights


def plan(
    lengths: Sequence[int],
    num_ranks: int,
    batch_size: int | None,
    max_tokens: int,
    padding_free: bool = False,
    attention_cost: float = 0.0,
) -> list[list[list[int]]]:
    """Which samples go where: `[rank][micro-batch]` -> indices into `lengths`, the same for the same arguments.

    With padding, samples next to each other in length share a micro-batch, whose work is its number of samples times that
    of its longest one; the cut is the one whose heaviest micro-batch is lightest. Without, a micro-batch may hold samples
    of any length. Ranks get micro-batches of about the same total, heaviest first, so that their n-th micro-batches take
    about the same time as well.

    Args:
        lengths: tokens of each sample, prompt + completion.
        num_ranks: ranks to spread them over; each gets the same number of micro-batches, some of which may be empty.
        batch_size: as many micro-batches are made as batches of so many samples would need. Short samples then share
            one in larger numbers, long ones in smaller. `None`: as few as `max_tokens` allows.
        max_tokens: what a micro-batch may hold, padding included.
        padding_free: whether samples of one micro-batch cost their own lengths or all that of the longest.
        attention_cost: work of a pair of tokens in attention, in units of a token's work in the rest of the model; a sample
            of L tokens is L + attention_cost * L^2 of work.

    Raises `ValueError` when a sample alone is longer than `max_tokens`.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if not order:
        return [[[]] for _ in range(num_ranks)]
    longest = lengths[order[0]]
    if longest > max_tokens:
        raise ValueError(f"a sample of {longest} tokens does not fit into a micro-batch of {max_tokens}.")
    ordered = [lengths[index] for index in order]
    work = _works(ordered, attention_cost)
    fewest = 1 if batch_size is None else -(-len(order) // batch_size)
    ranks = None
    if padding_free:
        ranks = _packed(ordered, work, num_ranks, max(fewest, -(-sum(lengths) // max_tokens)), max_tokens, batch_size)
    if ranks is None:
        ranks = _padded(ordered, work, num_ranks, fewest, max_tokens)
    ranks = [[group for group in groups if group] for groups in ranks]
    per_rank = max(map(len, ranks))
    return [
        [[order[place] for place in group] for group in groups] + [[]] * (per_rank - len(groups)) for groups in ranks
    ]


def _packed(
    ordered: Sequence[int],
    work: Sequence[int],
    num_ranks: int,
    fewest: int,
    max_tokens: int,
    batch_size: int | None,
) -> list[list[list[int]]] | None:
    """Turn by turn a micro-batch for each rank, all as heavy as the turn's longest sample or their share of what is left.

    `None` where batches of `batch_size` samples are asked for and so many micro-batches do not hold all. Without a
    `batch_size` there are as many as it takes.
    """
    num_turns = -(-fewest // num_ranks)
    while True:
        ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
        totals = [0] * num_ranks
        waiting = list(range(len(ordered)))
        for turn in range(num_turns):
            left = sum(work[place] for place in waiting)
            share = -(-left // (num_ranks * (num_turns - turn)))
            cap = max(share, work[waiting[0]]) if waiting and turn < num_turns - 1 else left
            groups: list[list[int]] = [[] for _ in range(num_ranks)]
            loads, tokens = [0] * num_ranks, [0] * num_ranks
            passed = []
            for place in waiting:
                slot = min(range(num_ranks), key=lambda slot: (loads[slot], slot))
                if loads[slot] + work[place] > cap or tokens[slot] + ordered[place] > max_tokens:
                    passed.append(place)
                    continue
                groups[slot].append(place)
                loads[slot] += work[place]
                tokens[slot] += ordered[place]
            waiting = passed
            lightest = sorted(range(num_ranks), key=totals.__getitem__)
            for rank, slot in zip(lightest, sorted(range(num_ranks), key=lambda slot: -loads[slot]), strict=True):
                ranks[rank].append(groups[slot])
                totals[rank] += loads[slot]
        if not waiting:
            return ranks
        if batch_size is not None:
            return None
        num_turns += 1


def _padded(
    ordered: Sequence[int], work: Sequence[int], num_ranks: int, fewest: int, max_tokens: int
) -> list[list[list[int]]]:
    """Runs of samples of similar length, the heaviest first to the rank that has least so far."""
    whole = _cut(ordered, work, None, max_tokens)
    wanted = -(-max(fewest, len(whole)) // num_ranks) * num_ranks
    groups = _lightest_cut(ordered, work, wanted, max_tokens)
    runs = _split_more(groups, work, wanted)
    per_rank = -(-len(runs) // num_ranks)

    def work_of(run: tuple[int, int]) -> int:
        return (run[1] - run[0]) * work[run[0]]

    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for run in sorted(runs, key=lambda run: (-work_of(run), run)):
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < per_rank), key=lambda r: (totals[r], r))
        ranks[rank].append(list(range(*run)))
        totals[rank] += work_of(run)
    return ranks


def score_batches(lengths: Sequence[int], batch_size: int, padding_free: bool) -> list[list[int]]:
    """Rows of each forward without gradient, the longest first: indices into `lengths`.

    Their number follows from the number of rows alone, so that sharded models make as many forwards on every rank. It is
    what `batch_size` needs; with padding at least twice the root of the number of rows, which leaves little of it.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if not order:
        return []
    ordered = [lengths[index] for index in order]
    wanted = -(-len(order) // batch_size)
    if not padding_free:
        wanted = max(wanted, min(len(order), 2 * math.isqrt(len(order))))
    runs = _split_more(_lightest_cut(ordered, ordered, wanted, batch_size * ordered[0]), ordered, wanted)
    while len(runs) < wanted:  # rows of one length
        largest = max(range(len(runs)), key=lambda place: runs[place][1] - runs[place][0])
        start, end = runs[largest]
        runs[largest : largest + 1] = [(start, (start + end) // 2), ((start + end) // 2, end)]
    return [order[start:end] for start, end in runs]


def _works(lengths: Sequence[int], attention_cost: float) -> list[int]:
    """L + attention_cost * L^2 of each sample, as whole numbers of one unit.

    In floating point n * w / w is now and then below n: a cut that should take n samples would leave one over, and make a
    micro-batch more than there are micro-steps.
    """
    numerator, denominator = float(attention_cost).as_integer_ratio()
    return [denominator * length + numerator * length**2 for length in lengths]


def _cut(ordered: Sequence[int], work: Sequence[int], cap: int | None, max_tokens: int) -> list[tuple[int, int]]:
    """Fewest runs (longest sample first) whose work stays within `cap` (`None`: any), and whose tokens within `max_tokens`,
    padding included; a sample that is more work than `cap` stands alone."""
    groups, start = [], 0
    while start < len(ordered):
        size = max_tokens // ordered[start]
        if cap is not None:
            size = min(size, cap // work[start])
        end = min(len(ordered), start + max(1, size))
        groups.append((start, end))
        start = end
    return groups


def _lightest_cut(
    ordered: Sequence[int], work: Sequence[int], num_groups: int, max_tokens: int
) -> list[tuple[int, int]]:
    """At most `num_groups` runs, with the smallest cap that allows it, to a thousandth of the heaviest sample's work.

    As few as `max_tokens` allows, where these are more than `num_groups`.
    """
    low, high = work[0], len(ordered) * work[0]
    groups = _cut(ordered, work, None, max_tokens)
    while high - low > max(1, work[0] // 1000):
        middle = (low + high) // 2
        tried = _cut(ordered, work, middle, max_tokens)
        if len(tried) <= num_groups:
            high, groups = middle, tried
        else:
            low = middle
    return groups


def _split_more(groups: list[tuple[int, int]], work: Sequence[int], num_groups: int) -> list[tuple[int, int]]:
    """Use the micro-batches that are left over: split where it saves the most padding."""
    groups = list(groups)
    while len(groups) < num_groups:
        saved, place, middle = max(
            (
                ((end - at) * (work[start] - work[at]), place, at)
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
