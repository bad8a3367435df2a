"""The figures (camopd/report/charts.py)."""

import dataclasses
from pathlib import Path

import pytest
from runs import ALWAYS, GAP, MEASURED, by_branch, make_run

from camopd import CaMOPDConfig
from camopd.report.charts import CHARTS, draw, draw_bars, draw_times
from camopd.report.read import read_run
from camopd.report.signs import DIAGNOSTICS
from camopd.verdict import Measured


DOCS = Path(__file__).parent.parent / "docs"


def test_draw_overlays_several_runs_in_every_panel(tmp_path):
    names = ["one", "two", "three"]
    runs = {
        name: read_run(make_run(tmp_path / name, 12 + number, **{**ALWAYS, "gap/{branch}/abs_mean": float(number)}))[0]
        for number, name in enumerate(names)
    }
    for chart in CHARTS:
        figure = draw(chart, runs)
        if figure is None:
            continue
        assert [text.get_text() for text in figure.legends[0].get_texts()] == names
        for axes in figure.axes:
            if axes.get_visible():
                labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
                assert labels == names, chart.name
    axes = draw(CHARTS[0], runs).axes[1]  # mean |gap| of the domain
    assert axes.get_title(loc="left") == "domain: mean |gap|"
    assert [list(line.get_ydata()) for line in axes.lines] == [[0] * 3, [1] * 3, [2] * 3]
    assert [list(line.get_xdata()) for line in axes.lines] == [[4, 8, 12]] * 3
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 3
    times = draw_times(runs)
    assert [axes.get_title(loc="left") for axes in times.axes] == [
        "general steps", "domain steps", "teacher of general", "teacher of domain"
    ]  # fmt: skip
    assert [tick.get_text() for tick in times.axes[0].get_yticklabels()] == names


def test_draw_puts_the_branches_of_one_run_in_one_panel(tmp_path):
    frame = read_run(make_run(tmp_path, 12, **ALWAYS))[0]
    figure = draw(next(chart for chart in CHARTS if chart.name == "selection"), {"run": frame})
    assert [axes.get_ylabel() for axes in figure.axes] == ["% of samples", "% of score"]
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["general", "domain"]


def test_draw_gives_each_gap_a_scale_on_which_it_is_seen_and_held_out_points_over_it(tmp_path):
    metrics = {**ALWAYS, "gap/{branch}/abs_mean": lambda step, b: 0.5 if b == "general" else 0.002 * (1 + step / 40)}
    frame = read_run(make_run(tmp_path, 40, **metrics))[0]
    points = {
        "run": {"domain": [Measured(0, 0.01, 0.002, 30, gap_abs=0.004), Measured(40, 0.02, 0.002, 30, gap_abs=0.005)]}
    }
    figure = draw(CHARTS[0], {"run": frame}, points)
    general, domain, _, kl = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "general: mean |gap|", "domain: mean |gap|", "general: sampled reverse KL", "domain: sampled reverse KL"
    ]  # fmt: skip
    low, high = domain.get_ylim()
    rise = 0.001 / (high - low)  # of the training gap, in parts of the panel's height
    assert (general.get_ylim()[1], low) == (pytest.approx(0.53), 0) and rise > 0.15
    shown = [(list(line.get_xdata()), list(line.get_ydata())) for line in domain.lines if line.get_marker() == "D"]
    assert shown == [([0], [0.004]), ([40], [0.005])]
    assert [line.get_ydata()[0] for line in kl.lines if line.get_marker() == "D"] == [0.01, 0.02]
    (bars, *_) = kl.collections  # 95 % of 30 prompts: 2.045 standard errors
    assert bars.get_segments()[0][:, 1] == pytest.approx([0.01 - 0.00409, 0.01 + 0.00409], abs=1e-5)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["general", "domain"]


def test_draw_has_no_panel_that_is_empty_or_repeats_another(tmp_path):
    frame = read_run(make_run(tmp_path, 12, **{**ALWAYS, **MEASURED, "train/padding": 0.0}))[0]
    shown = {chart.name: figure for chart in CHARTS if (figure := draw(chart, {"run": frame}))}
    titles = [axes.get_title(loc="left") for axes in shown["work"].axes]
    assert titles == ["tokens trained", "time of a step"]  # one process: no fullest one
    assert [axes.get_title(loc="left") for axes in shown["conflict"].axes] == ["cosine of the branch gradients"]
    for name, figure in shown.items():
        drawn = [  # without the grey line of a reference, which is there without any data
            [tuple(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines if named(line)]
            for axes in figure.axes
            if axes.get_visible()
        ]
        assert all(points for panel in drawn for points in panel) and all(drawn), name
        assert all(panel not in drawn[:place] for place, panel in enumerate(drawn)), name


def named(line):
    """Whether a line stands in the legend: matplotlib gives the others a label that begins so."""
    return not line.get_label().startswith("_")


@pytest.mark.parametrize(("steps", "marked"), [(4, True), (12, True), (160, False)])
def test_draw_marks_a_control_that_is_measured_a_few_times_or_once(tmp_path, steps, marked):
    chart = next(chart for chart in CHARTS if chart.name == "coherence")
    (axes,) = draw(chart, {"run": read_run(make_run(tmp_path, steps, **GAP, **MEASURED))[0]}).axes
    (control,) = [line for line in axes.lines if line.get_linestyle() == ":" and line.get_color() == "#D55E00"]
    assert list(control.get_ydata()) == [15.0] * (steps // 4)  # of the domain; GCG is 20
    assert (control.get_marker() == "s", control.get_markerfacecolor()) == (marked, "white")


def test_draw_gives_stale_cosines_a_line_of_their_own(tmp_path):
    metrics = {**MEASURED, "conflict/stale": by_branch(1.0, 0.0)}
    chart = next(chart for chart in CHARTS if chart.name == "conflict")
    figure = draw(chart, {"run": read_run(make_run(tmp_path, 12, **GAP, **metrics))[0]})
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert lines["same parameters"] == [4, 8, 12]
    assert lines["stale"] == [1, 2, 3, 5, 6, 7, 9, 10, 11]


def test_charts_draw_documented_metrics_only():
    """Names are stable; a chart of a metric that nobody writes would be left out without a word."""
    documented = (DOCS / "metrics.md").read_text()
    made_here = {"selection/<branch>/length_ratio", "selection/<branch>/jaccard_chance"}
    for chart in CHARTS:
        for name in [q.metric for q in chart.quantities] + [q.beside for q in chart.quantities if q.beside]:
            shown = name.replace("{branch}", "<branch>")
            assert shown in made_here or f"`{shown}`" in documented, name
    assert DIAGNOSTICS in {field.name for field in dataclasses.fields(CaMOPDConfig)}


def test_draw_bars_has_a_bar_for_each_config_in_each_panel():
    nan = float("nan")
    figure = draw_bars({
        "gap/general/abs_mean@5": {"one": (1.0, 0.5), "two": (2.0, nan)}, "share": {"one": (0.25, nan), "two": (nan, nan)},
    })  # fmt: skip
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == [1.0, 2.0]
    assert [label.get_text() for label in left.get_yticklabels()] == ["one", "two"]
    assert [text.get_text().strip() for text in left.texts] == ["1", "2"]
    assert [text.get_text().strip() for text in right.texts] == ["0.25"]
    assert (left.get_xlabel(), right.get_xlabel()) == ("nats per token", "")
