"""CaMOPD in tensors, equation by equation: https://arxiv.org/abs/2605.27115

Everything the paper defines is in this file, in the paper's order: log-probabilities go in, numbers come out. Nothing
here knows about TRL, vLLM, files or processes. What is *not* here, because the method has none of it: a reward, a value
function, a KL penalty, a ratio clip. Each rollout serves exactly one update.

Shape suffixes:  B rows   N rows of the whole optimizer step   T completion tokens, right-padded
`mask_BT` is True on the tokens the student sampled. Log-probs outside it may be anything, including -inf and NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


SCORE_KINDS: tuple[str, ...] = ("absolute", "positive")
IMPORTANCE_MODES: tuple[str, ...] = ("mask", "truncate", "none")


class Selection(NamedTuple):
    """Result of Eq. 8. `kept` holds row indices by falling score; `degenerate` says that there was no mass to rank by."""

    kept: Tensor  # (k,) int64
    degenerate: bool


def token_gaps(teacher_logps_BT: Tensor, student_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Eq. 1: log pi_T(y_t | h_t) - log pi_theta(y_t | h_t) in nats, detached, 0 outside the mask.

    With the log-probs of rollout time this is the gap Delta of Eq. 6-7, with the current ones the advantage A of Eq. 2
    and 9. Both are the same number when a rollout serves one update.
    """
    return (teacher_logps_BT - student_logps_BT).detach().masked_fill(~mask_BT, 0.0)


def importance_weights(
    train_logps_BT: Tensor,
    rollout_logps_BT: Tensor | None,
    mask_BT: Tensor,
    low: float,
    high: float,
    mode: str = "mask",
) -> Tensor:
    """w_t of Eq. 2 and 9: pi_theta / mu_theta, trainer over rollout engine, detached, 0 outside the mask.

    The paper keeps "the MOPD importance sampling core" and names no formula; this is MiMo-V2-Flash Eq. 8
    (https://arxiv.org/abs/2601.02780), whose bounds are inclusive:

    * `"mask"`: the ratio inside [low, high], 0 outside (a mask with ratio, not a clamp);
    * `"truncate"`: the ratio clamped to [low, high];
    * `"none"`: 1.

    Without rollout log-probs the weight is 1 on the mask, and likewise on single tokens whose rollout log-prob is NaN.
    """
    if mode not in IMPORTANCE_MODES:
        raise ValueError(f"mode must be one of {IMPORTANCE_MODES}, got {mode!r}.")
    ones_BT = mask_BT.to(train_logps_BT.dtype)
    if rollout_logps_BT is None or mode == "none":
        return ones_BT
    # The padding may hold -inf on both sides: its ratio would be NaN, which masked_fill removes and a product would not.
    ratio_BT = torch.exp((train_logps_BT - rollout_logps_BT).detach())
    if mode == "mask":
        ratio_BT = ratio_BT.masked_fill((ratio_BT < low) | (ratio_BT > high), 0.0)
    else:
        ratio_BT = ratio_BT.clamp(low, high)
    return torch.where(rollout_logps_BT.isnan(), ones_BT, ratio_BT).masked_fill(~mask_BT, 0.0)


def gap_scores(gaps_BT: Tensor, mask_BT: Tensor, kind: str) -> Tensor:
    """How much correction each sample asks for, in nats per token, as float64 (B,).

    * `"absolute"`, Eq. 6: mean |gap|. Any deviation from the general teacher is a recovery signal.
    * `"positive"`, Eq. 7: mean max(gap, 0). Only what the domain teacher finds likelier than the student counts as
      forgotten. This is about ranking; the loss uses the full signed gap of every token.

    An empty completion scores 0; `select_by_mass` is told by `valid_N` to leave it out.
    """
    if kind == "absolute":
        demand_BT = gaps_BT.abs()
    elif kind == "positive":
        demand_BT = gaps_BT.clamp(min=0)
    else:
        raise ValueError(f"kind must be one of {SCORE_KINDS}, got {kind!r}.")
    return _token_mean(demand_BT.double(), mask_BT)


def select_by_mass(scores_N: Tensor, mass_target: float, valid_N: Tensor | None = None) -> Selection:
    """Eq. 8: the smallest number of highest-scoring samples that hold `mass_target` of the total score.

    `scores_N` are the non-negative scores of the whole step's batch, over all ranks, in the batch's own order; rows
    where `valid_N` is False (empty completions) never enter. Ties go to the earlier row. Zero total mass (0/0 in Eq. 8)
    keeps every valid row and says `degenerate`. `mass_target=1` is the shortest run with *all* the mass: it still drops
    rows that score 0.
    """
    candidates_N = torch.arange(len(scores_N)) if valid_N is None else valid_N.nonzero().flatten().cpu()
    # In float32 the running sum of a large batch loses its smallest samples.
    scores = scores_N.detach().double().cpu()[candidates_N]
    ranked, order = scores.sort(descending=True, stable=True)
    mass = ranked.cumsum(dim=0)
    if len(mass) == 0 or mass[-1] <= 0:
        return Selection(kept=candidates_N, degenerate=True)
    reached = mass / mass[-1] >= mass_target - 1e-12  # four of five scores of 0.7 are 0.8 of their sum
    num_kept = int(reached.int().argmax()) + 1
    return Selection(kept=candidates_N[order[:num_kept]], degenerate=False)


def distillation_loss(
    logps_BT: Tensor,
    gaps_BT: Tensor,
    weights_BT: Tensor,
    mask_BT: Tensor,
    scale: float | Tensor,
    num_kept: int,
    num_tokens: int | None = None,
) -> Tensor:
    """Eq. 2 and 9: mean over a sample's tokens of -w_t (r_b A_t) log pi_theta(y_t), then over the kept samples.

    The rows given are kept samples; `num_kept` counts the kept samples of the whole optimizer step, over ranks and
    micro-batches, so the losses of all micro-batches *add up* to Eq. 9 and their gradients to its gradient. `scale` is
    r_b, or a (B,) tensor of them where a step mixes branches. `gaps_BT` and `weights_BT`, w_t times a token rule's weights
    if any, carry no gradient and are 0 outside the mask. Every token of the completion counts in 1/T_i, also those with
    weight 0.

    With `num_tokens`, which counts tokens of the kept samples of the whole optimizer step, the loss is not Eq. 9: in place
    of the two means the sum over all tokens is divided by it, `num_kept` is not read, and long completions weigh more.
    """
    logps_BT = logps_BT.masked_fill(~mask_BT, 0.0)  # masking the product instead would give 0 * inf = NaN gradients
    per_token_BT = weights_BT * gaps_BT * logps_BT
    if num_tokens is not None:
        return -(scale * per_token_BT.sum(dim=1)).sum() / num_tokens
    return -(scale * _token_mean(per_token_BT, mask_BT)).sum() / num_kept


def _token_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over T of values that are 0 outside the mask, (B,); an empty completion gives 0, not NaN."""
    return values_BT.sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)
