"""The testbed's figures. Arms are told apart by their names beside the marks; colour says of which kind an arm is."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from camopd import atomic
from camopd.report.charts import COLOURS, LOOK

from .arms import ARMS, NAMES, rates
from .tables import BASE, Outcome, Runs, contrasts, rate_means


KINDS = {
    "CaMOPD and its parts": ("camopd", "scale_1", "without_selection", "camopd_mixed"),
    "mixed batches": ("vanilla", "mixed_3_1", "vanilla_token", "dn_mopd"),
    "tokens weighed": ("relaxed_opd", "selectkd"),
    "optimizer": ("branch_moments", "beta1_0", "sgd"),
    "controls": ("random_selection", "smallest_gaps", "teacher_free", "sft"),
}
KIND = {arm: (COLOURS[place], "os^Dv"[place]) for place, arms in enumerate(KINDS.values()) for arm in arms}


def draw(
    out: Path, runs: Runs, prompts: Mapping[str, Sequence[Outcome]], ends: Mapping[str, Sequence[Outcome]]
) -> None:
    """differences.svg, plane.svg and rates.svg."""
    with rc_context(
        {**LOOK, "svg.hashsalt": "testbed", "svg.fonttype": "path"}
    ):  # the same file from the same numbers
        for name, figure in (
            ("differences", differences(prompts)), ("plane", plane(ends)), ("rates", learning_rates(runs)),
        ):  # fmt: skip
            file = io.BytesIO()
            figure.savefig(file, format="svg", metadata={"Date": None})
            atomic.write(out / f"{name}.svg", file.getvalue())


def differences(found: Mapping[str, Sequence[Outcome]]) -> Figure:
    """Each arm's recovery less that of CaMOPD, with intervals."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    lines = sorted(contrasts(found, [(arm, BASE) for arm in ARMS if arm != BASE]), key=lambda one: one.interval.value)
    for place, each in enumerate(lines):
        colour, marker = KIND[each.first]
        axes.plot([each.interval.low, each.interval.high], [place, place], color=colour, lw=1.5)
        axes.plot(each.interval.value, place, marker, color=colour, ms=6)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(lines)), [NAMES[each.first] for each in lines])
    axes.set_xlabel("recovery of covered skills with the domain kept, minus that of CaMOPD (share of what was lost)")
    axes.set_title(f"Paired differences over {len(found[BASE])} seeds, 95 % bootstrap intervals")
    _legend(axes)
    return figure


def plane(ends: Mapping[str, Sequence[Outcome]]) -> Figure:
    """Recovery and preservation at the end of the runs, with an ellipse of the mean's 95 % region."""
    figure = Figure(figsize=(8, 6))
    axes = figure.subplots()
    spots = {}
    for arm, outcomes in ends.items():
        points = np.array([(each.recovery, each.preservation) for each in outcomes])
        colour, marker = KIND[arm]
        spots[arm] = points.mean(axis=0)
        axes.plot(*spots[arm], marker, color=colour, ms=6)
        if len(points) > 2:
            _ellipse(axes, points, colour)
    axes.axhline(0.95, color="black", lw=0.8, ls=":")
    axes.text(0.0, 0.951, "95 % of the specialised model's domain accuracy", fontsize=7, va="bottom")
    axes.set_xlim(left=min(0.0, *(spot[0] for spot in spots.values())) - 0.02, right=1.12)
    axes.set_xlabel("recovery of covered skills (1 is the general teacher, 0 the specialised model)")
    axes.set_ylabel("domain accuracy (1 is the specialised model)")
    axes.set_title("At the end of equally many prompts, each arm at its own learning rate; ellipses: 95 % of the mean")
    _label(axes, spots)
    _legend(axes)
    return figure


def learning_rates(runs: Runs) -> Figure:
    """Outcome over the learning rate, a panel per kind of arm."""
    figure = Figure(figsize=(8, 5))
    panels = figure.subplots(2, 3, sharey=True).flatten()
    means = rate_means(runs)
    for axes, (kind, arms) in zip(panels, KINDS.items(), strict=False):
        for place, arm in enumerate(one for one in arms if one != "sgd"):
            values = [means[arm][rate] for rate in rates(arm)]
            axes.plot(rates(arm), values, "os^D"[place] + "-", color=COLOURS[place], ms=4, lw=1, label=NAMES[arm])
        axes.set_xscale("log")
        axes.set_title(kind)
        axes.legend(fontsize=6.5)
    panels[-1].plot(rates("sgd"), [means["sgd"][rate] for rate in rates("sgd")], "o-", color=COLOURS[0], ms=4, lw=1)
    panels[-1].set_xscale("log")
    panels[-1].set_title("CaMOPD, SGD")
    for axes in panels[::3]:
        axes.set_ylabel("recovery with the domain kept")
    for axes in panels[3:]:
        axes.set_xlabel("learning rate")
    return figure


def _ellipse(axes: Axes, points: np.ndarray, colour: str) -> None:
    """The mean's 95 % region: chi-squared with two degrees of freedom, 5.99, over the number of points."""
    values, vectors = np.linalg.eigh(np.cov(points.T) / len(points))
    width, height = 2 * np.sqrt(np.maximum(values, 0) * 5.99)
    angle = math.degrees(math.atan2(vectors[1, 0], vectors[0, 0]))
    axes.add_patch(Ellipse(points.mean(axis=0), width, height, angle=angle, fc=colour, ec=colour, alpha=0.25))


def _label(axes: Axes, spots: Mapping[str, np.ndarray]) -> None:
    """Names beside the marks, moved down where another name stands."""
    taken: list[tuple[float, float]] = []
    low, high = axes.get_ylim()
    line = 0.032 * (high - low)
    for arm in sorted(spots, key=lambda arm: -spots[arm][1]):
        x, y = spots[arm]
        place = y
        while any(abs(place - other) < line and abs(x - where) < 0.3 for where, other in taken):
            place -= line
        taken.append((x, place))
        axes.annotate(
            NAMES[arm], (x, y), (x + 0.025, place), fontsize=7, va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.6"} if place != y else None,
        )  # fmt: skip


def _legend(axes: Axes) -> None:
    for place, kind in enumerate(KINDS):
        axes.plot([], [], "os^Dv"[place], color=COLOURS[place], label=kind)
    axes.legend(loc="lower left" if axes.get_ylabel() else "lower right")
