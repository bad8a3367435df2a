"""DN-MOPD: the branches of a mixed step are brought to one spread of their gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping


SIGMA_BOUNDS = (0.25, 4.0)  # the same in all of DN-MOPD's runs


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
