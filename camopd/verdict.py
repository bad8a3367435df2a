"""Did a branch recover, and is the other one kept? What held-out gaps before and after a run say, in numbers and words.

A gap here is the sampled reverse KL of the student to the branch's teacher, in nats per token, mean over held-out prompts.
Pure: no file, no torch. The console, the report, the model card and `camopd gaps` all show what is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from .words import counted


FEWEST = 8  # prompts, below which no verdict is given
SAME = 0.01  # nats per token, below which a model is its teacher: what rounding of 16 bits alone makes
HALF = 0.5  # share of the gap from which on a branch has recovered, and not in part
KEPT = 0.1  # of the largest gap of the run before it: a branch whose gap was less is kept if it has moved less
# Tokens of an answer on average, below which a gap is one of almost no text; an end of sequence is one.
ALMOST_NONE = 3.0
# Of the tokens before: a student whose answers have so few has changed what it says, not how near it is.
SHORTER = 0.25
POWER = 0.8  # with which the smallest change that can be shown is found
NOT_MEASURED = (
    "whether the model recovered is not known: no held-out prompts were measured. Set eval_prompts (eval_dataset), "
    "eval_on_start: true, eval_strategy: steps, and eval_steps that end with the run; of a finished model, "
    "`camopd gaps MODEL --config RUN.yaml` measures them"
)


@dataclass(frozen=True)
class Measured:
    """One evaluation of a branch."""

    step: int  # optimizer steps of the model that was measured
    kl: float  # nats per token, mean over prompts
    se: float  # standard error over prompts
    prompts: int
    by_prompt: tuple[float | None, ...] = ()  # `None` for an empty completion; () where it was not kept
    of: str = ""  # which prompts
    gap_abs: float = math.nan  # mean |gap|
    length: float = math.nan  # tokens of an answer on average, the empty ones included; NaN where it is not known
    max_tokens: int | None = None  # of an answer, where that is known
    teacher: str = ""  # public name of the model, where that is known

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval; NaN for a single prompt."""
        return t_quantile(self.prompts - 1) * self.se if self.prompts > 1 else math.nan


