"""What a step says about itself: names are `stage/branch/name`, units are in docs/metrics.md."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import TrainerCallback


if TYPE_CHECKING:
    from .trainer import CaMOPDTrainer


GAP_SAMPLES = 256  # gaps that a sample contributes to what is said of the step's tokens, evenly spaced over its own
TOP_TOKENS = 0.01  # share of a branch's tokens whose part in the score is told


def row_sums(gaps_T: Tensor, teacher_logps_T: Tensor, entropy_T: Tensor, mask_T: Tensor) -> dict[str, Any]:
    """One completion's sums over its sampled tokens: what the means over a branch, of any grouping, are made from."""
    gaps = gaps_T[mask_T].double()
    stride = max(1, math.ceil(len(gaps) / GAP_SAMPLES))
    return {
        "num_tokens": len(gaps),
        "gap": gaps.sum().item(),
        "gap_abs": gaps.abs().sum().item(),
        "gap_positive": gaps.clamp(min=0).sum().item(),
        "gap_square": gaps.square().sum().item(),
        "gap_samples": gaps[::stride].tolist(),
        "teacher_logp": teacher_logps_T[mask_T].double().sum().item(),
        "entropy": entropy_T[mask_T].double().sum().item(),
    }


def of_branch(
    branch: str, rows: Sequence[dict[str, Any]], kept: set[int], degenerate: bool, score: str = "absolute"
) -> dict[str, float]:
    """Metrics of one branch in one optimizer step, from the table of its samples over all ranks.

    `score` is the kind that the branch's samples are scored by, "absolute" or "positive".
    """
    valid = [row for row in rows if row["num_tokens"] > 0]
    chosen = [row for row in valid if row["position"] in kept]
    dropped = [row for row in valid if row["position"] not in kept]
    scores = np.array([row["score"] for row in valid])
    mass = scores.sum()
    per_token = {
        f"gap/{branch}/mean": token_mean(valid, "gap"),
        f"gap/{branch}/abs_mean": token_mean(valid, "gap_abs"),
        f"gap/{branch}/positive_mean": token_mean(valid, "gap_positive"),
        f"rollout/{branch}/entropy": token_mean(valid, "entropy"),
    }
    samples = [abs(gap) for row in valid for gap in row["gap_samples"]]
    categories = sorted({str(row["category"]) for row in valid if row.get("category") is not None})
    quantiles = np.quantile(scores, (0.1, 0.5, 0.9)) if len(scores) else [math.nan] * 3
    return {
        **per_token,
        f"gap/{branch}/abs_p99": float(np.quantile(samples, 0.99)) if samples else math.nan,
        f"teacher/{branch}/perplexity": math.exp(-token_mean(valid, "teacher_logp")),
        f"score/{branch}/p10": float(quantiles[0]),
        f"score/{branch}/p50": float(quantiles[1]),
        f"score/{branch}/p90": float(quantiles[2]),
        f"score/{branch}/max": float(scores.max()) if len(scores) else math.nan,
        f"score/{branch}/length_spearman": _spearman(scores, [row["length"] for row in valid]),
        f"selection/{branch}/candidates": len(valid),
        f"selection/{branch}/kept": len(chosen),
        f"selection/{branch}/kept_fraction": len(chosen) / len(valid) if valid else math.nan,
        f"selection/{branch}/mass": sum(row["score"] for row in chosen) / mass if mass > 0 else math.nan,
        f"selection/{branch}/degenerate": float(degenerate),
        f"selection/{branch}/length_kept": _mean(chosen, "length"),
        f"selection/{branch}/length_dropped": _mean(dropped, "length"),
        f"selection/{branch}/truncated_kept": _mean(chosen, "truncated"),
        f"selection/{branch}/truncated_dropped": _mean(dropped, "truncated"),
        **{
            f"selection/{branch}/category/{category}": _kept_share(
                [row for row in valid if str(row.get("category")) == category], kept
            )
            for category in categories
        },
        f"selection/{branch}/jaccard_length": _overlap_with_length(valid, kept),
        f"selection/{branch}/top1_share": _share_of_top_tokens(valid, score),
        f"selection/{branch}/score_perplexity_spearman": _spearman(
            scores, [-row["teacher_logp"] / row["num_tokens"] for row in valid]
        ),
        f"rollout/{branch}/length": _mean(valid, "length"),
        f"rollout/{branch}/scored": _share(valid, "num_tokens", "length"),
        f"rollout/{branch}/truncated": _mean(valid, "truncated"),
        f"rollout/{branch}/empty": len(rows) - len(valid),
    }


