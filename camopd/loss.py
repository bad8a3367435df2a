"""Eq. 9 on a micro-batch: from the weights of the student to the loss, and what may stand in place of the sampled gap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import CaMOPDConfig
from .divergence import Likeliest, Outputs
from .forward import Forward
from .objective import distillation_loss, importance_weights, token_gaps
from .samples import MicroBatch
from .teachers.adapters import OWN
from .teachers.address import is_server, without_secrets
from .teachers.base import Teacher
from .teachers.local import LocalTeacher
from .token_rules import TokenRule
from .tokens import head_size


def _is_exact(args: CaMOPDConfig) -> bool:
    return args.divergence == "full" or args.baseline == "kl"


def need_distributions(args: CaMOPDConfig, teachers: Mapping[str, Any]) -> None:
    """Raise `ValueError` where teachers, by branch, cannot give what `args.divergence` and `args.baseline` need of them:
    as the trainer is given them, or as it has made of that."""
    for branch, teacher in teachers.items():
        outside = is_server(teacher) or (
            isinstance(teacher, Teacher) and not isinstance(teacher, (LocalTeacher, *OWN))
        )
        if outside and _is_exact(args):
            asked = "divergence='full'" if args.divergence == "full" else "baseline='kl'"
            name = without_secrets(repr(getattr(teacher, "name", teacher)))
            raise ValueError(
                f"{asked} needs the whole distribution of every teacher, and that of branch {branch!r}, {name}, is outside "
                "this process. Name a model as the teacher, or set divergence='top_k'."
            )
        if args.divergence == "top_k" and isinstance(teacher, (LocalTeacher, *OWN)):
            need_tokens(args.divergence_top_k, branch, teacher)


def need_tokens(top_k: int, branch: str, teacher: Any) -> None:
    """Raise `ValueError` where a teacher in this process has fewer tokens than `divergence_top_k`."""
    size = head_size(teacher.student if isinstance(teacher, OWN) else teacher.model)
    if top_k > size:
        raise ValueError(
            f"divergence_top_k={top_k} asks for more tokens than the teacher of branch {branch!r}, {teacher.name!r}, has: "
            f"{size}. Set at most {size}, or divergence='full'."
        )


class Loss:
    """The loss of micro-batches of kept samples. The losses of all of a step, on all ranks, add up to Eq. 9."""

    def __init__(self, args: CaMOPDConfig, student: Forward, teachers: Mapping[str, Teacher], rule: TokenRule):
        """Raises `ValueError` where the teachers cannot give what `args.divergence` and `args.baseline` need."""
        self.args, self.student, self.teachers, self.rule = args, student, teachers, rule
        self._exact = _is_exact(args)
        need_distributions(args, teachers)

    def __call__(self, batch: MicroBatch, model: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a micro-batch by `model`, the student in its wrapper, with its log-probs and w_t, (B, T). Pure."""
        args, kl = self.args, None
        if self._exact or args.divergence == "top_k":
            teachers = self._outputs(batch) if self._exact else _likeliest(batch)
            logps, kl = self.student.logps_and_kl(batch.token_ids, batch.prompt_lens, teachers, model=model)
        else:
            logps, _ = self.student.logps(batch.token_ids, batch.prompt_lens, model=model)
        batch = batch.to(logps.device)
        mask = batch.mask
        importance = importance_weights(  # w_t
            logps, batch.rollout_logps, mask,
            args.importance_sampling_low, args.importance_sampling_high, args.importance_sampling_mode,
        )  # fmt: skip
        if args.divergence == "sampled":
            values, advantages, weights = logps, self._advantages(batch, logps, kl), importance
        else:  # w_t is about the token that was sampled, and here none is
            assert kl is not None
            values, weights = kl, mask.to(kl.dtype)
            advantages = -weights
        if batch.token_weights is not None:
            weights = weights * batch.token_weights
        loss = distillation_loss(values, advantages, weights, mask, batch.scale, batch.num_kept, batch.num_tokens)
        return loss, logps, importance

    def _advantages(self, batch: MicroBatch, logps: Tensor, kl: Tensor | None) -> Tensor:
        """What the loss has in place of A_t, (B, T)."""
        # A_t is the gap that scoring found, with the student's log-probs of rollout time. They are those of the current
        # parameters, since a rollout serves one update; and because they were computed in the very batches of an
        # in-process teacher, equal weights give a gap of exactly 0, where this forward would give rounding noise.
        gaps = batch.gaps
        if gaps is None:  # scoring used the rollout engine's log-probs: the loss takes the gap to this forward's
            assert batch.teacher_logps is not None
            gaps = token_gaps(batch.teacher_logps, logps.detach(), batch.mask)
        if self.args.baseline == "kl":  # the mean of A_t over y_t is -KL
            assert kl is not None
            gaps = gaps + kl.detach().masked_fill(~batch.mask, 0.0)
        return self.rule.advantages(gaps, batch.mask)  # CaMOPD: the gaps themselves

    def _outputs(self, batch: MicroBatch) -> list[tuple[list[int], Outputs]]:
        """What each branch's teacher makes of its rows."""
        found = []
        for branch, teacher in self.teachers.items():
            rows = [row for row, name in enumerate(batch.branches) if name == branch]
            assert isinstance(teacher, (LocalTeacher, *OWN))
            if rows:
                ids, lens = zip(*(batch.for_teacher[row] for row in rows), strict=True)
                found.append((rows, teacher.outputs(list(ids), list(lens))))
            elif isinstance(teacher, OWN) and self.args.world_size > 1:
                # It goes through the student's wrapper, where ranks wait for each other, and another rank may have rows.
                teacher.outputs([batch.token_ids[0][:1] * 2], [1])
        return found


def _likeliest(batch: MicroBatch) -> list[tuple[list[int], Likeliest]]:
    if not batch.branches:
        return []
    ids, logps = (torch.cat([seen[name] for seen in batch.seen]) for name in ("teacher_top_ids", "teacher_top_logps"))
    return [(list(range(len(batch.branches))), Likeliest(ids, logps))]
