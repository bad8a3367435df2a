"""What the baselines put on the loss of Eq. 9: which tokens count, how much, and how much a branch counts.

    Relaxed OPD   rewards not below log(lambda / (1 - lambda)), and only the tokens where the student is unsure
    SelecTKD      a small weight where the teacher does not accept what the student would propose
    DN-MOPD       branches of unlike spread brought to the same one

Pure torch, like objective.py. Where the sources differ or are silent, docs/methods.md says what was chosen.

Shape suffixes:  ... any shape   N tokens of the whole optimizer step   T completion tokens   K likeliest tokens
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


TOKEN_RULES: tuple[str, ...] = ("none", "relaxed_opd", "selectkd")
SELECTKD_TOP_K = 5  # SelecTKD's window of acceptance; a wider one accepts more
SIGMA_BOUNDS = (0.25, 4.0)  # of DN-MOPD's weights, the same in all its runs


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


def proposals(top_ids_TK: Tensor, top_logps_TK: Tensor) -> Tensor:
    """SelecTKD: the student's likeliest token at each position, (T,); of equals, which bfloat16 gives, the lowest id."""
    largest_TK = top_logps_TK == top_logps_TK.amax(dim=-1, keepdim=True)
    return top_ids_TK.masked_fill(~largest_TK, torch.iinfo(top_ids_TK.dtype).max).amin(dim=-1)


def accepted(proposals_T: Tensor, teacher_top_ids_TK: Tensor) -> Tensor:
    """SelecTKD, greedy: whether the student's proposal is one of the teacher's K likeliest tokens, bool (T,).

    About the proposal at a position, not about the token that was sampled there.
    """
    return (proposals_T[:, None] == teacher_top_ids_TK).any(dim=-1)


def acceptance_weights(accepted_T: Tensor, reject_weight: float) -> Tensor:
    """SelecTKD: V_t, 1 where accepted and `reject_weight` (its beta; 0 masks) elsewhere, float32 (T,)."""
    return torch.where(accepted_T, 1.0, reject_weight)


def sigma_weights(sums: Mapping[str, tuple[int, float, float]]) -> dict[str, float]:
    """DN-MOPD: w_d = sigma_all / sigma_d, clipped to [0.25, 4], for each branch of a step that mixes several.

    `sums` has for each branch the number of its tokens, and the sums of their gaps and of their squared gaps. sigma_d is
    the population standard deviation of the branch's gaps, sigma_all that of all tokens together. The weight is 1 where
    either is 0 or of fewer than two tokens. It multiplies the advantages; nothing is centred, every sign stays.
    """
    everything = _sigma(*(sum(column) for column in zip(*sums.values(), strict=True))) if sums else 0.0
    weights = {}
    for branch, branch_sums in sums.items():
        sigma = _sigma(*branch_sums)
        low, high = SIGMA_BOUNDS
        weights[branch] = min(max(everything / sigma, low), high) if everything > 0 and sigma > 0 else 1.0
    return weights


def _sigma(count: float, total: float, squares: float) -> float:
    if count < 2:
        return 0.0
    variance = squares / count - (total / count) ** 2
    return math.sqrt(variance) if variance > 1e-12 * squares / count else 0.0  # what rounding leaves of equal gaps
