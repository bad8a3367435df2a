"""Thresholds of the guards on a run's numbers, by name. callbacks/guards.py and scoring.py act on them.

What is surely wrong stops the run before the optimizer; what is merely odd is warned of, once.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .errors import GuardError
from .schedule import short
from .token_rules import TOKEN_RULES


class Guard(NamedTuple):
    """The threshold's default, the test that another one has to pass, and how an error says so."""

    default: float
    test: Callable[[float], bool]
    must_be: str


def _count(least: int) -> Callable[[float], bool]:
    return lambda value: value == int(value) and value >= least


GUARDS = {
    # Optimizer steps in a row that may be skipped for a loss or gradient that is not finite. One can be chance: an overflow
    # on one odd sample. Three in a row, of other prompts each, are the doing of the weights or of a teacher, and every one
    # costs a rollout.
    "skipped_steps": Guard(2, _count(0), "a whole number of at least 0"),
    # Nats. A log-softmax is logit - logsumexp, at most 0. In float32 each of the two rounds by at most 2**-18 for logits
    # below 128, and a sum of 2**18 probabilities, one by one, is off by about 2**-24 * sqrt(2**18) = 3e-5. Rounded to
    # bfloat16, what is not above 0 stays so. 0.01 is hundreds of times that. An engine that does the whole softmax in
    # bfloat16 may come above it, with an error of 2**-9 of the logits in every gap.
    "log_prob": Guard(0.01, lambda value: value >= 0, "a number of nats, at least 0"),
    # Nats per token between the trainer's log-probs and the rollout engine's, of the same tokens. 0: `LOG_RATIO`.
    "log_ratio": Guard(0, lambda value: value >= 0, "a number of nats, or 0 for that of the dtype"),
    # Share of the step's tokens with an importance ratio outside the band: trainer and rollout engine then disagree about
    # most of what is trained.
    "outside_band": Guard(0.5, lambda value: 0 <= value <= 1, "a share, 0 to 1"),
    # Share of the step's completions that say nothing. Below all of them, the others still teach.
    "degenerate": Guard(1.0, lambda value: 0 < value <= 1, "a share, above 0 and at most 1"),
    # Share of the step's completions cut at max_completion_length. All of them may be meant, so it is a warning.
    "truncated": Guard(1.0, lambda value: 0 < value <= 1, "a share, above 0 and at most 1"),
    # Roundings of a log-prob's magnitude by which two computations of one model may differ at a token: `rounding_bound`.
    # Measured on SmolLM2-135M, generation with a cache against one forward, the worst of 354 tokens: 4.1 in bfloat16.
    "rounding": Guard(8, lambda value: value >= 0, "a number of roundings, at least 0"),
    # From which step of a branch on gaps may not all be 0. In its first step a teacher may be the student's own start.
    "zero_gap": Guard(2, _count(1), "a whole number of at least 1"),
    # Share of the entropy of a branch's first step. Training towards a teacher may well halve it; at a tenth of it the
    # student has all but stopped sampling.
    "entropy": Guard(0.1, lambda value: 0 <= value < 1, "a share, at least 0 and below 1"),
}

# Of two computations of one model, by the type that the student's matrix products round to. A log-prob is a difference of
# logits. They are sums over the residual stream, which each of 2 L blocks has rounded: by 2**-9 of itself in bfloat16,
# 2**-12 in float16, independently, so that 64 blocks make sqrt(128) times that. With logits that spread by 8 nats, the
# widest of language models, these are 0.18 and 0.022 nats; the bound is about one and a half times, and twice, that. In
# float32 it is the inner sums that round, of 2**13 terms each: sqrt(128 * 2**13) * 2**-24 * 8 = 0.0005; 0.01 is twenty
# times that, and a quarter of what a float32 model drawn from in bfloat16 shows.
LOG_RATIO = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.25}
# Tokens that a mean over few is taken to be short of, and that are alike to the bit. One token may be off by many times the
# bound without a fault (another expert of a mixture, a logit of 200 in bfloat16), but not by 16 times.
SPARE = 16
LEAST = 256  # tokens of one rollout server, over which comparisons of a completion each are added up


