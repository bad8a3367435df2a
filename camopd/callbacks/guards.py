"""The guards on a run's numbers; their thresholds are in camopd/guards.py, and scoring.py has that of log-probs.

All of them look at what every rank has already, so that all ranks decide alike without waiting for each other.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import GuardError
from ..guards import LEAST, SPARE, log_ratio_bound, rounding_bound, stop
from ..rejected import keep, keeping, said
from ..samples import SampleSummary
from ..step import Step, StepCallback
from ..token_rules import rule_of


logger = logging.getLogger(__name__)

SHOWN = 8  # positions in a message
UNSEEN = 5  # lagged steps for each server in use without a look at the weights of one, before a warning
FEW = 8  # completions of a branch in a mixed step, below which all of them may be alike by chance


class Guards(StepCallback):
    """Skips optimizer steps that are not finite, stops a run whose numbers are surely wrong, and warns once of odd ones.

    DeepSpeed steps inside the last backward, and skips a step by itself where its norm of the gradient is not finite, but
    with `bf16: {check_grad_overflow: false}`. Where it has stepped with such numbers, the run stops before anything is
    saved.
    """

    def __init__(
        self,
        args: Any,
        scores: Mapping[str, str],
        deepspeed: bool,
        dtype: torch.dtype = torch.float32,
        exact: Collection[str] = (),
    ):
        """
        Args:
            args: of the run; `args.guards` has the thresholds.
            scores: kind of each branch's score, "absolute" or "positive".
            deepspeed: whether DeepSpeed steps the optimizer.
            dtype: that the student computes in.
            exact: branches whose teacher scores in the very batches of the student, and so without any rounding between.
        """
        self._args, self._limits, self._scores = args, args.guards, scores
        self._deepspeed, self._dtype, self._exact = deepspeed, dtype, exact
        self._skipped = 0  # steps in a row
        self._closed = self._idle = 0  # steps since the start or resume, and those of them that were skipped
        zero = torch.zeros(1, 1)
        # Whether tokens without a gap are trained, by which a step of rounding is none.
        self._trains_zeros = bool(rule_of(args).advantages(zero, zero == 0).any())
        self._rounding = False  # whether the gaps of the step under way are all rounding
        self._updated = not args.learning_rate  # whether gaps may have moved; a rate of 0 throughout never moves them
        self._step: Step | None = None
        self._steps: Counter[str] = Counter()  # of each branch, since the start or resume
        self._unseen: Counter[str] = Counter()  # by server: lagged steps since its weights were last compared
        self._late: set[str] = set()  # those that were warned of
        self._ahead: dict[
            str, tuple[float, int]
        ] = {}  # by server: what was compared, while it is less than LEAST tokens
        self._entropy: dict[str, float] = {}  # of each branch's first one
        self._warned: set[str] = set()

    # ------------------------------------------------------------------------------------------- what was rolled out

    def on_evaluation_scored(self, rows: Sequence[SampleSummary]) -> None:
        """An evaluation of another model than the one in hand may decide which checkpoint is the best."""
        try:
            self._look_at_sampler([(row.server, row.log_ratio, row.num_ratios) for row in rows], lag=0)
        except GuardError as error:
            raise GuardError(f"evaluation: {error}") from None

    def on_step_ready(self, step: Step) -> None:
        """Look at completions, gaps and entropies of all ranks."""
        self._step = step
        step.metrics["guard/skipped"] = 0.0
        self._rounding = not self._trains_zeros and all(self._is_rounding(step, branch) for branch in step.branches)
        step.metrics["guard/rounding"] = float(self._rounding)
        rows = step.summaries
        self._look_at_sampler([(row.server, row.log_ratio, row.num_ratios) for row in rows], lag=step.lag)
        self._look_at_ahead(step)
        self._look_at_completions(step)
        for branch in step.branches:
            self._steps[branch] += 1 if self._updated or not self._steps[branch] else 0
            self._look_at_gaps(step, branch)
            self._look_at_entropy(step, branch)

    def _look_at_ahead(self, step: Step) -> None:
        """Each comparison is of a completion or two, each with the weights of its own step: they are added up."""
        for server, apart, tokens in step.ahead_apart:
            before = self._ahead.pop(server, (0.0, 0))
            self._ahead[server] = (before[0] + apart, before[1] + tokens)
        self._look_at_sampler([(server, *of) for server, of in self._ahead.items()], lag=0, spare=SPARE)
        self._ahead = {server: of for server, of in self._ahead.items() if of[1] < LEAST}
        if not step.lag or self._limits["log_ratio"] != 0:  # a bound that was set holds for a lagged step, too
            return
        # Without one the log-probs of the step itself tell nothing of its servers, since they are of the weights before.
        writers = {row.server for row in step.summaries}
        self._unseen.update(writers)
        for server, *_ in step.ahead_apart:
            del self._unseen[server]
            self._late.discard(server)
        # With more servers than ranks not all can be looked at in a step.
        late = {server for server in writers if self._unseen[server] >= UNSEEN * len(writers)} - self._late
        self._late |= late
        if late:
            logger.warning(
                "%s: whether %s has the student's weights was not seen in %d steps: no completion of the next step was "
                "finished there when a step was scored, or others had their turn. Look at importance/log_ratio, or bound "
                "it (guards: log_ratio).",
                said(step), " and ".join(sorted(late)), UNSEEN * len(writers),
            )  # fmt: skip

    def _look_at_sampler(self, parts: Sequence[tuple[str, float, int]], lag: int, spare: int = 0) -> None:
        """Stop where the tokens were not drawn from the student that is trained, by one of the rollout servers or by all.
        With the trainer's log-probs scoring knows it, with the engine's the loss's forwards. For the arguments see
        `log_ratio_of`."""
        given = self._limits["log_ratio"]
        # With an update between them, they are apart by more than rounding: then the user's threshold alone counts.
        limit = None if lag and not given else log_ratio_bound(given, self._dtype)
        if limit is None:
            return
        log_ratio, server = log_ratio_of(parts, limit, spare)
        if log_ratio > limit:
            whose, dtype = f"server at {server}" if server else "engine", str(self._dtype).removeprefix("torch.")
            raise stop(
                "log_ratio", limit,
                f"the log-probs of the trainer and of the rollout {whose}, for the same tokens, are {log_ratio:.3g} nats "
                f"per token apart, more than rounding to {dtype} makes. The completions are drawn from another model than "
                "the one that is trained. Look at the engine's weights (the student of before, or without its LoRA "
                "adapter: were they synced?), its dtype and quantization, and its version, in this order",
            )  # fmt: skip

    def _look_at_completions(self, step: Step) -> None:
        of_branch = {branch: [row for row in step.summaries if row.branch == branch] for branch in step.branches}
        parts = [(f" of branch {branch!r}", rows) for branch, rows in of_branch.items() if len(rows) >= FEW]
        for whose, rows in [("", step.summaries), *(parts if len(step.branches) > 1 else ())]:
            limit = self._limits["degenerate"]
            silent = [row.position for row in rows if says_nothing(row)]
            if limit is not None and len(silent) >= limit * len(rows):
                raise stop(
                    "degenerate", limit,
                    f"{len(silent)} of {len(rows)} completions{whose} are empty, an end of sequence alone, or one token "
                    f"repeated ({places(silent)}): the student says nothing that it could be trained by. Look at the "
                    "completions, the chat template and the learning rate",
                )  # fmt: skip
            limit = self._limits["truncated"]
            cut = sum(row.truncated for row in rows)
            if limit is not None and cut >= limit * len(rows):
                self._warn(
                    "truncated", step,
                    f"{cut} of {len(rows)} completions{whose} are cut at max_completion_length: the student does not get "
                    "to learn how to end. Raise max_completion_length, unless this is meant",
                )  # fmt: skip

    def _look_at_gaps(self, step: Step, branch: str) -> None:
        limit = self._limits["zero_gap"]
        if limit is None or self._steps[branch] < limit or self._scores[branch] != "absolute":
            return
        rows = [row for row in step.summaries if row.branch == branch and row.num_tokens]
        if rows and not any(row.gap_abs for row in rows):
            self._warn(
                "zero_gap", step,
                f"all gaps of branch {branch!r} are exactly 0: its teacher and the student are the same model, and nothing "
                "is learned from it. Check the teacher of that branch, and the learning rate",
            )  # fmt: skip

    def _is_rounding(self, step: Step, branch: str) -> bool:
        """Whether no gap of a branch's tokens is more than two computations of one model differ by."""
        roundings = self._limits["rounding"]
        rows = [row for row in step.summaries if row.branch == branch and row.num_tokens]
        if roundings is None or not rows:
            return False
        largest = max(row.gap_largest for row in rows)
        if branch in self._exact and not step.engine_logps:
            return largest == 0
        if step.engine_logps and any(row.num_ratios < row.num_tokens for row in rows):
            return False  # without a log-prob of the engine a gap counts as 0 at selection, and not in the loss
        return largest <= rounding_bound(roundings, self._dtype, max(row.logp_largest for row in rows))

    def _look_at_entropy(self, step: Step, branch: str) -> None:
        limit, now = self._limits["entropy"], step.metrics[f"rollout/{branch}/entropy"]
        if limit is None or not math.isfinite(now):  # not computed with the engine's log-probs
            return
        first = self._entropy.setdefault(branch, now)
        if now < limit * first:
            self._warn(
                "entropy", step,
                f"the entropy of branch {branch!r} is {now:.3g} nats per token, {now / first:.1%} of that of its first "
                "step: the student has all but one way to go on. Lower the learning rate or the scale of the branch",
            )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ loss and gradient

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Skip a step whose loss or gradient is not finite: without gradients no optimizer moves a weight or a moment.

        Raises `GuardError` where as many have been skipped in a row as may be, and where DeepSpeed has not skipped it.
        """
        step, limit = self._step, self._limits["skipped_steps"]
        if step is None:
            return
        with keeping(step, self._args):
            servers = {row.position: row.server for row in step.summaries}
            self._look_at_sampler([(servers[place], *apart) for place, apart in step.apart.items()], lag=step.lag)
        skipped = self._deepspeed and bool(optimizer.step_was_skipped)
        step.metrics["guard/skipped"] = float(skipped)
        wrong = _of_losses(step.broken_losses) or _of_norm(math.inf if skipped else step.metrics.get("grad_norm", 0.0))
        if wrong and limit is None:
            return
        if not wrong:
            self._skipped = 0
            if self._rounding:
                self._skip_rounding(step, optimizer)
            return
        if not step.broken_losses:
            wrong += f", of the {len(step.kept)} samples that were kept ({places(list(step.kept))})"
        self._skipped += 1
        stepped = self._deepspeed and not skipped
        if stepped or self._skipped > limit:
            wrong += f", after {limit:g} skipped steps" if limit and not stepped else ""
            wrong += ", and DeepSpeed has stepped with it; nothing has been saved since" if stepped else ""
            with keeping(step, self._args):
                raise stop("skipped_steps", limit, f"{wrong}. Look at the learning rate, the weights and the teachers")
        if not self._deepspeed:
            _forget_gradients(optimizer)
        step.metrics["guard/skipped"] = 1.0
        logger.warning(
            "%s: %s. This optimizer step is skipped, weights and moments stay as they are; %s%s", said(step), wrong,
            f"at {limit + 1:g} in a row the run stops (guards: skipped_steps), and this is number {self._skipped}.",
            keep(step, self._args, wrong),
        )  # fmt: skip

    def _skip_rounding(self, step: Step, optimizer: Any) -> None:
        """Adam divides a gradient by its own size: of rounding it would make a step as long as any other, and of zeros one
        more along the moments of other branches."""
        largest = max(row.gap_largest for row in step.summaries)
        what = "exactly 0" if largest == 0 else f"rounding, at most {largest:.2g} nats"
        if self._deepspeed:
            done = "DeepSpeed has stepped all the same"
        else:
            _forget_gradients(optimizer)
            step.metrics["guard/skipped"] = 1.0
            done = "This optimizer step is skipped, weights and moments stay as they are"
        logger.warning(
            "%s: all gaps are %s: its teacher says what the student says. %s (guards: rounding).",
            said(step),
            what,
            done,
        )

    def on_step_closed(self, step: Step) -> None:
        """The band, which is known after the update."""
        self._step = None  # and with it its samples
        self._closed += 1
        self._idle += bool(step.metrics["guard/skipped"])
        self._updated |= step.metrics["learning_rate"] > 0 and (self._rounding or not step.metrics["guard/skipped"])
        limit = self._limits["outside_band"]
        outside = step.metrics.get("importance/outside_band", 0.0)
        if limit is not None and step.metrics["importance/active"] and outside > limit:
            self._warn(
                "outside_band", step,
                f"{outside:.1%} of the tokens have an importance ratio outside [importance_sampling_low, "
                "importance_sampling_high]: trainer and rollout engine disagree. Compare their weights, dtype and versions "
                "(importance/log_ratio in metrics.jsonl)",
            )  # fmt: skip

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that has trained nothing says so beside its verdict, which may well be that all is kept."""
        if self._closed and self._idle == self._closed:
            logger.warning(
                "nothing was trained: all %d steps since the start were skipped, each with its reason above, and the model "
                "is the one that they began with. Check the teachers.", self._closed,
            )  # fmt: skip

    def _warn(self, name: str, step: Step, text: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning(
                "%s: %s. Said once. The threshold is guards[%r]=%s; null switches this off.",
                said(step),
                text,
                name,
                self._limits[name],
            )


def says_nothing(row: SampleSummary) -> bool:
    """Whether a completion is empty, an end of sequence alone, or one token repeated."""
    return row.length == 0 or (row.length == 1 and not row.truncated) or row.repeats


def _forget_gradients(optimizer: Any) -> None:
    """Without gradients no optimizer moves a weight or a moment."""
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        param.grad = None


def places(positions: list[int]) -> str:
    """Places in the step's global batch, the first few of them."""
    more = f" and {len(positions) - SHOWN} more" if len(positions) > SHOWN else ""
    return f"positions {', '.join(map(str, sorted(positions)[:SHOWN]))}{more}"


def _of_losses(found: list[tuple[list[int], float]]) -> str:
    """Micro-batches, by the positions of their samples, with their losses."""
    return "; ".join(f"the loss of {places(at) if at else 'no sample'} is {loss}" for at, loss in found)


def _of_norm(norm: float) -> str:
    # DeepSpeed's sign for a norm that it could not compute is -1 or inf.
    return "" if math.isfinite(norm) and norm >= 0 else f"the norm of the gradient is {norm}, and the loss is finite"


def log_ratio_of(parts: Iterable[tuple[str, float, int]], limit: float, spare: int = 0) -> tuple[float, str]:
    """How far the trainer's log-probs are from the rollout engine's, in nats per token: the mean over all parts, or the
    largest of those of single rollout servers that are surely above `limit`; and that server's URL, else "".

    Surely: with `SPARE` tokens more that are alike to the bit. So a server with few tokens stops a run for a distance that
    no chance makes, and not for a token or two. The mean over all has to be above with `spare` more.

    A part is the server that wrote it, the sum over its tokens, and their number.
    """
    sums: dict[str, tuple[float, int]] = {}
    for writer, apart, tokens in parts:
        for server in {"", writer}:
            total, count = sums.get(server, (0.0, 0))
            sums[server] = (total + apart, count + tokens)
    means = [(0.0, "")]
    for server, (total, count) in sums.items():
        more = SPARE if server else spare
        if not more or total > limit * (count + more):
            means.append((total / max(1, count), server))
    return max(means)