def of_token_rule(rule: str, branch: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a token rule does to the tokens of a branch, from the table of its samples over all ranks."""
    if rule == "none":
        return {}
    full_weight = _share(rows, "full_weight", "num_tokens")
    if rule == "selectkd":
        return {f"token_rule/{branch}/accepted": full_weight}
    return {
        f"token_rule/{branch}/kept_tokens": full_weight,
        f"token_rule/{branch}/below_floor": _share(rows, "below_floor", "num_tokens"),
    }


def of_micro_batches(
    ranks: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], padding_free: bool
) -> dict[str, float]:
    """Tokens through forward and backward, from `[rank][micro-batch]` -> samples: how many are padding, and how uneven."""

    def tokens_of(batch: Sequence[int]) -> int:
        rows = [lengths[index] for index in batch]
        return sum(rows) if padding_free else len(rows) * max(rows)

    work = [sum(tokens_of(batch) for batch in batches if batch) for batches in ranks]
    total, tokens = sum(work), sum(lengths)
    return {
        "train/tokens": tokens,
        "train/padding": 1 - tokens / total if total else 0.0,
        "train/imbalance": max(work) * len(work) / total - 1 if total else 0.0,
        "train/micro_batches": max(len(batches) for batches in ranks),
    }


def of_evaluation(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means and standard errors over prompts of a branch's held-out gaps, nats per token."""
    valid = [row for row in rows if row["num_tokens"] > 0]
    result: dict[str, float] = {"prompts": len(valid)}
    for name in ("gap", "gap_abs", "gap_positive"):
        values = np.array([row[name] / row["num_tokens"] for row in valid])
        result[name] = float(values.mean()) if valid else math.nan
        if name == "gap":
            result["kl"] = 0.0 - result["gap"]  # and not -0.0
            result["kl_se"] = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return result


def of_completions(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the parent says of an evaluation's completions, over prompts instead of batches of them; entropy per token."""
    lengths = np.array([row["length"] for row in rows])
    ended = np.array([row["length"] for row in rows if not row["truncated"]])
    found = {"entropy": token_mean(rows, "entropy"), "completions/clipped_ratio": 1 - len(ended) / len(rows)}
    for name, values in (("", lengths), ("terminated_", ended if len(ended) else np.zeros(1))):
        found[f"completions/mean_{name}length"] = float(values.mean())
        found[f"completions/min_{name}length"] = float(values.min())
        found[f"completions/max_{name}length"] = float(values.max())
    return found


class ImportanceStats:
    """Running statistics of pi_train / pi_rollout over the tokens of a step's micro-batches on this rank."""

    def __init__(self) -> None:
        self.total = self.count = self.zeroed = self.log_ratio = 0.0
        self.largest = -math.inf

    def add(self, train_logps: Tensor, rollout_logps: Tensor | None, weights: Tensor, mask: Tensor) -> None:
        """Take in one micro-batch, all (B, T). Tokens without a rollout log-prob do not count."""
        if rollout_logps is None:
            return
        known = mask & ~rollout_logps.isnan()
        ratio = torch.exp(train_logps - rollout_logps)[known].double()
        if len(ratio):
            self.total += ratio.sum().item()
            self.log_ratio += ratio.log().abs().sum().item()
            self.count += len(ratio)
            self.largest = max(self.largest, ratio.max().item())
            # Weights differ from the ratio exactly where it lies outside the band ("mask" and "truncate" alike).
            self.zeroed += (weights[known].double() != ratio).sum().item()

    def summary(self, gather: Callable[[list[Any]], list[Any]]) -> dict[str, float]:
        """Mean, maximum and share outside the band over all ranks, and the mean of |log ratio|: how far trainer and engine
        are from each other, in nats per token. NaN where no token counts."""
        parts = gather([(self.total, self.count, self.zeroed, self.largest, self.log_ratio)])
        total, count, zeroed, _, log_ratio = (sum(part[index] for part in parts) for index in range(5))
        return {
            "importance/ratio_mean": total / count if count else math.nan,
            "importance/ratio_max": max(part[3] for part in parts) if count else math.nan,
            "importance/outside_band": zeroed / count if count else math.nan,
            "importance/log_ratio": log_ratio / count if count else math.nan,
        }


class MetricsFile(TrainerCallback):
    """Appends one line per optimizer step to `output_dir/metrics.jsonl`, on the first process.

    A resumed run drops the lines after its checkpoint, which it is about to write again. A new run in a folder that has
    such a file renames it to `metrics-1.jsonl`, `metrics-2.jsonl`, ... first.
    """

    def __init__(self, trainer: CaMOPDTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / "metrics.jsonl"
        if not state.is_world_process_zero:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        if state.global_step == 0:
            number = 1
            while path.with_name(f"metrics-{number}.jsonl").exists():
                number += 1
            path.rename(path.with_name(f"metrics-{number}.jsonl"))
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= state.global_step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_update()
        if state.is_world_process_zero:
            record = {"step": state.global_step, **self.trainer._step_metrics}
            finite = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in record.items()
            }
            with open(Path(args.output_dir) / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf  # a line cut short by a crash; its step will be written again


def token_mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Mean over the tokens of all rows, from their sums; NaN without any."""
    tokens = sum(row["num_tokens"] for row in rows)
    return sum(row[name] for row in rows) / tokens if tokens else math.nan


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows) if rows else math.nan


def _share(rows: Sequence[dict[str, Any]], part: str, whole: str) -> float:
    total = sum(row[whole] for row in rows)
    return sum(row[part] for row in rows) / total if total else math.nan


def _kept_share(rows: Sequence[dict[str, Any]], kept: set[int]) -> float:
    return sum(row["position"] in kept for row in rows) / len(rows)


def _overlap_with_length(rows: Sequence[dict[str, Any]], kept: set[int]) -> float:
    """Jaccard overlap of the kept samples with as many of the longest ones, |both| / |either|; NaN where all are kept."""
    chosen = {row["position"] for row in rows} & kept
    if len(chosen) == len(rows):
        return math.nan
    longest = sorted(rows, key=lambda row: (-row["length"], row["position"]))[: len(chosen)]
    found = {row["position"] for row in longest}
    return len(chosen & found) / len(chosen | found)


def _share_of_top_tokens(rows: Sequence[dict[str, Any]], score: str) -> float:
    """Share of the samples' summed score that the 1 % of tokens with the largest demand carry; NaN without any score.

    A token's demand is |gap| or max(gap, 0), its part in the score that over T_i. A long sample's evenly spaced tokens
    stand for their neighbours, and the last token counts in part where 1 % is no whole number.
    """
    demands, tokens, parts = [], [], []
    for row in rows:
        gaps = np.array(row["gap_samples"])
        demands.append(np.abs(gaps) if score == "absolute" else gaps.clip(min=0))
        tokens.append(np.full(len(gaps), row["num_tokens"] / len(gaps)))
        parts.append(demands[-1] / len(gaps))
    if not rows:
        return math.nan
    order = np.argsort(-np.concatenate(demands), kind="stable")
    seen, carried = (np.concatenate([[0.0], np.concatenate(values)[order].cumsum()]) for values in (tokens, parts))
    return float(np.interp(TOP_TOKENS * seen[-1], seen, carried) / carried[-1]) if carried[-1] > 0 else math.nan


def _spearman(first: Any, second: Any) -> float:
    """Rank correlation; NaN where one side is constant."""
    ranks = [pd.Series(values).rank().to_numpy() for values in (first, second)]
    if len(ranks[0]) < 2 or any(rank.std() == 0 for rank in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])
