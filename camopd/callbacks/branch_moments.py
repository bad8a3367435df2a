"""The schedule's branch for an optimizer that keeps a first moment per branch."""

from __future__ import annotations

import torch

from ..optimizer import BranchAdamW
from ..schedule import Schedule
from ..step import Step, StepCallback


class BranchMoments(StepCallback):
    """Tells `BranchAdamW` whose moment the coming update belongs to."""

    def __init__(self, schedule: Schedule):
        """`schedule`: that of the run."""
        self._schedule = schedule
        self._optimizer: BranchAdamW | None = None

    def on_optimizer_created(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep it, where it is one."""
        self._optimizer = optimizer if isinstance(optimizer, BranchAdamW) else None

    def on_step_started(self, step: Step) -> None:
        """Name the branch, or the mixture."""
        if self._optimizer is not None:
            self._optimizer.branch = self._schedule.mixture(step.number)
