"""What `divergence: top_k` asks the teacher for."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CaMOPDError
from ..samples import Sample
from ..teachers.base import TokenScores
from .base import TokenRule


# Of distinct tokens. Those that weigh have log-probs above -4, and rounding to bfloat16 moves these probabilities by 0.8 %.
MOST_MASS = 1.02


class TopK(TokenRule):
    """CaMOPD's tokens, with the teacher's `divergence_top_k` likeliest at each of them."""

    def __init__(self, args: Any):
        self.teacher_top_k = args.divergence_top_k

    def read_teacher(self, sample: Sample, scores: TokenScores, teacher: str) -> None:
        """The likeliest tokens and their log-probs, (T, K). Raises `CaMOPDError` where it gave others or none, or such as
        no distribution has: they are what is trained on, and nothing else would show it."""
        wanted = (len(scores.logps), self.teacher_top_k)
        for name, found in (("top_ids", scores.top_ids), ("top_logps", scores.top_logps)):
            if found is None or tuple(found.shape) != wanted:
                raise CaMOPDError(
                    f"teacher {teacher!r} gave {name} of shape {None if found is None else tuple(found.shape)} where "
                    f"divergence='top_k' needs {wanted}. Its `score` must return the top_k likeliest tokens at each "
                    "position, see camopd.Teacher."
                )
            sample.seen[f"teacher_{name}"] = found
        ids, logps = scores.top_ids, scores.top_logps
        assert ids is not None and logps is not None
        mass = logps.float().exp().sum(dim=-1)
        for wrong, what in (
            (~logps.isfinite().all(dim=-1), "a log-prob that is not finite"),
            (mass > MOST_MASS, "probabilities that add up to {mass:.4g}"),
            ((ids.sort(dim=-1).values.diff(dim=-1) == 0).any(dim=-1), "the same token twice"),
            ((ids < 0).any(dim=-1), "a token below 0"),
        ):
            if wrong.any():
                place = int(torch.nonzero(wrong)[0])
                raise CaMOPDError(
                    f"teacher {teacher!r} gave {what.format(mass=mass[place])} among its {self.teacher_top_k} likeliest "
                    f"tokens, at token {place} of the completion of sample {sample.position}. divergence='top_k' "
                    "trains on them. See whether its log-probs are the model's own, before any sampling setting "
                    "(docs/teachers.md)."
                )
