"""What `divergence: top_k` asks the teacher for."""

from __future__ import annotations

from typing import Any

from ..errors import CaMOPDError
from ..samples import Sample
from ..teachers.base import TokenScores
from .base import TokenRule


class TopK(TokenRule):
    """CaMOPD's tokens, with the teacher's `divergence_top_k` likeliest at each of them."""

    def __init__(self, args: Any):
        self.teacher_top_k = args.divergence_top_k

    def read_teacher(self, sample: Sample, scores: TokenScores, teacher: str) -> None:
        """The likeliest tokens and their log-probs, (T, K). Raises `CaMOPDError` where it gave others or none."""
        wanted = (len(scores.logps), self.teacher_top_k)
        for name, found in (("top_ids", scores.top_ids), ("top_logps", scores.top_logps)):
            if found is None or tuple(found.shape) != wanted:
                raise CaMOPDError(
                    f"teacher {teacher!r} gave {name} of shape {None if found is None else tuple(found.shape)} where "
                    f"divergence='top_k' needs {wanted}. Its `score` must return the top_k likeliest tokens at each "
                    "position, see camopd.Teacher."
                )
            sample.seen[f"teacher_{name}"] = found
