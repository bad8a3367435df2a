"""The figures of `camopd report` and `camopd sweep`: a table of what is drawn, and three functions that draw it.

One run in the axes: a colour and a marker per branch. Several runs: a panel per branch, and a colour, a marker and a line
style per run. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd


try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure  # and not pyplot: no screen, no global state
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ModuleNotFoundError as error:
    raise ImportError(
        f"figures need {error.name!r}: pip install -e '.[report]' in a clone of camopd, or pip install matplotlib."
    ) from error


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # without yellow: light page
MARKERS = "os^DvPX"
STYLES = ("-", "--", "-.", ":")
WIDTH = 8.0  # inches; with 150 dots per inch a little more than the width of the page
SMOOTH_FROM = 36  # points from which on a line is drawn thin, under its running mean
GREY = "#666666"
DIAGNOSTICS = "diagnostics_steps"  # the setting that turns on conflict/* and coherence/*


@dataclass(frozen=True)
class Quantity:
    """One metric over the optimizer steps."""

    metric: str  # with {branch} where there is one for each branch
    title: str
    unit: str
    split: str = "branch"  # a line per "branch", per branches of the "step", per "stale" or not; "" is one line
    factor: float = 1  # 100 shows a share in percent
    reference: float | None = None  # drawn as a grey line
    beside: str = ""  # another metric, drawn dotted in the same colour
    from_zero: bool = False


@dataclass(frozen=True)
class Chart:
    """One figure of lines: its file name, its title, how to read it, and what turns its metrics on."""

    name: str
    title: str
    caption: str
    quantities: tuple[Quantity, ...]
    setting: str = ""  # "" for metrics that every run writes


CHARTS = (
    Chart(
        "gaps", "Gaps",
        "How far the student is from each branch's teacher, on its own samples. The signed mean is minus the sampled "
        "reverse KL; it approaches 0 from below.",
        (
            Quantity("gap/{branch}/abs_mean", "mean |gap|", "nats per token", from_zero=True),
            Quantity("gap/{branch}/mean", "mean gap", "nats per token", reference=0),
        ),
    ),
    Chart(
        "selection", "Selected samples (the paper's Figure 3, lower row)",
        "Share of the samples that selection (Eq. 8) keeps, and the share of the total score that they hold.",
        (
            Quantity("selection/{branch}/kept_fraction", "kept samples", "% of samples", factor=100, from_zero=True),
            Quantity("selection/{branch}/mass", "score mass of the kept", "% of score", factor=100, from_zero=True),
        ),
    ),
    Chart(
        "coherence", "Gradient coherence gain (the paper's Figure 3, upper row)",
        "GCG: how much more the gradients of the kept samples agree than those of all samples. Smaller sets agree more by "
        "chance alone: dotted is a random set of the same size, and only what lies above it is the selection's doing.",
        (
            Quantity("coherence/{branch}/gcg", "GCG (dotted: random control)", "%", reference=0,
                     beside="coherence/{branch}/gcg_control"),
            Quantity("coherence/{branch}/gcg_excess", "GCG - control", "percentage points", reference=0),
        ),
        f"{DIAGNOSTICS}: 10",
    ),
    Chart(
        "conflict", "Branch gradients against each other (the paper's Figure 1)",
        "Below 0 the gradients of two branches point against each other: a step for one undoes part of the other. Stale: "
        "the other branch's gradient was taken at earlier parameters.",
        (
            Quantity("conflict/cosine", "cosine of the branch gradients", "cosine", "stale", reference=0),
            Quantity("conflict/dot", "dot product of the branch gradients", "dot product", "stale", reference=0),
            Quantity("conflict/{branch}_norm", "gradient norm of a branch", "norm", from_zero=True),
        ),
        f"{DIAGNOSTICS}: 10",
    ),
    Chart(
        "update", "Gradient norm and update",
        "Gradient norm before clipping, and the cosine of Adam's update with the gradient of the step it is made in: near "
        "0, the step is mostly the momentum of earlier steps.",
        (
            Quantity("grad_norm", "gradient norm before clipping", "norm", "step", from_zero=True),
            Quantity("update/cosine", "cosine of update and gradient", "cosine", "step", reference=0),
        ),
    ),
    Chart(
        "length", "Gap versus length",
        "Whether selection follows length. metrics.jsonl holds means of steps and no single samples, so this is not the "
        "cloud of samples but what each step says about it: the rank correlation of score and completion length, the mean "
        "length of kept samples over that of dropped ones, and the overlap with a selection of as many samples by length "
        "(Jaccard index; dotted is what chance gives).",
        (
            Quantity("score/{branch}/length_spearman", "rank correlation of score and length", "Spearman's rho",
                     reference=0),
            Quantity("selection/{branch}/length_ratio", "length of kept / of dropped samples", "ratio", reference=1),
            Quantity("rollout/{branch}/length", "completion length", "tokens", from_zero=True),
            Quantity("selection/{branch}/jaccard_length", "overlap with selecting by length (dotted: chance)", "Jaccard",
                     from_zero=True, beside="selection/{branch}/jaccard_chance"),
        ),
    ),
    Chart(
        "score", "What else the score follows",
        "Whether a few samples or tokens carry the score, and whether it is high where the teacher itself is lost.",
        (
            Quantity("score/{branch}/p90", "score, 90th percentile (dotted: median)", "nats per token", from_zero=True,
                     beside="score/{branch}/p50"),
            Quantity("selection/{branch}/score_perplexity_spearman", "rank correlation of score and teacher perplexity",
                     "Spearman's rho", reference=0),
            Quantity("selection/{branch}/top1_share", "score on the top 1% of tokens", "% of score", factor=100,
                     from_zero=True),
        ),
    ),
    Chart(
        "work", "Tokens, padding and time of a step",
        "What goes through forward and backward: tokens of the kept samples, the share of padding on top of them, and the "
        "tokens of the fullest process above the mean of all.",
        (
            Quantity("train/tokens", "tokens trained", "tokens per step", "step", from_zero=True),
            Quantity("train/padding", "padding", "% of all that is computed", "step", factor=100, from_zero=True),
            Quantity("train/imbalance", "fullest process above the mean", "% of tokens", "step", factor=100,
                     from_zero=True),
            Quantity("time/step", "time of a step", "seconds", "step", from_zero=True),
        ),
    ),
)  # fmt: skip


def branches_of(runs: Mapping[str, pd.DataFrame]) -> list[str]:
    """Branches of all runs, in order of appearance."""
    names = dict.fromkeys(name for frame in runs.values() for value in frame["branch"] for name in value.split("+"))
    return list(names)


def step_kinds(runs: Mapping[str, pd.DataFrame]) -> list[str]:
    """What a step takes, over all runs: branches, and mixes such as `general+domain`."""
    found = {value for frame in runs.values() for value in frame["branch"]}
    order = branches_of(runs)
    return sorted(found, key=lambda kind: ("+" in kind, order.index(kind.split("+")[0]), kind))


def lines_of(frame: pd.DataFrame, quantity: Quantity, metric: str, branches: Sequence[str]) -> dict[str, pd.Series]:
    """A quantity of one run: per line of the figure its name and its values by optimizer step, where there are any."""
    if quantity.split == "branch":
        found = {branch: frame.get(metric.format(branch=branch)) for branch in branches}
    else:
        values = frame.get(metric)
        if values is None or quantity.split == "":
            found = {"": values}
        elif quantity.split == "step":
            found = {kind: values[frame["branch"] == kind] for kind in dict.fromkeys(frame["branch"])}
        else:
            stale = frame.get("conflict/stale", pd.Series(0.0, frame.index)) == 1
            found = {"same parameters": values[~stale], "stale": values[stale]}
    lines = {name: values.dropna() * quantity.factor for name, values in found.items() if values is not None}
    return {name: values for name, values in lines.items() if len(values)}


def draw(chart: Chart, runs: Mapping[str, pd.DataFrame]) -> Figure | None:
    """A chart of one run or of several; `None` when no run has any of its metrics.

    `runs` maps the names in the legend to frames indexed by optimizer step, as `report.read_run` makes them.
    """
    branches = branches_of(runs)
    overlay = len(runs) > 1
    panels: list[tuple[Quantity, str]] = []  # and the line it is for; "" where all lines share a panel
    data, most = {}, 0
    for quantity in chart.quantities:
        data[quantity] = {name: lines_of(frame, quantity, quantity.metric, branches) for name, frame in runs.items()}
        found = dict.fromkeys(line for lines in data[quantity].values() for line in lines)
        panels += [(quantity, line) for line in found] if overlay else [(quantity, "")] * bool(found)
        most = max(most, len(found))
    if not panels:
        return None
    columns = min(len(panels), 3 if overlay and most % 3 == 0 else 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 2.5 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    names = [*branches, *(kind for kind in step_kinds(runs) if "+" in kind), "same parameters", "stale"]
    for axes, (quantity, wanted) in zip(grid, panels, strict=False):
        for place, (run, lines) in enumerate(data[quantity].items()):
            beside = lines_of(runs[run], quantity, quantity.beside, branches) if quantity.beside else {}
            for line, values in lines.items():
                if overlay and line != wanted:
                    continue
                look, label = (place, run) if overlay else (names.index(line), line)
                _plot(axes, values, look, label, style=STYLES[place % 4] if overlay else STYLES[look % 2])
                if line in beside:
                    axes.plot(_smooth(beside[line]), color=COLOURS[look % 7], linestyle=":", linewidth=1.4)
        title = f"{wanted}: {quantity.title}" if overlay and wanted else quantity.title
        axes.set_title(_wrapped(title, 88 // columns), loc="left", fontsize=9)
        _dress(axes, quantity)
    steps = [axes.get_xlim() for axes in grid[: len(panels)]]
    for axes in grid[: len(panels)]:
        axes.set_xlim(min(low for low, _ in steps), max(high for _, high in steps))
    for quantity in chart.quantities:  # panels of one quantity are there to be compared
        same = [axes for axes, (drawn, _) in zip(grid, panels, strict=False) if drawn is quantity]
        if same:
            low, high = min(axes.get_ylim()[0] for axes in same), max(axes.get_ylim()[1] for axes in same)
            pad = 0.03 * (high - low) if len(same) > 1 and not quantity.from_zero else 0.0  # for markers at the edge
            for axes in same:
                axes.set_ylim(low - pad, high + pad)
                _readable_ticks(axes)
    _legend(figure, grid[: len(panels)], list(runs))
    return figure


def draw_times(runs: Mapping[str, pd.DataFrame]) -> Figure | None:
    """Mean seconds of a step by stage, and how long its teachers are waited for; `None` without times."""
    stages = {"rollout": "time/rollout", "score": "time/score", "train": "time/train"}
    panels: dict[str, dict[str, dict[str, float]]] = {}  # panel -> bar -> part -> seconds
    for kind in step_kinds(runs):
        for run, frame in runs.items():
            steps = frame[frame["branch"] == kind]
            seconds = {part: steps[metric].mean() for part, metric in stages.items() if metric in steps}
            if len(steps) and seconds:
                panel, bar = (f"{kind} steps", run) if len(runs) > 1 else ("stages of a step", f"{kind} steps")
                panels.setdefault(panel, {})[bar] = seconds
    for branch in branches_of(runs):
        for run, frame in runs.items():
            parts = teacher_seconds(frame, branch)
            if parts:
                panel, bar = (f"teacher of {branch}", run) if len(runs) > 1 else ("teachers", f"teacher of {branch}")
                panels.setdefault(panel, {})[bar] = parts
    if not panels:
        return None
    heights = [len(bars) + 1.2 for bars in panels.values()]
    figure = Figure(figsize=(WIDTH, 0.32 * sum(heights) + 0.9), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, sharex=True).ravel().tolist()
    for axes, (panel, bars) in zip(grid, panels.items(), strict=True):
        _stack(axes, bars)
        axes.set_title(panel, loc="left", fontsize=9)
    widest = max(sum(parts.values()) for bars in panels.values() for parts in bars.values())
    grid[-1].set_xlim(0, 1.02 * widest or 1)
    grid[-1].set_xlabel("seconds, mean of the steps", fontsize=8)
    _legend(figure, grid, list(_PARTS))
    return figure


def teacher_seconds(frame: pd.DataFrame, branch: str) -> dict[str, float]:
    """Mean seconds of a teacher in the steps that ask it: waited for, hidden behind other work, idle."""
    name = f"time/teacher_{branch}"
    if name not in frame or frame[name].isna().all():
        return {}
    steps = frame[frame[name].notna()]
    busy = steps[name].mean()
    hidden = steps[f"{name}_hidden"].mean() if f"{name}_hidden" in steps else 0.0
    parts = {"waited for": max(0.0, busy - hidden), "hidden": hidden}
    if f"{name}_idle" in steps:
        parts["idle"] = steps[f"{name}_idle"].mean()
    return {part: 0.0 if np.isnan(seconds) else seconds for part, seconds in parts.items()}


def draw_bars(groups: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """Horizontal bars in a panel per column, as the paper's Figure 4: column -> name -> (mean, spread; NaN for none)."""
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    height = 0.3 * len(names) + 1.0
    figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.ravel()[len(groups) :]:
        axes.set_visible(False)
    for place, (axes, (column, bars)) in enumerate(zip(grid.ravel(), groups.items(), strict=False)):
        means = np.array([bars.get(name, (np.nan, np.nan))[0] for name in names])
        spreads = np.array([bars.get(name, (np.nan, np.nan))[1] for name in names])
        axes.barh(range(len(names)), means, color=[COLOURS[index % 7] for index in range(len(names))], height=0.7)
        axes.errorbar(means, range(len(names)), xerr=spreads, fmt="none", ecolor="#333333", capsize=3)
        for index, (mean, spread) in enumerate(zip(means, np.nan_to_num(spreads), strict=True)):
            if np.isfinite(mean):
                axes.text(max(0.0, mean + spread), index, f"  {mean:.3g}", va="center", fontsize=8)
        axes.margins(x=0.25)  # for the numbers
        axes.set_xlabel(unit_of(column.partition("@")[0]), fontsize=8)
        axes.set_yticks(range(len(names)), names if place % columns == 0 else [""] * len(names), fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(_wrapped(column, 88 // columns), loc="left", fontsize=9)
        _clean(axes, "x")
    return figure


def unit_of(metric: str) -> str:
    """The unit of a metric that the charts know, else ""."""
    for quantity in (quantity for chart in CHARTS for quantity in chart.quantities):
        if re.fullmatch(re.escape(quantity.metric).replace(r"\{branch\}", "[^/]+"), metric):
            return "share" if quantity.factor == 100 else quantity.unit
    return ""


def png(figure: Figure) -> bytes:
    """The figure as a PNG of 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------ helpers


def _plot(axes: Axes, values: pd.Series, look: int, label: str, style: str) -> None:
    colour, marker = COLOURS[look % 7], MARKERS[look % 7]
    if len(values) < SMOOTH_FROM:
        axes.plot(values, color=colour, marker=marker, markersize=4.5, linestyle=style, linewidth=1.4, label=label,
                  clip_on=False)  # fmt: skip
        return
    axes.plot(values, color=colour, linewidth=0.7, alpha=0.3)
    every = (look * 2, max(1, len(values) // 8))  # shifted, so that markers of close lines do not hide each other
    axes.plot(_smooth(values), color=colour, marker=marker, markersize=5, markevery=every, linestyle=style, linewidth=1.8,
              label=label, clip_on=False)  # fmt: skip


def _smooth(values: pd.Series) -> pd.Series:
    """The running mean over a twelfth of the points, where there are many."""
    window = 1 if len(values) < SMOOTH_FROM else round(len(values) / 12)
    return values.rolling(window, center=True, min_periods=1).mean()


def _dress(axes: Axes, quantity: Quantity) -> None:
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.set_ylabel(quantity.unit, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if quantity.reference is not None:
        axes.axhline(quantity.reference, color=GREY, linewidth=0.9, zorder=1)
    if quantity.from_zero:
        top = axes.dataLim.ymax
        axes.set_ylim(0, top * 1.06 if np.isfinite(top) and top > 0 else 1)
    _clean(axes, "both")


def _readable_ticks(axes: Axes) -> None:
    """Very large and very small numbers in full; matplotlib puts a factor where the title is."""
    if not 0.01 <= max(map(abs, axes.get_ylim())) < 10_000:
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value) > 1 else f"{value:.3g}")
        )


def _clean(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis=grid, alpha=0.25)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


_PARTS = {
    "rollout": ("#56B4E9", ""), "score": ("#E69F00", "//"), "train": ("#009E73", ".."),
    "waited for": ("#D55E00", ""), "hidden": ("#999999", "//"), "idle": ("#DDDDDD", ""),
}  # fmt: skip


def _stack(axes: Axes, bars: Mapping[str, Mapping[str, float]]) -> None:
    for place, parts in enumerate(bars.values()):
        left = 0.0
        for part, seconds in parts.items():
            if seconds == 0:  # and no entry in the legend
                continue
            colour, hatch = _PARTS[part]
            axes.barh(place, seconds, left=left, color=colour, hatch=hatch, edgecolor="white", height=0.7, label=part)
            left += seconds
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    _clean(axes, "x")


def _legend(figure: Figure, grid: Sequence[Axes], order: list[str]) -> None:
    """One legend under all panels, in as many columns as its texts allow; what is in `order` comes in that order."""
    entries: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label:
                entries.setdefault(label, handle)
    entries = {label: entries[label] for label in [*(name for name in order if name in entries), *entries]}
    if entries:
        columns = max(1, min(len(entries), 96 // (max(map(len, entries)) + 8)))
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", ncols=columns, frameon=False, fontsize=8,
            handlelength=3,
        )  # fmt: skip


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)) or text
