"""Which samples share a micro-batch, and which rank trains them: pure planning over their lengths.

Selection keeps other samples on every rank, and completions differ in length by orders of magnitude. Without a plan every
rank runs as many micro-batches as the fullest one, and pads each to its longest sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any


FULL = 16  # times the cost of a forward, its tokens from which on that cost is a sixteenth of the work or less
# Of a masked square nothing is left out: twice what `attention_cost` counts. And a CPU takes up to about twice as long for
# it as for matrix products with as many operations (benchmarks/padding.py).
MASKED_ATTENTION = 2 * 2
LONGEST_PACKED = 1024  # tokens of a masked square: measured up to here, and its mask then takes a MiB


def attention_cost(model: Any) -> float:
    """Work of a pair of tokens in causal attention, in units of a token's work in the rest of the model.

    A token costs 2 operations a weight, and attention 2 x width a pair and layer (products with keys and values, each over
    half the square). Layers with a sliding window count as if they had none of it. For Qwen3-8B it is 1/56,000: a sample of
    56,000 tokens costs as much in attention as in everything else. 0 where the sizes are not known.
    """
    return _pair_cost(model, lambda kinds: kinds.count("full_attention")) or 0.0


def square_cost(model: Any) -> float | None:
    """The same where a masked square is computed whole. Layers with a sliding window count too: they only mask more of it.

    Of a mixture of experts it is too little, since all experts count as a token's work. `None` where sizes are not known.
    """
    cost = _pair_cost(model, len)
    return cost and MASKED_ATTENTION * cost


def _pair_cost(model: Any, count: Callable[[Sequence[str]], int]) -> float | None:
    config = model.config.get_text_config()
    try:
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        heads = int(config.num_attention_heads)
        width = heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    except (AttributeError, RuntimeError, TypeError, ZeroDivisionError):
        return None  # no attention (Mamba), or another size in each layer
    # ZeRO-3 keeps a parameter's size elsewhere
    weights = sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters())
    return count(kinds) * width / weights


def masked_work(rows: int, tokens: int, square_cost: float) -> float:
    """Work of a forward of rows of so many tokens, in those of a token outside attention."""
    return rows * (tokens + square_cost * tokens**2)


def packing_is_less_work(lengths: Sequence[int], square_cost: float) -> bool:
    """Whether rows one after the other, in a masked square of all their tokens, are less work than rows with padding."""
    tokens = sum(lengths)
    padded = masked_work(len(lengths), max(lengths), square_cost)
    return tokens <= LONGEST_PACKED and masked_work(1, tokens, square_cost) < padded


def balance_micro_batches(
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


def score_batches(
    lengths: Sequence[int],
    batch_size: int,
    padding_free: bool | None,
    forward_cost: int,
    several_ranks: bool = False,
    square_cost: float = 0.0,
) -> list[list[int]]:
    """Rows of each forward without gradient, the longest first: indices into `lengths`.

    Unless `padding_free`, they are the cut that costs least, with `forward_cost` and the padding counted, or the masked
    square where that is allowed and costs less. With it, they are filled.

    Args:
        lengths: tokens of each row.
        batch_size: times the longest row, tokens that a forward may hold, padding included.
        padding_free: whether rows of one forward cost their own lengths or all that of the longest; `None`: whichever is
            less, see `packing_is_less_work`.
        forward_cost: of a forward beside its tokens, in tokens.
        several_ranks: whether others forward rows of their own. Sharded models need all ranks in each forward: then their
            number follows from that of the rows alone, and asking the others, one collective more, is not needed.
        square_cost: see the function of that name.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if not order:
        return []
    ordered = [lengths[index] for index in order]
    if padding_free or several_ranks:
        wanted = -(-len(order) // batch_size)
        if not padding_free:  # this leaves little padding
            wanted = max(wanted, min(len(order), 2 * math.isqrt(len(order))))
        runs = _split_more(_lightest_cut(ordered, ordered, wanted, batch_size * ordered[0]), ordered, wanted)
    else:
        # A forward that is FULL gains little by more rows, and takes no more memory than that of the longest row.
        most = min(batch_size * ordered[0], max(ordered[0], FULL * forward_cost))
        runs = _cheapest_cut(ordered, forward_cost, most, square_cost, padding_free is None)
        wanted = len(runs)
    while len(runs) < wanted:  # rows of one length
        largest = max(range(len(runs)), key=lambda place: runs[place][1] - runs[place][0])
        start, end = runs[largest]
        runs[largest : largest + 1] = [(start, (start + end) // 2), ((start + end) // 2, end)]
    return [order[start:end] for start, end in runs]


def _cheapest_cut(
    ordered: Sequence[int], forward_cost: int, max_tokens: int, square_cost: float, may_pack: bool
) -> list[tuple[int, int]]:
    """Runs (longest row first) with the least sum of their work and a `forward_cost` for each, and no more than
    `max_tokens`, padding included."""
    costs, starts = [0.0], [0]  # of the first rows up to here: their least sum, and where its last run starts
    for end in range(1, len(ordered) + 1):
        found, first, tokens = math.inf, end - 1, 0
        for start in range(end - 1, -1, -1):
            rows, tokens = end - start, tokens + ordered[start]
            if rows > 1 and rows * ordered[start] > max_tokens:
                break
            work = masked_work(rows, ordered[start], square_cost)
            if may_pack and tokens <= LONGEST_PACKED:
                work = min(work, masked_work(1, tokens, square_cost))
            if costs[start] + forward_cost + work <= found:
                found, first = costs[start] + forward_cost + work, start
        costs.append(found)
        starts.append(first)
    runs, end = [], len(ordered)
    while end:
        runs.append((starts[end], end))
        end = starts[end]
    return runs[::-1]


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
