"""The testbed's figures. Arms are told apart by their names beside the marks; colour says of which kind an arm is."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from camopd import atomic
from camopd.report.charts import COLOURS, LOOK, MARKERS

from .arms import NAMES, rates
from .tables import BASE, Outcome, Runs, contrasts, rate_means


KINDS = {
    "CaMOPD and its parts": ("camopd", "scale_1", "without_selection", "camopd_mixed"),
    "mixed batches": ("vanilla", "mixed_3_1", "vanilla_token", "dn_mopd"),
    "tokens weighed": ("relaxed_opd", "selectkd"),
    "optimizer": ("branch_moments", "beta1_0", "sgd"),
    "controls": ("random_selection", "smallest_gaps", "teacher_free", "sft"),
    "another gradient": ("full", "top_k", "baseline_kl", "full_without_selection"),
}
KIND = {arm: (COLOURS[place], MARKERS[place]) for place, arms in enumerate(KINDS.values()) for arm in arms}


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
    lines = sorted(contrasts(found, [(arm, BASE) for arm in found if arm != BASE]), key=lambda one: one.interval.value)
    for place, each in enumerate(lines):
        colour, marker = KIND[each.first]
        axes.plot([each.interval.low, each.interval.high], [place, place], color=colour, lw=1.5)
        axes.plot(each.interval.value, place, marker, color=colour, ms=6)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(lines)), [NAMES[each.first] for each in lines])
    axes.set_xlabel("recovery of covered skills with the domain kept, minus that of CaMOPD (share of what was lost)")
    axes.set_title(f"Paired differences over {len(found[BASE])} seeds, 95 % bootstrap intervals")
    _legend(axes, found)
    return figure


def plane(ends: Mapping[str, Sequence[Outcome]]) -> Figure:
    """Recovery and preservation at the end of the runs, with an ellipse of the mean's 95 % region.

    Marks have numbers, whose names stand beside the plane; arms that ended alike in every run share one.
    """
    figure = Figure(figsize=(8, 5.2))
    axes = figure.subplots()
    names, points = _told_apart(ends)
    spots = {arm: of.mean(axis=0) for arm, of in points.items()}
    axes.set_yscale("function", functions=(lambda y: np.sign(y) * abs(y) ** 3, np.cbrt))
    axes.set_ylim(0.22, 1.06)
    axes.set_yticks([0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
    axes.set_xlim(-0.06, 1.02)
    axes.axhline(0.95, color="black", lw=0.8, ls=":")
    axes.text(-0.05, 0.948, "95 % kept", fontsize=8, va="top")
    for arm, of in points.items():
        if len(of) > 2:
            axes.fill(*_ellipse(of), fc=KIND[arm][0], ec=KIND[arm][0], alpha=0.18)
    for arm, spot in spots.items():
        axes.plot(*spot, KIND[arm][1], color=KIND[arm][0], ms=6, mec="white", mew=0.6, zorder=3)
    numbers = {
        arm: str(place)
        for place, arm in enumerate((arm for arms in KINDS.values() for arm in arms if arm in names), 1)
    }
    _number(axes, {numbers[arm]: spot for arm, spot in spots.items()})
    axes.set_xlabel("recovery of the covered skills (share of what was lost)")
    axes.set_ylabel("domain accuracy (share of the specialised model's; axis stretched towards 1)")
    axes.set_title(
        f"Where {len(next(iter(ends.values())))} runs of each method end: means, and the 95 % regions of the means",
        fontsize=10,
    )
    handles = []
    for kind, arms in _kinds(names):
        handles.append(axes.plot([], [], " ", label=f"{kind}:")[0])
        for arm in (arm for arm in arms if arm in names):
            label = f"{numbers[arm]:>2}  {names[arm]}"
            handles.append(axes.plot([], [], KIND[arm][1], color=KIND[arm][0], ms=6, label=label)[0])
    figure.legend(handles=handles, loc="outside right center", fontsize=8, handletextpad=0.2, labelspacing=0.35)
    return figure


def _told_apart(ends: Mapping[str, Sequence[Outcome]]) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Name and points (seeds, 2) of each arm; one that ended as an earlier one in every run is in that one's name."""
    names: dict[str, str] = {}
    points: dict[str, np.ndarray] = {}
    for arm, outcomes in ends.items():
        of = np.array([(each.recovery, each.preservation) for each in outcomes])
        twin = next((other for other, its in points.items() if np.array_equal(its, of)), None)
        if twin:
            names[twin] += f" ({NAMES[arm].removeprefix(NAMES[twin]).lstrip(', ')}: the same)"
        else:
            names[arm], points[arm] = NAMES[arm], of
    return names, points


