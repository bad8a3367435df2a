"""The figures of `camopd report` and `camopd sweep`: a table of what is drawn, and three functions that draw it.

One run in the axes: a colour and a marker per branch. Several runs: a panel per branch, and a colour, a marker and a line
style per run. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..verdict import Measured
from .read import branches_of, lines_of, step_kinds, teacher_seconds
from .signs import DIAGNOSTICS


try:
    from matplotlib import rc_context
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
PARTS = {  # of a step and of a teacher's time: colour and hatching
    "rollout": ("#56B4E9", ""), "score": ("#E69F00", "//"), "train": ("#009E73", ".."),
    "waited for": ("#D55E00", ""), "hidden": ("#999999", "//"), "idle": ("#DDDDDD", ""),
}  # fmt: skip
LOOK: dict[Any, Any] = {
    "axes.titley": 1.0,  # where it is anyway, or each is placed anew at every drawing
    "axes.titlesize": 9, "axes.titlelocation": "left", "axes.labelsize": 8, "axes.axisbelow": True, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.25, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "figure.constrained_layout.use": True, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip
WIDTH = 8.0  # inches; with 150 dots per inch a little more than the width of the page
SMOOTH_FROM = 36  # points from which on a line is drawn thin, under its running mean


@dataclass(frozen=True)
class Quantity:
    """One metric over the optimizer steps."""

    metric: str  # with {branch} where there is one for each branch
    title: str
    unit: str
    split: str = "branch"  # as `lines_of` takes it
    factor: float = 1  # 100 shows a share in percent
    reference: float | None = None  # drawn as a grey line
    beside: str = ""  # another metric, drawn dotted in the same colour
    from_zero: bool = False
    apart: bool = False  # a panel for each branch, each with a scale of its own
    held_out: str = ""  # the field of `Measured` that is drawn as points over it
    not_if_zero: bool = False  # a share that is 0 in all steps of all runs has no panel
    only_mixed: bool = False  # of runs whose steps mix branches; else another panel shows the same

    def of(self, frame: pd.DataFrame) -> dict[str, pd.Series]:
        """Its lines in a run."""
        if self.only_mixed and not any("+" in kind for kind in step_kinds([frame])):
            return {}
        return lines_of(frame, self.metric, self.split)


Points = Mapping[str, Mapping[str, Sequence[Measured]]]  # held-out gaps: run -> branch -> evaluations


@dataclass(frozen=True)
class Chart:
    """One figure of lines: its file name, its title, how to read it, and what turns its metrics on."""

    name: str
    title: str
    caption: str
    quantities: tuple[Quantity, ...]
    setting: str = ""  # "" for metrics that every run writes
    besides: str = ""  # what else they need, in words

    @property
    def way(self) -> str:
        """How to have it, where no run has its metrics."""
        return f"set `{self.setting}` in the config{self.besides}" if self.setting else "no run here has its metrics"


CHARTS = (
    Chart(
        "gaps", "Gaps",
        "How far the student is from each branch's teacher, on its own samples: lines are training gaps, of other prompts "
        "in each step, and diamonds are held-out gaps, of the same prompts each time, with their 95 % interval. A step's "
        "mean is over tokens, that of held-out prompts over prompts. Each panel has a scale of its own.",
        (
            Quantity("gap/{branch}/abs_mean", "mean |gap|", "nats per token", from_zero=True, apart=True,
                     held_out="gap_abs"),
            Quantity("gap/{branch}/mean", "sampled reverse KL", "nats per token", reference=0, factor=-1, apart=True,
                     held_out="kl"),
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
        "chance alone: dotted and hollow is a random set of the same size, and only what lies above it is the selection's "
        "doing.",
        (
            Quantity("coherence/{branch}/gcg", "GCG (dotted, hollow: random control)", "%", reference=0,
                     beside="coherence/{branch}/gcg_control"),
        ),
        f"{DIAGNOSTICS}: 10", ", and a selection that leaves samples out",
    ),
    Chart(
        "conflict", "Branch gradients against each other (the paper's Figure 1)",
        "Below 0 the gradients of two branches point against each other: a step for one undoes part of the other. Stale: "
        "the other branch's gradient was taken at earlier parameters.",
        (
            Quantity("conflict/cosine", "cosine of the branch gradients", "cosine", "stale", reference=0),
            Quantity("conflict/{branch}_norm", "gradient norm of a branch", "norm", from_zero=True, only_mixed=True),
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
        "Whether selection follows length. metrics.jsonl holds means of steps, not single samples, so this is not the "
        "cloud of samples but what each step says about it: the rank correlation of score and completion length, the mean "
        "length of kept samples over that of dropped ones, and the overlap with a selection of as many samples by length "
        "(Jaccard index; dotted and hollow is what chance gives).",
        (
            Quantity("score/{branch}/length_spearman", "rank correlation of score and length", "Spearman's rho",
                     reference=0),
            Quantity("selection/{branch}/length_ratio", "length of kept / of dropped samples", "ratio", reference=1),
            Quantity("rollout/{branch}/length", "completion length", "tokens", from_zero=True),
            Quantity("selection/{branch}/jaccard_length", "overlap with selecting by length (dotted, hollow: chance)",
                     "Jaccard",
                     from_zero=True, beside="selection/{branch}/jaccard_chance"),
        ),
    ),
    Chart(
        "score", "What else the score follows",
        "Whether a few samples or tokens carry the score, and whether it is high where the teacher itself is lost.",
        (
            Quantity("score/{branch}/p90", "score, 90th percentile (dotted, hollow: median)", "nats per token",
                     from_zero=True,
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
            Quantity("train/padding", "padding", "% of all that is computed", "step", factor=100, from_zero=True,
                     not_if_zero=True),
            Quantity("train/imbalance", "fullest process above the mean", "% of tokens", "step", factor=100,
                     from_zero=True, not_if_zero=True),
            Quantity("time/step", "time of a step", "seconds", "step", from_zero=True),
        ),
    ),
)  # fmt: skip
TIMES = Chart(
    "time", "Time per stage",
    "Mean seconds of each stage of a step. A teacher is waited for, works hidden behind the student's own log-probs or "
    "another teacher, or is idle; only the first costs time. A teacher in the process is never hidden.",
    (),
)  # fmt: skip


def draw_all(runs: Mapping[str, pd.DataFrame], held_out: Points | None = None) -> list[tuple[Chart, Figure | None]]:
    """Every chart, with its figure where a run has its metrics.

    `runs` maps the names in the legend to frames as `read_run` makes them, and `held_out` to held-out gaps, here and below.
    """
    return [*((chart, draw(chart, runs, held_out)) for chart in CHARTS), (TIMES, draw_times(runs))]


@rc_context(LOOK)
def draw(chart: Chart, runs: Mapping[str, pd.DataFrame], held_out: Points | None = None) -> Figure | None:
    """A chart of one run or of several; `None` when no run has any of its metrics."""
    overlay = len(runs) > 1
    panels: list[tuple[Quantity, str]] = []  # and the line it is for; "" where all lines share a panel
    data, most = {}, 0
    for quantity in chart.quantities:
        data[quantity] = {name: quantity.of(frame) for name, frame in runs.items()}
        found = dict.fromkeys(line for lines in data[quantity].values() for line in lines)
        if quantity.not_if_zero and not any(
            values.any() for lines in data[quantity].values() for values in lines.values()
        ):
            continue
        panels += [(quantity, line) for line in found] if overlay or quantity.apart else [(quantity, "")] * bool(found)
        most = max(most, len(found))
    if not panels:
        return None
    columns = min(len(panels), 3 if overlay and most % 3 == 0 else 2)
    figure, grid = _panels(len(panels), columns, 2.5, 0.5, "none")
    mixes = [kind for kind in step_kinds(list(runs.values())) if "+" in kind]
    looks = [*branches_of(runs.values()), *mixes, "same parameters", "stale"]
    for axes, (quantity, wanted) in zip(grid, panels, strict=True):
        for place, (run, lines) in enumerate(data[quantity].items()):
            for line, values in lines.items():
                if wanted and line != wanted:
                    continue
                look, label = (place, run) if overlay else (looks.index(line), line)
                _plot(axes, values * quantity.factor, look, label, STYLES[place % 4] if overlay else STYLES[look % 2])
                beside = quantity.beside.format(branch=line)
                if beside in runs[run]:
                    _plot_beside(axes, runs[run][beside].dropna() * quantity.factor, look)
                if quantity.held_out:
                    _points(axes, (held_out or {}).get(run, {}).get(line, ()), quantity.held_out, look)
        title = f"{wanted}: {quantity.title}" if wanted else quantity.title
        axes.set_title(textwrap.fill(title, 88 // columns))
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(quantity.unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        # Ticks are a third of the time it takes to draw
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        if quantity.reference is not None:
            axes.axhline(quantity.reference, color="#666666", linewidth=0.9, zorder=1)
    _align(grid, [quantity for quantity, _ in panels])
    _place(figure, grid, columns, _legend(figure, grid, list(runs)))
    return figure


@rc_context(LOOK)
def draw_times(runs: Mapping[str, pd.DataFrame]) -> Figure | None:
    """Mean seconds of a step by stage, and how long its teachers are waited for; `None` without times."""
    frames, overlay = list(runs.values()), len(runs) > 1
    found = [(f"{kind} steps", "stages of a step", run, _stages(frame, kind))
             for kind in step_kinds(frames) for run, frame in runs.items()]  # fmt: skip
    found += [(f"teacher of {branch}", "teachers", run, teacher_seconds(frame, branch))
              for branch in branches_of(frames) for run, frame in runs.items()]  # fmt: skip
    panels: dict[str, dict[str, dict[str, float]]] = {}  # panel -> bar -> part -> seconds
    for name, group, run, seconds in found:
        if seconds:
            panels.setdefault(name if overlay else group, {})[run if overlay else name] = seconds
    if not panels:
        return None
    heights = [len(bars) + 1.2 for bars in panels.values()]
    figure = Figure(figsize=(WIDTH, 0.32 * sum(heights) + 0.9))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights, sharex=True).ravel().tolist()
    for axes, (title, bars) in zip(grid, panels.items(), strict=True):
        axes.set_title(title)
        for place, parts in enumerate(bars.values()):
            left = 0.0
            for part, width in parts.items():
                colour, hatch = PARTS[part]
                if width:  # and else no entry in the legend
                    axes.barh(
                        place, width, left=left, color=colour, hatch=hatch, edgecolor="white", height=0.7, label=part
                    )
                left += width
        _name_bars(axes, list(bars))
    widest = max(sum(parts.values()) for bars in panels.values() for parts in bars.values())
    grid[-1].set_xlim(0, 1.02 * widest or 1)
    grid[-1].set_xlabel("seconds, mean of the steps")
    _legend(figure, grid, list(PARTS))
    return figure


def _stages(frame: pd.DataFrame, kind: str) -> dict[str, float]:
    """Mean seconds of each stage of the steps of a kind, where the run has such steps and times."""
    steps = frame[frame["branch"] == kind]
    stages = [stage for stage in ("rollout", "score", "train") if f"time/{stage}" in frame]
    return {stage: steps[f"time/{stage}"].mean() for stage in stages} if len(steps) else {}


@rc_context(LOOK)
def draw_bars(groups: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """Horizontal bars in a panel per column, as the paper's Figure 4: column -> name -> (mean, spread; NaN for none)."""
    columns = min(2, len(groups))
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    figure, grid = _panels(len(groups), columns, 0.3 * len(names) + 1.0)
    for place, (axes, (column, bars)) in enumerate(zip(grid, groups.items(), strict=True)):
        means, spreads = np.array([bars.get(name, (np.nan, np.nan)) for name in names]).T
        axes.barh(range(len(names)), means, color=[COLOURS[index % 7] for index in range(len(names))], height=0.7)
        axes.errorbar(means, range(len(names)), xerr=spreads, fmt="none", ecolor="#333333", capsize=3)
        for index, (mean, spread) in enumerate(zip(means, np.nan_to_num(spreads), strict=True)):
            if np.isfinite(mean):
                axes.text(max(0.0, mean + spread), index, f"  {mean:.3g}", va="center", fontsize=8)
        axes.margins(x=0.25)  # for the numbers
        axes.set_xlabel(unit_of(column.partition("@")[0]))
        axes.set_title(textwrap.fill(column, 88 // columns))
        _name_bars(axes, names if place % columns == 0 else [""] * len(names))
    return figure


def unit_of(metric: str) -> str:
    """The unit of a metric that the charts know, else ""."""
    for quantity in (quantity for chart in CHARTS for quantity in chart.quantities):
        if re.fullmatch(re.escape(quantity.metric).replace(r"\{branch\}", "[^/]+"), metric):
            return "share" if quantity.factor == 100 else quantity.unit
    return ""


@rc_context(LOOK)  # from which matplotlib computes how many ticks there is room for
def png(figure: Figure) -> bytes:
    """The figure as a PNG of 150 dots per inch."""
    buffer = io.BytesIO()
    figure.set_dpi(150)
    layout = figure.get_layout_engine()
    if layout is not None:  # once; `savefig` would draw all of the figure twice for it
        layout.execute(figure)
        figure.set_layout_engine("none")
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------ helpers


def _panels(
    count: int, columns: int, height: float, more: float = 0.0, layout: Any = "constrained"
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, each `height` inches high, with `more` inches below them."""
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, rows * height + more), layout=layout)
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _plot(axes: Axes, values: pd.Series, look: int, label: str, style: str) -> None:
    more: dict[str, Any] = {"markersize": 4.5, "linewidth": 1.4}
    if len(values) >= SMOOTH_FROM:
        axes.plot(values, color=COLOURS[look % 7], linewidth=0.7, alpha=0.3)
        every = (look * 2, len(values) // 8)  # shifted, so that markers of close lines do not hide each other
        more = {"markersize": 5, "linewidth": 1.8, "markevery": every}
    axes.plot(_smooth(values), color=COLOURS[look % 7], marker=MARKERS[look % 7], linestyle=style, label=label,
              clip_on=False, **more)  # fmt: skip


def _plot_beside(axes: Axes, values: pd.Series, look: int) -> None:
    """Dotted, with hollow markers where there are few points: of a single one there is no line."""
    marker = MARKERS[look % 7] if len(values) < SMOOTH_FROM else ""
    axes.plot(_smooth(values), color=COLOURS[look % 7], marker=marker, markerfacecolor="white", markersize=4.5,
              linestyle=":", linewidth=1.4, clip_on=False)  # fmt: skip


def _points(axes: Axes, measured: Sequence[Measured], name: str, look: int) -> None:
    """Held-out gaps over the steps; the sampled reverse KL with its 95 % interval."""
    for each in measured:
        value, half = getattr(each, name), each.half if name == "kl" else math.nan
        if math.isfinite(value):
            error = [[half], [half]] if math.isfinite(half) else None
            axes.errorbar([each.step], [value], yerr=error, fmt="D", color=COLOURS[look % 7], markeredgecolor="#000000",
                          markersize=6, ecolor="#000000", elinewidth=1, capsize=3, zorder=4, clip_on=False,
                          label="_held_out")  # fmt: skip


def _smooth(values: pd.Series) -> pd.Series:
    """The running mean over a twelfth of the points, where there are many."""
    window = 1 if len(values) < SMOOTH_FROM else round(len(values) / 12)
    return values.rolling(window, center=True, min_periods=1).mean()


def _align(grid: Sequence[Axes], quantities: Sequence[Quantity]) -> None:
    """The same steps in all panels, and the same values in those of one quantity, which are there to be compared."""
    for axes, quantity in zip(grid, quantities, strict=True):
        if quantity.from_zero:
            top = axes.dataLim.ymax
            axes.set_ylim(0, top * 1.06 if np.isfinite(top) and top > 0 else 1)
    steps = [step for axes in grid for step in axes.get_xlim()]
    for quantity in dict.fromkeys(quantities):
        if quantity.apart:
            for axes, drawn in zip(grid, quantities, strict=True):
                if drawn is quantity:
                    axes.set_xlim(min(steps), max(steps))
            continue
        same = [axes for axes, drawn in zip(grid, quantities, strict=True) if drawn is quantity]
        values = [value for axes in same for value in axes.get_ylim()]
        low, high = min(values), max(values)
        pad = 0.03 * (high - low) if len(same) > 1 and not quantity.from_zero else 0.0  # for markers at the edge
        for axes in same:
            axes.set(xlim=(min(steps), max(steps)), ylim=(low - pad, high + pad))
            # Very large and very small numbers in full; matplotlib puts a factor where the title is.
            if not 0.01 <= max(map(abs, axes.get_ylim())) < 10_000:
                axes.yaxis.set_major_formatter(
                    FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value) > 1 else f"{value:.3g}")
                )


def _name_bars(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _place(figure: Figure, grid: Sequence[Axes], columns: int, legend: int) -> None:
    """Room around panels of curves, in inches, for numbers, names and a legend of so many rows. matplotlib's own layout
    would measure each text several times, which takes as long as all the rest."""
    width, height = figure.get_size_inches()
    title = 0.14 + 0.14 * max(axes.get_title(loc="left").count("\n") + 1 for axes in grid)
    side, below, rows = 0.66, 0.52, -(-len(grid) // columns)
    bottom = below + 0.1 + 0.2 * legend
    across = (width - side * columns - 0.12) / columns
    down = (height - bottom - title - (rows - 1) * (below + title)) / rows
    figure.subplots_adjust(
        left=side / width, right=1 - 0.12 / width, bottom=bottom / height, top=1 - title / height, wspace=side / across,
        hspace=(below + title) / down,
    )  # fmt: skip


def _legend(figure: Figure, grid: Sequence[Axes], order: Sequence[str]) -> int:
    """One legend under all panels, in as many columns as its texts allow; what is in `order` comes in that order. Gives the
    number of its rows."""
    entries: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    names = [name for name in order if name in entries] + [name for name in entries if name not in order]
    if entries:
        columns = max(1, min(len(entries), 96 // (max(map(len, entries)) + 8)))
        handles = [entries[name] for name in names]
        where: Any = "lower center" if figure.get_layout_engine() is None else "outside lower center"
        figure.legend(handles, names, loc=where, ncols=columns, handlelength=3, borderaxespad=0.2)
        return -(-len(entries) // columns)
    return 0
