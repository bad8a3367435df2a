"""Relaxed OPD (https://arxiv.org/abs/2603.11137): rewards have a floor, and only tokens of high entropy are trained.

In its first phase, `relaxed_exploration_steps`, the tokens above the floor are trained instead.

Shape suffixes:  ... any shape   N tokens of the whole optimizer step
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..samples import Sample, SampleSummary
from .base import Gather, TokenRule, share


class RelaxedOPD(TokenRule):
    """Fields of the config: `relaxed_mixture` (lambda), `relaxed_entropy_share` (beta), `relaxed_exploration_steps`."""

    needs_entropy = True

    def __init__(self, args: Any):
        self.mixture = args.relaxed_mixture
        self.entropy_share = args.relaxed_entropy_share
        self.exploration_steps = args.relaxed_exploration_steps

    def weigh(self, samples: Sequence[Sample], step: int, gather: Gather) -> dict[str, float]:
        """1 for the tokens that are trained; the entropy threshold is that of all ranks' tokens."""
        if step < self.exploration_steps:
            for sample in samples:
                sample.token_weights = above_floor(sample.gaps, self.mixture).float()
            return {}
        own = torch.cat([sample.entropy[sample.mask] for sample in samples])
        threshold = entropy_threshold(torch.cat(gather([own])), self.entropy_share)
        for sample in samples:
            sample.token_weights = (sample.entropy >= threshold).float()
        return {"token_rule/entropy_threshold": threshold}

    def count(self, sample: Sample) -> dict[str, int]:
        """Its trained tokens, and those whose reward is cut at the floor."""
        mask = sample.mask
        assert sample.token_weights is not None
        return {
            "trained": int((sample.token_weights[mask] == 1).sum()),
            "below_floor": int((sample.gaps[mask] < reward_floor(self.mixture)).sum()),
        }

    def metrics(self, branch: str, summaries: Sequence[SampleSummary]) -> dict[str, float]:
        """Shares of trained tokens, and of those below the floor."""
        return {
            f"token_rule/{branch}/kept_tokens": share(summaries, "trained"),
            f"token_rule/{branch}/below_floor": share(summaries, "below_floor"),
        }

    def tokens_in_loss(self, summary: SampleSummary) -> int:
        """Relaxed OPD divides by the tokens it trains."""
        return summary.rule["trained"]

    def advantages(self, gaps: Tensor, mask: Tensor) -> Tensor:
        """See `relaxed_rewards`."""
        return relaxed_rewards(gaps, mask, self.mixture)


def reward_floor(mixture: float) -> float:
    """Relaxed OPD: log(lambda / (1 - lambda)) in nats, for lambda in (0, 1): -0.847 for 0.3, 0 for 0.5.

    The reward against the mixture lambda pi_theta + (1 - lambda) pi_T is logaddexp(log lambda, log(1 - lambda) + A).
    With a maximum in place of logaddexp that is log(1 - lambda) + max(A, floor); the constant is left out.
    """
    return math.log(mixture / (1 - mixture))


def relaxed_rewards(gaps: Tensor, mask: Tensor, mixture: float) -> Tensor:
    """Relaxed OPD's reward max(A_t, floor) in nats, 0 outside the mask; all (...). Takes the place of A_t in the loss."""
    return gaps.clamp(min=reward_floor(mixture)).masked_fill(~mask, 0.0)


def above_floor(gaps: Tensor, mixture: float) -> Tensor:
    """Relaxed OPD, exploration: the tokens (...) whose reward is not cut, A_t >= floor. The others are left out."""
    return gaps >= reward_floor(mixture)


def entropy_threshold(entropy_N: Tensor, share: float) -> float:
    """Relaxed OPD, refinement: tau, in nats, so that H_t >= tau holds for `share` (beta) of the tokens.

    The (1 - beta) quantile over the tokens of the whole step, all samples and ranks together, as the nearest value above:
    with ties more tokens reach it. Infinite where there are no tokens.
    """
    if len(entropy_N) == 0:
        return math.inf
    rank = math.ceil((1 - share) * (len(entropy_N) - 1) - 1e-9)  # (1 - 0.2) * 10 is a hair above 8
    return entropy_N.kthvalue(rank + 1).values.item()  # torch.quantile takes no more than 16 million values
