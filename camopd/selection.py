"""Eq. 6-8 over the whole optimizer step: which samples are trained, and what their loss is divided by."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import metrics
from .config import CaMOPDConfig
from .objective import gap_scores, select_by_mass
from .samples import LossTerms, Sample, SampleSummary
from .step import Step
from .token_rules import TokenRule, sigma_weights


class Branch(NamedTuple):
    """The method's settings for one branch."""

    name: str
    mass_target: float
    score: str
    scale: float
    selection: bool | str

    @classmethod
    def all_of(cls, args: CaMOPDConfig) -> dict[str, Branch]:
        """Those of each branch of the schedule."""
        columns = {name: args.per_branch(name) for name in cls._fields[1:]}
        return {name: cls(name, *(column[name] for column in columns.values())) for name in columns["mass_target"]}


class Selected(NamedTuple):
    """Which samples of a branch are kept, by position; `degenerate` says that there was no mass to rank by."""

    positions: set[int]
    degenerate: bool


def summaries(
    samples: Sequence[Sample],
    branches: Mapping[str, Branch],
    rule: TokenRule,
    rank: int,
    gather: Callable[[list[Any]], list[Any]],
) -> list[SampleSummary]:
    """What every rank knows of all ranks' scored samples: the same list everywhere, sorted by position, however many ranks
    there are."""
    mine = []
    for sample in samples:
        score = gap_scores(sample.gaps[None], sample.mask[None], branches[sample.branch].score).item()
        mine.append(metrics.summary(sample, score, rank, rule.count(sample)))
    return sorted(gather(mine), key=lambda summary: summary.position)


def by_branch(found: Sequence[SampleSummary]) -> dict[str, list[SampleSummary]]:
    """The same by branch, in the order of their first sample."""
    groups: dict[str, list[SampleSummary]] = {}
    for summary in found:
        groups.setdefault(summary.branch, []).append(summary)
    return groups


def select(found: Sequence[SampleSummary], branch: Branch, draw: random.Random) -> Selected:
    """Eq. 8 over the samples of one branch. Without selection every non-empty completion is kept; `"random"` and
    `"smallest"` keep as many as Eq. 8 would, drawn by `draw` or with the smallest scores, of equal ones the earlier.
    """
    valid = torch.tensor([summary.num_tokens > 0 for summary in found])
    scores = torch.tensor([summary.score for summary in found], dtype=torch.float64)
    selection = select_by_mass(scores, branch.mass_target, valid)
    candidates, size = valid.nonzero().flatten(), len(selection.kept)
    kept = {
        True: lambda: selection.kept.tolist(),
        False: lambda: candidates.tolist(),
        "random": lambda: draw.sample(candidates.tolist(), size),
        "smallest": lambda: candidates[scores[candidates].argsort(stable=True)][:size].tolist(),
    }[branch.selection]()
    return Selected({found[index].position for index in kept}, selection.degenerate)


def branch_weights(kind: str, groups: Mapping[str, Sequence[SampleSummary]]) -> dict[str, float]:
    """What the scale of each branch of the step is multiplied by."""
    if kind == "none":
        return {}
    return sigma_weights(
        {
            branch: tuple(sum(getattr(row, name) for row in rows) for name in ("num_tokens", "gap", "gap_square"))
            for branch, rows in groups.items()
        }
    )


def select_samples(
    step: Step,
    branches: Mapping[str, Branch],
    rule: TokenRule,
    args: CaMOPDConfig,
    gather: Callable[[list[Any]], list[Any]],
) -> None:
    """Fill in which of the step's scored samples are kept, what their loss is divided by, and the metrics of both."""
    step.summaries = summaries(step.samples, branches, rule, args.process_index, gather)
    step.metrics["entropy"] = metrics.token_mean(step.summaries, "entropy")
    groups = by_branch(step.summaries)
    for name, group in groups.items():
        draw = random.Random(f"{args.seed} {step.number} {name}")  # of every rank, and after resume
        selected = select(group, branches[name], draw)
        step.kept |= {row.position: row.num_tokens for row in group if row.position in selected.positions}
        step.metrics.update(
            metrics.of_branch(name, group, selected.positions, selected.degenerate, branches[name].score)
        )
        step.metrics.update(rule.metrics(name, group))
    weights = branch_weights(args.branch_weights, groups)
    step.metrics.update({f"branch_weight/{name}": weight for name, weight in weights.items()})
    step.terms = loss_terms(step.summaries, step.kept, branches, weights, rule, args.loss_normalization)


def loss_terms(
    found: Sequence[SampleSummary],
    kept: Mapping[int, int],
    branches: Mapping[str, Branch],
    weights: Mapping[str, float],
    rule: TokenRule,
    normalization: str,
) -> LossTerms:
    """The loss's denominators and the branches' factors, the same on every rank."""
    num_tokens = None
    if normalization == "token":
        num_tokens = max(1, sum(rule.tokens_in_loss(summary) for summary in found if summary.position in kept))
    scale = {name: branch.scale * weights.get(name, 1) for name, branch in branches.items()}
    return LossTerms(len(kept), num_tokens, scale)
