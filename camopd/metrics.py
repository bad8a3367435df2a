"""Metrics of one optimizer step, and of an evaluation: names are `stage/branch/name`, units are in docs/metrics.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .samples import Sample, SampleSummary


GAP_SAMPLES = 256  # gaps that a sample contributes to what is said of the step's tokens, evenly spaced over its own
REPEATS = 8  # tokens, all the same, from which on a completion says nothing: "0000000" may be an answer
TOP_TOKENS = 0.01  # share of a branch's tokens whose part in the score is told


def summary(
    sample: Sample, score: float, rank: int, rule: dict[str, int] | None = None, gap_samples: bool = True
) -> SampleSummary:
    """A scored sample's sums over its sampled tokens: what the means over a branch, of any grouping, are made from."""
    gaps = sample.gaps[sample.mask].double()
    stride = max(1, math.ceil(len(gaps) / GAP_SAMPLES))
    ratios = gaps[:0]  # of the trainer to the engine
    if sample.rollout_logps is not None:
        ratios = (sample.student_logps - sample.rollout_logps)[sample.mask & ~sample.rollout_logps.isnan()].double()
    return SampleSummary(
        position=sample.position,
        branch=sample.branch,
        owner=rank,
        prompt_len=sample.prompt_len,
        num_ids=len(sample.token_ids),
        num_tokens=len(gaps),
        length=sample.length,
        truncated=sample.truncated,
        category=sample.category,
        score=score,
        gap=gaps.sum().item(),
        gap_abs=gaps.abs().sum().item(),
        gap_positive=gaps.clamp(min=0).sum().item(),
        gap_square=gaps.square().sum().item(),
        gap_largest=gaps.abs().max().item() if len(gaps) else 0.0,
        logp_largest=sample.teacher_logps[sample.mask].abs().max().item() if len(gaps) else 0.0,
        teacher_logp=sample.teacher_logps[sample.mask].double().sum().item(),
        entropy=sample.entropy[sample.mask].double().sum().item(),
        gap_samples=tuple(gaps[::stride].tolist()) if gap_samples else (),  # most of what there is to send
        rule=rule or {},
        repeats=_repeats(sample),
        log_ratio=ratios.abs().sum().item(),
        num_ratios=len(ratios),
        server=sample.server,
    )


def of_branch(
    branch: str, rows: Sequence[SampleSummary], kept: set[int], degenerate: bool, score: str = "absolute"
) -> dict[str, float]:
    """Metrics of one branch in one optimizer step, from the table of its samples over all ranks.

    `score` is the kind that the branch's samples are scored by, "absolute" or "positive".
    """
    valid = [row for row in rows if row.num_tokens > 0]
    chosen = [row for row in valid if row.position in kept]
    dropped = [row for row in valid if row.position not in kept]
    scores = np.array([row.score for row in valid])
    mass = scores.sum()
    per_token = {
        f"gap/{branch}/mean": token_mean(valid, "gap"),
        f"gap/{branch}/abs_mean": token_mean(valid, "gap_abs"),
        f"gap/{branch}/positive_mean": token_mean(valid, "gap_positive"),
        f"rollout/{branch}/entropy": token_mean(valid, "entropy"),
    }
    samples = [abs(gap) for row in valid for gap in row.gap_samples]
    categories = sorted({str(row.category) for row in valid if row.category is not None})
    quantiles = np.quantile(scores, (0.1, 0.5, 0.9)) if len(scores) else [math.nan] * 3
    return {
        **per_token,
        f"gap/{branch}/abs_p99": float(np.quantile(samples, 0.99)) if samples else math.nan,
        f"teacher/{branch}/perplexity": _perplexity(token_mean(valid, "teacher_logp")),
        f"score/{branch}/p10": float(quantiles[0]),
        f"score/{branch}/p50": float(quantiles[1]),
        f"score/{branch}/p90": float(quantiles[2]),
        f"score/{branch}/max": float(scores.max()) if len(scores) else math.nan,
        f"score/{branch}/length_spearman": _spearman(scores, [row.length for row in valid]),
        f"selection/{branch}/candidates": len(valid),
        f"selection/{branch}/kept": len(chosen),
        f"selection/{branch}/tokens": sum(row.num_tokens for row in chosen),
        f"selection/{branch}/kept_fraction": len(chosen) / len(valid) if valid else math.nan,
        f"selection/{branch}/mass": sum(row.score for row in chosen) / mass if mass > 0 else math.nan,
        f"selection/{branch}/degenerate": float(degenerate),
        f"selection/{branch}/length_kept": _mean(chosen, "length"),
        f"selection/{branch}/length_dropped": _mean(dropped, "length"),
        f"selection/{branch}/truncated_kept": _mean(chosen, "truncated"),
        f"selection/{branch}/truncated_dropped": _mean(dropped, "truncated"),
        **{
            f"selection/{branch}/category/{category}": _kept_share(
                [row for row in valid if str(row.category) == category], kept
            )
            for category in categories
        },
        f"selection/{branch}/jaccard_length": _overlap_with_length(valid, kept),
        f"selection/{branch}/top1_share": _share_of_top_tokens(valid, score),
        f"selection/{branch}/score_perplexity_spearman": _spearman(
            scores, [-row.teacher_logp / row.num_tokens for row in valid]
        ),
        f"rollout/{branch}/length": _mean(valid, "length"),
        f"rollout/{branch}/scored": _share_of_lengths(valid),
        f"rollout/{branch}/truncated": _mean(valid, "truncated"),
        f"rollout/{branch}/empty": len(rows) - len(valid),
    }


