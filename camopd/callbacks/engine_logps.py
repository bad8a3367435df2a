"""`student_logps: auto`: in which steps the rollout engine's log-probs take the place of a forward of the student."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..guards import log_ratio_bound
from ..metrics import token_mean
from ..step import Step, StepCallback


# How many times |gap| has to be |log ratio|, both the mean over a branch's tokens: what the engine's log-probs put into a
# score is then at most a tenth of it. As the two are independent, and the sign of a log ratio is any, it is far less:
# E|gap + noise| is |gap| (1 + O(1 / MARGIN^2)).
MARGIN = 10
STATE = "camopd/engine_logps"  # in trainer_state.json


class EngineLogps(StepCallback):
    """Decides before the rollouts of a step whether scoring takes the engine's log-probs.

    With `auto` that is where the latest step of each of the step's branches has shown that they are as good: trainer and
    engine no further apart than rounding (`log_ratio_bound`), and the branch's gaps at least `MARGIN` times as large. So
    the first step of a branch takes the trainer's, and so does one whose teacher is the student still: its gaps are then
    exactly 0, of which the engine's log-probs would make noise. Every step measures anew, by the forward of scoring or
    that of the loss, so that what parts the two need not be known: types, autocast, padding, caches, kernels.

    All ranks decide alike. What decides is in the trainer's state, and so in checkpoints.
    """

    def __init__(self, args: Any, dtype: torch.dtype, needs_entropy: bool):
        """
        Args:
            args: of the run.
            dtype: that the student computes in.
            needs_entropy: whether the token rule has the student's forward anyway.
        """
        self._dtype = dtype
        self._always = args.student_logps == "engine"
        # With dropout, or an update between, the engine's log-probs are others than the loss's by more than rounding.
        self._never = needs_entropy or not args.disable_dropout or bool(args.rollout_lag)
        self._as_good: dict[str, bool] = {}  # of each branch, by its latest step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with what the run has shown so far; what it shows from here on is in the state at once."""
        self._as_good = state.stateful_callbacks.setdefault(STATE, {"args": {}, "attributes": {}})["attributes"]

    def on_step_started(self, step: Step) -> None:
        """Decide."""
        known = all(self._as_good.get(branch, False) for branch in step.branches)
        step.engine_logps = self._always or (known and not self._never)

    def on_step_closed(self, step: Step) -> None:
        """See how far apart trainer and engine were, over all ranks."""
        tokens = sum(row.num_ratios for row in step.summaries)
        log_ratio = math.nan
        if tokens:
            measured = sum(row.log_ratio for row in step.summaries) / tokens
            log_ratio = step.log_ratio if step.engine_logps else measured  # of the loss's forward, or scoring's
        bound = log_ratio_bound(0, self._dtype) or 0.0
        for branch in step.branches:
            gap = token_mean([row for row in step.summaries if row.branch == branch], "gap_abs")
            # Either may be NaN: of an engine without log-probs, of completions without a token.
            self._as_good[branch] = log_ratio <= bound and gap >= MARGIN * log_ratio and gap > 0