def log_ratio_bound(limit: float | None, dtype: torch.dtype) -> float | None:
    """The threshold `log_ratio` in nats per token, for a student that computes in `dtype`; `None` for none."""
    if limit != 0:
        return limit
    return LOG_RATIO.get(_rounds_as(dtype), LOG_RATIO[torch.bfloat16])


def rounding_bound(roundings: float, dtype: torch.dtype, largest: float) -> float:
    """How far two computations of one model's log-prob may lie apart, in nats, by as many `roundings` to `dtype`.

    A log-prob is a logit less the log-sum-exp. A rounding moves a logit by at most u = eps / 2 of its magnitude, and of all
    that is known here the teacher's `largest` log-prob in magnitude is next to that: logits spread by as much. In float32
    the sums inside of matrix products round as well, which 16-bit types leave to float32: a rounding counts four there
    (measured as above: 18 in place of 4.1).
    """
    dtype = _rounds_as(dtype)
    return roundings * (4 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps / 2 * largest


def _rounds_as(dtype: torch.dtype) -> torch.dtype:
    """TF32 rounds as float16 does."""
    return torch.float16 if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else dtype


def settle(given: Any) -> dict[str, float | None]:
    """All thresholds: those `given`, a mapping or its JSON, over the defaults. `None` switches a guard off.

    Raises `ValueError` for a name that there is not, and for a value that the threshold cannot have.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"guards is not valid JSON: {short(given)} ({error}). For example: {_EXAMPLE}.") from None
    if given is not None and not isinstance(given, dict):
        raise ValueError(
            f"guards must be a mapping from names to thresholds, got {short(given)}. For example: {_EXAMPLE}."
        )
    for name, value in (given or {}).items():
        if name not in GUARDS:
            near = difflib.get_close_matches(str(name), GUARDS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"guards has no threshold {short(name)}. Did you mean {near!r}? There are {', '.join(GUARDS)}; "
                "docs/metrics.md says what they are."
            )
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if value is not None and not (number and GUARDS[name].test(value)):
            raise ValueError(f"guards[{name!r}] must be {GUARDS[name].must_be}, or null for none, got {short(value)}.")
    return {**{name: guard.default for name, guard in GUARDS.items()}, **(given or {})}


_EXAMPLE = """--guards '{"log_prob": 0.1, "entropy": null}'"""


def without_effect(args: Any) -> list[tuple[str, Any, str]]:
    """Thresholds that were set for a number that the run does not have: name, value and reason."""
    vllm = bool(args.use_vllm or args.rollout_servers)
    engine = args.student_logps != "trainer"
    band = args.importance_sampling_mode != "none" and args.divergence == "sampled"
    reasons = {}
    if args.student_logps == "engine" and not TOKEN_RULES[args.token_rule].needs_entropy:
        reasons["entropy"] = "with student_logps='engine' no entropy is computed"
    if not (engine or vllm):
        reasons["log_ratio"] = "the rollout engine gives no log-probs"
    if not (band and (engine or vllm)):
        reasons["outside_band"] = (
            "importance_sampling_mode is 'none', divergence is not 'sampled', or the rollout engine gives no log-probs"
        )
    return [
        (f"guards[{name!r}]", args.guards[name], reason)
        for name, reason in reasons.items()
        if args.guards[name] not in (None, GUARDS[name].default)
    ]


def stop(name: str, limit: float, what: str) -> GuardError:
    """The error of a guard: what is wrong, its threshold, and how to go on regardless."""
    return GuardError(
        f"{what}. That is beyond guards[{name!r}]={limit:g}. What has been saved is from before it. To go on regardless, "
        f"set another threshold, or guards: {{{name}: null}} for none."
    )