def learning_rates(runs: Runs) -> Figure:
    """Outcome over the learning rate, a panel per kind of arm."""
    means = rate_means(runs)
    shown = [(kind, [arm for arm in arms if arm != "sgd"]) for kind, arms in _kinds(means)]
    shown += [("another optimizer", ["sgd"])] if "sgd" in means else []
    columns = 3 if len(shown) <= 6 else 4
    figure = Figure(figsize=(8 / 3 * columns, 5.4))
    panels = figure.subplots(2, columns, sharey=True).flatten()
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for axes, (kind, arms) in zip(panels, shown, strict=False):
        for place, arm in enumerate(arms):
            values = [means[arm][rate] for rate in rates(arm)]
            axes.plot(rates(arm), values, "os^D"[place] + "-", color=COLOURS[place], ms=4, lw=1, label=NAMES[arm])
        axes.set_xscale("log")
        unit = 1 if arms == ["sgd"] else 1e-4
        axes.set_xticks(rates(arms[0]), [f"{rate / unit:g}" for rate in rates(arms[0])])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("learning rate" + ("" if unit == 1 else " (1e-4)"))
        axes.set_title(kind)
        axes.set_ylim(-0.03, 1.02 + 0.14 * max(len(each) for _, each in shown))  # room for the names
        axes.set_yticks(np.arange(0, 1.01, 0.2))
        axes.legend(loc="upper left", fontsize=7.5, labelspacing=0.25)
    for axes in panels[::columns]:
        axes.set_ylabel("recovery with the domain kept (share)")
    return figure


def _ellipse(points: np.ndarray) -> np.ndarray:
    """The outline of the mean's 95 % region, (2, 100): chi-squared with two degrees of freedom, 5.99, over the number."""
    values, vectors = np.linalg.eigh(np.cov(points.T) / len(points))
    turn = np.linspace(0, 2 * math.pi, 100)
    circle = np.stack([np.cos(turn), np.sin(turn)]) * np.sqrt(np.maximum(values, 0) * 5.99)[:, None]
    outline: np.ndarray = points.mean(axis=0)[:, None] + vectors @ circle
    return outline


def _number(axes: Axes, spots: Mapping[str, np.ndarray]) -> None:
    """A number beside each mark, at the nearest of some places that is free of marks and of other numbers."""
    axes.figure.draw_without_rendering()  # so that places on the page are known
    marks = {name: axes.transData.transform(spot) for name, spot in spots.items()}
    point = axes.figure.dpi / 72
    taken = [(mark, (9.0, 9.0)) for mark in marks.values()]  # with the points that a number keeps away, across and up
    angles = np.radians([45, 135, -45, -135, 90, -90, 0, 180, 20, 160, -20, -160])
    offsets = [
        radius * np.array([np.cos(angle), np.sin(angle)]) for radius in (10, 15, 21, 28, 36) for angle in angles
    ]
    for name, mark in sorted(marks.items(), key=lambda each: -each[1][1]):
        places = [mark + offset * point for offset in offsets]
        free = (each for each in places if all(np.hypot(*((each - at) / size)) > point for at, size in taken))
        place = next(free, places[0])
        taken.append((place, (14.0, 10.0)))
        axes.annotate(
            name, spots[name], (place - mark) / point, textcoords="offset points", fontsize=8, ha="center", va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "0.4", "shrinkA": 0, "shrinkB": 0}, zorder=4,
        )  # fmt: skip


def _kinds(arms: Iterable[str]) -> list[tuple[str, list[str]]]:
    """The kinds that there are arms of, each with those."""
    there = set(arms)
    kinds = [(kind, [arm for arm in of if arm in there]) for kind, of in KINDS.items()]
    return [(kind, of) for kind, of in kinds if of]


def _legend(axes: Axes, arms: Iterable[str]) -> None:
    for kind, of in _kinds(arms):
        colour, marker = KIND[of[0]]
        axes.plot([], [], marker, color=colour, label=kind)
    axes.legend(loc="lower left" if axes.get_ylabel() else "lower right")
