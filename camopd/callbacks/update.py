"""What an update does to the weights: `update/cosine` and `update/changed_share`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..masters import ChangedShare
from ..optimizer import update_products
from ..step import Step, StepCallback


class UpdateMeasures(StepCallback):
    """The share of the weights that a step changes, and how much of an Adam update is the step's own gradient."""

    def __init__(self, model: Any, gather: Callable[[list[Any]], list[Any]]):
        """`model`: the student, outside wrappers."""
        self._model, self._gather = model, gather
        self._changed: ChangedShare | None = None
        self._products: Tensor | None = None

    def on_optimizer_created(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at each of its steps."""
        weights = self._model.parameters()
        total = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights if weight.requires_grad)
        self._changed = ChangedShare(optimizer, total)

    def on_step_started(self, step: Step) -> None:
        """Count from zero."""
        self._products = None
        if self._changed is not None:
            self._changed.start()

    def on_optimizer_stepped(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """Add the products of one of its updates; ZeRO-3 steps its parameters in several groups."""
        products = update_products(optimizer)
        if products is not None:
            self._products = products if self._products is None else self._products + products

    def on_step_closed(self, step: Step) -> None:
        """Over all ranks."""
        parts = [part for part in self._gather([self._products]) if part is not None]
        cosine = math.nan
        if parts:
            both, update, gradient = torch.stack(parts).sum(dim=0).tolist()
            cosine = both / math.sqrt(update * gradient) if update * gradient > 0 else math.nan
        counts = self._gather([(self._changed.changed, self._changed.compared) if self._changed else (0, 0)])
        changed, compared = (sum(part) for part in zip(*counts, strict=True))
        share = changed / compared if compared else math.nan
        step.metrics.update({"update/cosine": cosine, "update/changed_share": share})