def of_micro_batches(
    ranks: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], packs: Callable[[Sequence[int]], bool]
) -> dict[str, float]:
    """Tokens through forward and backward, from `[rank][micro-batch]` -> samples: how many are padding, and how uneven.

    `packs` says of the lengths of a micro-batch whether it goes without padding.
    """

    def tokens_of(batch: Sequence[int]) -> int:
        rows = [lengths[index] for index in batch]
        return sum(rows) if packs(rows) else len(rows) * max(rows)

    work = [sum(tokens_of(batch) for batch in batches if batch) for batches in ranks]
    total, tokens = sum(work), sum(lengths)
    return {
        "train/tokens": tokens,
        "train/padding": 1 - tokens / total if total else 0.0,
        "train/imbalance": max(work) * len(work) / total - 1 if total else 0.0,
        "train/micro_batches": max(len(batches) for batches in ranks),
    }


def of_evaluation(rows: Sequence[SampleSummary]) -> dict[str, float]:
    """Means and standard errors over prompts of a branch's held-out gaps, nats per token."""
    valid = [row for row in rows if row.num_tokens > 0]
    result: dict[str, float] = {"prompts": len(valid)}
    for name in ("gap", "gap_abs", "gap_positive"):
        values = np.array([getattr(row, name) / row.num_tokens for row in valid])
        result[name] = float(values.mean()) if valid else math.nan
        if name == "gap":
            result["kl"] = 0.0 - result["gap"]  # and not -0.0
            result["kl_se"] = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return result


def of_completions(rows: Sequence[SampleSummary]) -> dict[str, float]:
    """What the parent says of an evaluation's completions, over prompts instead of batches of them; entropy per token."""
    lengths = np.array([row.length for row in rows])
    ended = np.array([row.length for row in rows if not row.truncated])
    found = {"entropy": token_mean(rows, "entropy"), "completions/clipped_ratio": 1 - len(ended) / len(rows)}
    for name, values in (("", lengths), ("terminated_", ended if len(ended) else np.zeros(1))):
        found[f"completions/mean_{name}length"] = float(values.mean())
        found[f"completions/min_{name}length"] = float(values.min())
        found[f"completions/max_{name}length"] = float(values.max())
    return found


def token_mean(rows: Sequence[SampleSummary], name: str) -> float:
    """Mean over the tokens of all rows, from their sums; NaN without any."""
    tokens = sum(row.num_tokens for row in rows)
    return sum(getattr(row, name) for row in rows) / tokens if tokens else math.nan


def _repeats(sample: Sample) -> bool:
    tokens = sample.token_ids[sample.prompt_len :]
    if not sample.truncated:
        tokens = tokens[:-1]  # without the end of sequence
    return len(tokens) >= REPEATS and all(token == tokens[0] for token in tokens)


def _perplexity(logp: float) -> float:
    """Of a mean log-prob per token; infinite where no float holds it, at about -710 nats."""
    return math.exp(-logp) if not logp < -709 else math.inf


def _mean(rows: Sequence[SampleSummary], name: str) -> float:
    return sum(getattr(row, name) for row in rows) / len(rows) if rows else math.nan


def _share_of_lengths(rows: Sequence[SampleSummary]) -> float:
    total = sum(row.length for row in rows)
    return sum(row.num_tokens for row in rows) / total if total else math.nan


def _kept_share(rows: Sequence[SampleSummary], kept: set[int]) -> float:
    return sum(row.position in kept for row in rows) / len(rows)


def _overlap_with_length(rows: Sequence[SampleSummary], kept: set[int]) -> float:
    """Jaccard overlap of the kept samples with as many of the longest ones, |both| / |either|; NaN where all are kept, and
    where equal lengths leave open which ones these are."""
    chosen = {row.position for row in rows} & kept
    if len(chosen) == len(rows):
        return math.nan
    ordered = sorted(rows, key=lambda row: -row.length)
    if chosen and ordered[len(chosen) - 1].length == ordered[len(chosen)].length:
        return math.nan
    found = {row.position for row in ordered[: len(chosen)]}
    return len(chosen & found) / len(chosen | found)


def _share_of_top_tokens(rows: Sequence[SampleSummary], score: str) -> float:
    """Share of the samples' summed score that the 1 % of tokens with the largest demand carry; NaN without any score.

    A token's demand is |gap| or max(gap, 0), its part in the score that over T_i. A long sample's evenly spaced tokens
    stand for their neighbours, and the last token counts in part where 1 % is not a whole number.
    """
    demands, tokens, parts = [], [], []
    for row in rows:
        gaps = np.array(row.gap_samples)
        demands.append(np.abs(gaps) if score == "absolute" else gaps.clip(min=0))
        tokens.append(np.full(len(gaps), row.num_tokens / len(gaps)))
        parts.append(demands[-1] / len(gaps))
    if not rows:
        return math.nan
    order = np.argsort(-np.concatenate(demands), kind="stable")
    seen, carried = (np.concatenate([[0.0], np.concatenate(values)[order].cumsum()]) for values in (tokens, parts))
    return float(np.interp(TOP_TOKENS * seen[-1], seen, carried) / carried[-1]) if carried[-1] > 0 else math.nan


def _spearman(first: Any, second: Any) -> float:
    """Rank correlation; NaN where one side is constant, or more than half of it one value: the few others would decide."""
    ranks = [pd.Series(values).rank().to_numpy() for values in (first, second)]
    if len(ranks[0]) < 2 or any(2 * np.unique(rank, return_counts=True)[1].max() > len(rank) for rank in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])