@dataclass(frozen=True)
class Change:
    """After minus before, over the same prompts."""

    value: float  # nats per token
    se: float
    prompts: int
    paired: bool  # from the differences of each prompt; else from two standard errors, which is wider than it need be
    share: float  # of the gap before that is gone: 1 - after / before
    share_se: float

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval."""
        return t_quantile(self.prompts - 1) * self.se if self.prompts > 1 else math.nan

    @property
    def smallest(self) -> float:
        """The change that so many prompts find four times in five, at the 5 % level: (t + 0.84) standard errors."""
        return self.half + NormalDist().inv_cdf(POWER) * self.se


@dataclass(frozen=True)
class Verdict:
    """What a run says of a branch."""

    branch: str
    state: str  # "recovered", "in part", "not recovered", "not shown", "kept", "moved", "not settled", "not known"
    words: str  # a clause, without a full stop
    limits: str = ""  # what so many prompts can show, in a sentence
    before: Measured | None = None
    after: Measured | None = None
    change: Change | None = None
    small: bool = False  # the gap before was too small to recover: the branch is judged by how far it has moved

    @property
    def text(self) -> str:
        """All of it, as plain text."""
        return f"{self.words}. {self.limits}".strip()


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, within 0.001 from 7 degrees of freedom on (Abramowitz and Stegun 26.7.5).

    Raises `ValueError` below one degree.
    """
    if freedom < 1:
        raise ValueError(f"Student's t needs a degree of freedom, got {freedom}.")
    if freedom < 4:  # where the series is too short
        return (12.706, 4.303, 3.182)[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def unseen(items: int) -> float:
    """The largest share, at 95 %, of what none of so many items shows (Clopper and Pearson, 1934).

    >>> round(unseen(10), 3), round(unseen(96), 3)
    (0.308, 0.038)
    """
    return float(1 - 0.025 ** (1 / items))


def change_of(before: Measured, after: Measured) -> Change:
    """What has changed between two evaluations.

    Paired, over the prompts that both have measured, where both kept their values and are of the same prompts: the standard
    error is that of the differences, and that of the share follows from the residuals a - R b of the ratio R of the means
    (the delta method). Else the two standard errors add up as those of independent samples.
    """
    if before.of == after.of and len(before.by_prompt) == len(after.by_prompt):
        pairs = [
            (b, a)
            for b, a in zip(before.by_prompt, after.by_prompt, strict=True)
            if b is not None and a is not None and math.isfinite(b) and math.isfinite(a)
        ]
        if len(pairs) > 1:
            start, end = (fmean(values) for values in zip(*pairs, strict=True))
            ratio = end / start if start > 0 else math.nan
            root = math.sqrt(len(pairs))
            share_se = stdev(a - ratio * b for b, a in pairs) / root / start if start > 0 else math.nan
            return Change(end - start, stdev(a - b for b, a in pairs) / root, len(pairs), True, 1 - ratio, share_se)
    ratio = after.kl / before.kl if before.kl > 0 else math.nan
    share_se = math.hypot(after.se, ratio * before.se) / before.kl if before.kl > 0 else math.nan
    prompts = min(before.prompts, after.prompts)
    return Change(after.kl - before.kl, math.hypot(before.se, after.se), prompts, False, 1 - ratio, share_se)


def verdicts_of(found: Mapping[str, Sequence[Measured]], last_step: int | None = None) -> list[Verdict]:
    """A verdict for each branch of `found`, which maps it to its evaluations in their order.

    `last_step` is that of the model in hand; an evaluation of an earlier one is named as such.
    """
    ends = {branch: _ends(measured) for branch, measured in found.items()}
    starts = [before.kl for before, _ in ends.values() if before is not None and before.kl >= SAME]
    elsewhere = {branch: max((each.step for each in measured), default=0) for branch, measured in found.items()}
    largest = max(starts, default=0.0)
    return [_verdict(branch, *ends[branch], elsewhere[branch], largest, last_step) for branch in found]


def _ends(measured: Sequence[Measured]) -> tuple[Measured | None, Measured | None]:
    """The evaluation before the first step, and the last one after it, of the same prompts."""
    before = next((each for each in measured if each.step == 0), None)
    later = [each for each in measured if each.step > 0 and (before is None or each.of == before.of)]
    return before, later[-1] if later else None


def _verdict(
    branch: str, before: Measured | None, after: Measured | None, elsewhere: int, largest: float, last_step: int | None
) -> Verdict:
    """`elsewhere` is the last step that was measured, on whichever prompts."""
    if before is None or after is None:
        if before is not None:
            words = f"{branch}: not known yet, its gap before the run is {_with_error(before)}, and none was measured after"
            if elsewhere > 0:
                words = (
                    f"{branch}: not known, its gap before the run is {_with_error(before)}, and that at step {elsewhere} "
                    "was measured on other prompts (eval_prompts), so the two cannot be compared"
                )
            return Verdict(branch, "not known", words, before=before)
        if after is None:
            return Verdict(branch, "not known", f"{branch}: not measured on held-out prompts")
        words = (
            f"{branch}: not known, its gap at step {after.step} is {_with_error(after)}, and none was measured before the "
            "first step; `eval_on_start: true` does that"
        )
        return Verdict(branch, "not known", words, after=after)
    change = change_of(before, after)
    allowed = max(SAME, KEPT * largest)
    small = abs(before.kl) < allowed
    state, words = _judge(branch, before, after, change, largest, allowed if small else None)
    late = "" if last_step in (None, after.step) else f" (measured at step {after.step} of {last_step})"
    words += late + _emptiness(before, after)
    return Verdict(branch, state, words, _limits(before, change, state, small), before, after, change, small)


def _emptiness(before: Measured, after: Measured) -> str:
    """What is to be said of answers with hardly any tokens, whose gap says little of the model; else nothing."""
    said = ""
    for each, when in ((before, "before"), (after, "after")):
        empty = sum(value is None for value in each.by_prompt)
        if 2 * empty >= len(each.by_prompt) > 0:
            said += f"; {empty} of {len(each.by_prompt)} answers {when} are EMPTY and have no gap"
    known = f", {before.length:.1f} before" if math.isfinite(before.length) else ""
    if after.length < ALMOST_NONE:
        return f"{said}; its answers are almost EMPTY, {after.length:.1f} tokens on average{known}: a gap of almost no text"
    if after.length < SHORTER * before.length:
        return f"{said}; its answers have become SHORT, {after.length:.1f} tokens on average{known}"
    return said


def _judge(
    branch: str, before: Measured, after: Measured, change: Change, largest: float, allowed: float | None
) -> tuple[str, str]:
    """`allowed` is how far a branch may move away that has nothing to recover; `None` of one that has."""
    moves = f"{short(before.kl)} → {short(after.kl)}"
    if change.prompts < FEWEST or not math.isfinite(change.half):
        few = "is too few" if change.prompts == 1 else "are too few"
        if not change.prompts:
            return "not settled", f"{branch}: no held-out prompt has an answer before and after"
        return "not settled", f"{branch}: {counted(change.prompts, 'held-out prompt')} {few} to tell ({moves})"
    low, high = change.value - change.half, change.value + change.half
    moves += f", change {signed(change.value)} ({signed(low)} to {signed(high)})"
    if allowed is not None:
        away = f" by {_percent(change.value / largest)} of the largest gap before" if largest else ""
        if high <= allowed:
            by = f", a change of {_percent(change.value / largest, '+')} of the largest gap before" if largest else ""
            return "kept", f"{branch} is kept{by}: {moves}"
        if low > allowed:
            return "moved", f"{branch} has MOVED AWAY from its teacher{away}: {moves}"
        return "not settled", f"{branch}: whether it is kept is not settled: {moves}"
    if low > 0:
        return "not recovered", f"{branch} has NOT recovered, it has moved further away: {moves}"
    if before.kl - before.half <= 0:
        return (
            "not settled",
            f"{branch}: nothing to recover that {before.prompts} prompts can tell from no gap at all: {moves}",
        )
    half = t_quantile(change.prompts - 1) * change.share_se
    worst, best = change.share - half, change.share + half
    share = f"{change.share:.0%} of its gap ({worst:.0%} to {best:.0%})"
    if high < 0:
        if worst >= HALF:
            return "recovered", f"{branch} HAS RECOVERED {share}: {moves}"
        return "in part", f"{branch} has recovered IN PART, {share}: {moves}"
    if best < HALF or change.value >= 0:
        return "not recovered", f"{branch} has NOT recovered: {moves}"
    return "not shown", f"{branch} is not shown to have recovered: {moves}"


def _percent(share: float, sign: str = "") -> str:
    """Without decimals, and below a percent with one."""
    return f"{share:{sign}.{0 if abs(share) >= 0.0095 else 1}%}"


def _limits(before: Measured, change: Change, state: str, small: bool) -> str:
    """What so many prompts can show."""
    if not math.isfinite(change.smallest) or change.smallest <= 0:
        return ""
    has_gap = before.kl >= SAME and not small
    of_gap = f" ({change.smallest / before.kl:.0%} of the gap)" if has_gap else ""
    text = f"{change.prompts} prompts find a change of {short(change.smallest)}{of_gap} four times in five"
    wanted = HALF * before.kl
    if state in ("not recovered", "not shown", "not settled") and has_gap and change.smallest > wanted:
        needed = math.ceil(change.prompts * (change.smallest / wanted) ** 2)
        text += f"; to find half of the gap takes about {needed:,}"
    return f"{text}." if change.paired else f"{text} (not paired: the values of single prompts were not kept)."


def short(value: float) -> str:
    """Nats per token: three decimals, of smaller values the first digit, and - for none."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:.0e}"


def signed(value: float) -> str:
    """As `short`, with its sign."""
    return ("+" if value >= 0 else "") + short(value)


def _with_error(measured: Measured) -> str:
    return f"{short(measured.kl)} ± {short(measured.half)} (95 %, {counted(measured.prompts, 'prompt')})"


def interval(middle: float, half: float) -> str:
    """A value and its 95 % interval."""
    return short(middle) if not math.isfinite(half) else f"{short(middle)} ± {short(half)}"


def rows_of(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """The numbers as a table: its head, and a row for each branch. Intervals of 95 %, nats per token."""
    values = (f"{name} ± 95 %" for name in ("before", "after", "change", "recovered"))
    rows = [["branch", *values, "prompts", "smallest change found"]]
    for verdict in verdicts:
        ends = [interval(each.kl, each.half) if each else "not measured" for each in (verdict.before, verdict.after)]
        cells = ["", "", "", ""]
        change, before = verdict.change, verdict.before
        if change is not None and before is not None:
            told = not verdict.small and before.kl > before.half and math.isfinite(change.share)
            spread = t_quantile(change.prompts - 1) * change.share_se if change.prompts > 1 else math.nan
            share = f"{change.share:.0%} ± {spread:.0%}" if told and math.isfinite(spread) else ""
            smallest = short(change.smallest) if math.isfinite(change.smallest) else ""
            cells = [interval(change.value, change.half), share, str(change.prompts), smallest]
        rows.append([verdict.branch, *ends, *cells])
    return rows
