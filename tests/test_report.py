"""`camopd report` against metrics made by hand: its words, its numbers, its figures, its errors."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from camopd import CaMOPDConfig, cli, figures
from camopd.report import metrics_file, names_of, read_run, signs_of, to_html, to_markdown, trend_of, write_report


DOCS = Path(__file__).parent.parent / "docs"


def make_run(folder, steps=40, **metrics):
    """A run in which three general steps alternate with a domain step. A metric is a value, or a function of step and
    branch; with `{branch}` in its name it is the branch's."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            branch = "general" if step % 4 else "domain"
            record = {"step": step, "branch": branch}
            for name, value in metrics.items():
                record[name.format(branch=branch)] = value(step, branch) if callable(value) else value
            file.write(json.dumps(record) + "\n")
    return folder / "metrics.jsonl"


def by_branch(general, domain):
    return lambda step, branch: general if branch == "general" else domain


def signs(path):
    return {sign.name: sign for sign in signs_of(read_run(path)[0])}


GAP = {"gap/{branch}/abs_mean": 0.5, "gap/{branch}/mean": -0.25}
DIAGNOSTICS = {
    "conflict/cosine": -0.1, "conflict/dot": -1e-5, "conflict/stale": 0.0, "conflict/general_norm": 0.02,
    "conflict/domain_norm": 0.01, "coherence/{branch}/gcg": 20.0, "coherence/{branch}/gcg_control": 15.0,
    "coherence/{branch}/gcg_excess": 5.0, "update/cosine": 0.5, "selection/{branch}/jaccard_length": 0.5,
    "selection/{branch}/top1_share": 0.2, "selection/{branch}/score_perplexity_spearman": 0.1,
}  # fmt: skip
ALWAYS = {
    **GAP, "selection/{branch}/kept_fraction": 0.5, "selection/{branch}/mass": 0.8, "selection/{branch}/kept": 8,
    "selection/{branch}/length_kept": 100.0, "selection/{branch}/length_dropped": 50.0, "grad_norm": 1.0,
    "score/{branch}/length_spearman": 0.1, "score/{branch}/p90": 1.0, "score/{branch}/p50": 0.5,
    "rollout/{branch}/length": 80.0, "train/tokens": 1000, "train/padding": 0.1, "train/imbalance": 0.0,
    "time/step": 10.0, "time/rollout": 5.0, "time/score": 2.0, "time/train": 3.0, "time/teacher_{branch}": 1.5,
    "time/teacher_{branch}_hidden": 1.0, "time/teacher_{branch}_idle": 8.5,
}  # fmt: skip


# --- reading -----------------------------------------------------------------------------------------------------


def test_a_run_is_read_by_step_with_nan_where_there_is_no_value(tmp_path):
    lines = ['{"step": 1, "branch": "a", "loss": -2, "x": null}', '{"step": 2, "branch": "a+b", "loss": 3.5, "y": 1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    frame, note = read_run(tmp_path / "metrics.jsonl")
    assert note == ""
    assert list(frame.index) == [1, 2]
    assert list(frame["branch"]) == ["a", "a+b"]
    assert list(frame["loss"]) == [-2, 3.5]
    assert frame["x"].isna().all()
    assert np.isnan(frame["y"][1]) and frame["y"][2] == 1
    assert figures.branches_of({"": frame}) == ["a", "b"]


def test_ratios_and_chance_are_made_from_what_is_there(tmp_path):
    # 100 / 50 tokens; two independent halves share a quarter of all out of three quarters: 1/3
    frame, _ = read_run(make_run(tmp_path, 8, **ALWAYS, **DIAGNOSTICS))
    assert frame["selection/general/length_ratio"].dropna().unique() == [2.0]
    assert frame["selection/general/jaccard_chance"].dropna().unique() == pytest.approx([1 / 3])


def test_a_last_line_cut_short_is_left_out_and_said(tmp_path):
    path = make_run(tmp_path / "run", 8, **GAP)
    path.write_text(path.read_text()[:-20])
    frame, note = read_run(path)
    assert len(frame) == 7
    assert "the last line of metrics.jsonl is cut short and left out" in note
    write_report({"run": path}, tmp_path / "out")
    assert note in (tmp_path / "out" / "report.md").read_text()


def test_any_other_broken_line_is_an_error_with_its_number(tmp_path):
    path = make_run(tmp_path, 8, **GAP)
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:30]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"line 3 of .*metrics\.jsonl' is no JSON: .* Delete the line"):
        read_run(path)


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_a_file_without_steps_says_when_there_will_be_one(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl' has no steps\. Training writes a line after each"):
        read_run(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("line", ["[1, 2]", '{"loss": 1.0}', '{"step": 3}'])
def test_a_file_of_something_else_is_an_error_that_shows_it(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(
        ValueError, match=r"line 1 of .*x\.jsonl' is no step of a run: it needs `step` and `branch`, got"
    ) as e:
        read_run(tmp_path / "x.jsonl")
    assert line in str(e.value)


def test_a_run_that_is_not_there_is_an_error_with_its_path():
    with pytest.raises(ValueError, match=r"no run at 'no/such'\. Give the output_dir of a run, or its metrics\.jsonl"):
        metrics_file("no/such")


def test_a_folder_that_is_no_run_names_the_runs_below_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"is no folder of a run: it has no metrics\.jsonl, which training writes .*dir\.$"
    ):
        metrics_file(str(tmp_path))
    path = make_run(tmp_path / "seed-0" / "recovered", 8, **GAP)
    with pytest.raises(ValueError, match=r"Below it there are runs: .*seed-0/recovered\."):
        metrics_file(str(tmp_path))
    assert metrics_file(str(path.parent)) == metrics_file(str(path)) == path


def test_names_are_what_differs(tmp_path):
    paths = [tmp_path / name / "recovered" / "metrics.jsonl" for name in ("seed-0", "seed-1")]
    assert names_of(paths) == ["seed-0", "seed-1"]
    assert names_of(paths[:1]) == ["recovered"]
    assert names_of([paths[0], paths[0]]) == ["recovered (1)", "recovered (2)"]
    long = [tmp_path / f"{'a' * 50}{middle}{'b' * 50}" / "metrics.jsonl" for middle in "xy"]
    assert names_of(long) == [f"{'a' * 19}…{'b' * 19} (1)", f"{'a' * 19}…{'b' * 19} (2)"]


# --- words and numbers -------------------------------------------------------------------------------------------


def series(values):
    return pd.Series(values, index=range(1, len(values) + 1), dtype=float)


def test_a_straight_line_rises_from_its_own_ends():
    # 1..15: thirds of five; first 1..5, last 11..15
    trend = trend_of(series(range(1, 16)))
    assert (trend.steps, trend.first, trend.last, trend.verdict, trend.higher) == (15, 3, 13, "rises", True)
    assert (trend.start, trend.end) == pytest.approx((11, 15))
    trend = trend_of(series(range(15, 0, -1)))
    assert (trend.first, trend.last, trend.verdict, trend.higher) == (13, 3, "falls", False)


def test_what_does_not_leave_the_noise_is_flat():
    assert trend_of(series([2.0] * 30)).verdict == "is flat"
    zigzag = trend_of(series([1.0, 2.0] * 15))
    assert (zigzag.verdict, zigzag.higher) == ("is flat", False)
    # three standard errors, but half a percent
    assert trend_of(series([100 + 0.05 * step for step in range(30)])).verdict == "is flat"


def test_a_rise_that_ends_early_is_told_from_one_that_goes_on():
    early = trend_of(series([0.1] * 10 + [0.2] * 20))
    assert (early.verdict, early.higher) == ("is flat", True)


def test_twelve_steps_are_too_few_for_a_trend():
    trend = trend_of(series(range(12)))
    assert (trend.verdict, trend.first, trend.last) == ("too few steps", 1.5, 9.5)
    assert trend_of(series(range(13))).verdict == "rises"


def test_the_answer_names_the_branch_that_gets_worse(tmp_path):
    # 60 steps, 15 of the domain: steps 4, 8, ..., 60 with gaps 0.04, 0.08, ..., 0.60; its last third begins at 0.44
    found = signs(
        make_run(tmp_path, 60, **{"gap/{branch}/abs_mean": lambda step, b: 0.01 * step if b == "domain" else 0.5})
    )
    assert found["Answer"].text.startswith(
        "**domain** gets worse: its gap rises by 36% over the last third of its steps (0.44 → 0.6 nats per token)."
    )
    assert found["A gap that rises"].state == "seen"
    assert "**domain** 0.12 → 0.52, and rises over the last third, 0.44 → 0.6" in found["A gap that rises"].text
    assert "**general** 0.5 → 0.5, and is flat over the last third" in found["A gap that rises"].text


def test_the_answer_says_when_no_branch_gets_worse(tmp_path):
    found = signs(make_run(tmp_path, 60, **GAP))
    assert found["Answer"].text.startswith(
        "None by its gap, which rises for no branch over the last third of its steps (general, domain)."
    )
    assert "Not measured: counteraction, imbalance, weak samples" in found["Answer"].text


def test_the_answer_says_when_a_branch_has_moved_away_and_stays_there(tmp_path):
    found = signs(make_run(tmp_path, 120, **{"gap/{branch}/abs_mean": lambda step, _: 0.1 if step < 50 else 0.2}))
    assert (
        "**domain** has moved away from its teacher (0.1 → 0.2 nats per token, first to last third of its steps), and "
        "stays there at the end." in found["Answer"].text
    )


def test_a_short_run_shows_its_numbers_and_tells_no_trend(tmp_path):
    found = signs(make_run(tmp_path, 8, **{"gap/{branch}/abs_mean": lambda step, _: 1 / step}))
    # general steps 1, 2, 3, 5, 6, 7: (1 + 1/2) / 2 and (1/6 + 1/7) / 2; domain steps 4 and 8
    assert "This run is too short to tell: a trend takes 13 steps of a branch." in found["Answer"].text
    assert "**general** 0.75 → 0.155 (6 steps), **domain** 0.25 → 0.125 (2 steps)" in found["Answer"].text
    assert found["A gap that rises"].state == "unclear"


def test_a_branch_with_too_few_steps_is_named(tmp_path):
    found = signs(make_run(tmp_path, 20, **GAP))  # 15 and 5
    assert "(general). Too few steps of domain to tell (5)." in found["Answer"].text


@pytest.mark.parametrize(
    ("negative", "state"),
    [(12, "seen"), (9, "seen"), (8, "unclear"), (4, "unclear"), (3, "not seen"), (0, "not seen")],
)
def test_counteraction_counts_negative_cosines(tmp_path, negative, state):
    # measured in 12 of 48 steps, in `negative` of them -0.2 and else +0.15
    value = lambda step, _: (-0.2 if step // 4 <= negative else 0.15) if step % 4 == 0 else None  # noqa: E731
    found = signs(make_run(tmp_path, 48, **GAP, **{"conflict/cosine": value, "conflict/stale": 0.0}))["Counteraction"]
    mean = (-0.2 * negative + 0.15 * (12 - negative)) / 12
    assert found.state == state
    assert (
        f"the cosine of the branch gradients is negative in {negative} of 12 measured steps, mean {mean:+.3f}"
        in found.text
    )


def test_counteraction_at_the_same_parameters_decides_over_stale_gradients(tmp_path):
    metrics = {"conflict/cosine": by_branch(-0.1, 0.1), "conflict/stale": by_branch(1.0, 0.0)}
    found = signs(make_run(tmp_path, 40, **GAP, **metrics))["Counteraction"]
    assert found.state == "not seen"
    assert "gradients is negative in 0 of 10 measured steps, mean +0.100" in found.text
    assert "earlier, stale gradient is negative in 30 of 30 measured steps, mean -0.100" in found.text


def test_few_measured_steps_are_unclear(tmp_path):
    found = signs(make_run(tmp_path, 7, **GAP, **{"conflict/cosine": -0.1}))["Counteraction"]
    assert found.state == "unclear"
    assert "negative in 7 of 7 measured steps" in found.text
    assert "fewer than 8 measured steps of a branch say little" in found.text


def test_imbalance_compares_norms_and_tokens_per_step(tmp_path):
    metrics = {"grad_norm": by_branch(4.0, 1.0), "selection/{branch}/kept": by_branch(10, 20),
               "selection/{branch}/length_kept": 100.0}  # fmt: skip
    found = signs(make_run(tmp_path, 40, **GAP, **metrics))["Imbalance"]
    assert found.state == "seen"
    # norms 30 x 4 of 130; tokens 10 x 2000 of 50000
    assert (
        "per step, general has 4 times the gradient norm of domain (92% of the sum, with 75% of the steps)"
        in found.text
    )
    assert (
        "per step, domain has 2 times the trained completion tokens of general (40% of the sum, with 25%" in found.text
    )
    even = signs(make_run(tmp_path, 40, **GAP, grad_norm=by_branch(1.5, 1.0)))["Imbalance"]
    assert (even.state, "1.5 times the gradient norm" in even.text) == ("not seen", True)


def test_imbalance_of_mixed_steps_takes_the_norms_of_the_branches(tmp_path):
    lines = [
        {
            "step": step,
            "branch": "general+domain",
            "grad_norm": 9.0,
            "conflict/general_norm": 3.0,
            "conflict/domain_norm": 1.0,
        }
        for step in range(1, 11)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = signs(tmp_path / "metrics.jsonl")["Imbalance"]
    assert found.state == "seen"
    assert (
        "per step, general has 3 times the gradient norm of domain (75% of the sum, with 50% of the steps)"
        in found.text
    )


def test_coherence_is_what_lies_above_the_random_control(tmp_path):
    metrics = {"coherence/{branch}/gcg": 20.0, "coherence/{branch}/gcg_control": by_branch(15.0, 20.0),
               "coherence/{branch}/gcg_excess": by_branch(5.0, 0.0)}  # fmt: skip
    found = signs(make_run(tmp_path, 40, **GAP, **metrics))["Weak samples"]
    assert found.state == "seen"
    assert "kept samples agree more than chance gives" in found.text
    assert "**general** GCG +20.0%, random control +15.0%, difference +5.0 points (30 measured steps)" in found.text
    metrics["coherence/{branch}/gcg_excess"] = lambda step, _: 1.0 if step % 8 < 4 else -1.0
    found = signs(make_run(tmp_path, 40, **GAP, **metrics))["Weak samples"]
    assert (found.state, "agree no more than chance gives" in found.text) == ("not seen", True)


def test_selection_that_follows_length_is_compared_with_chance(tmp_path):
    metrics = {**ALWAYS, **DIAGNOSTICS, "score/{branch}/length_spearman": by_branch(-0.4, 0.1)}
    found = signs(make_run(tmp_path, 40, **metrics))
    assert found["Selection follows length"].state == "seen"
    assert (
        "**general** rank correlation of score and length -0.40, kept samples 2 times as long as dropped ones, overlap "
        "with selecting by length 0.50 (chance 0.33)" in found["Selection follows length"].text
    )
    outliers = found["Selection follows outliers"]
    assert outliers.state == "not seen"
    assert (
        "**domain** 20% of the score on the top 1% of tokens, rank correlation of score and teacher perplexity +0.10"
        in (outliers.text)
    )


def test_without_selection_nothing_follows_length(tmp_path):
    metrics = {**ALWAYS, "score/{branch}/length_spearman": 0.9, "selection/{branch}/kept_fraction": 1.0}
    found = signs(make_run(tmp_path / "off", 40, **metrics))
    for name in ("Selection follows length", "Selection follows outliers"):
        assert (found[name].state, found[name].text) == ("not seen", "every sample is kept, so nothing is selected.")
    metrics["selection/{branch}/kept_fraction"] = by_branch(1.0, 0.5)
    found = signs(make_run(tmp_path / "half", 40, **metrics))["Selection follows length"]
    assert found.state == "seen"
    assert "general" not in found.text and "**domain** rank correlation of score and length +0.90" in found.text


def test_momentum_is_told_by_the_branch_of_the_step(tmp_path):
    found = signs(make_run(tmp_path, 40, **GAP, **{"update/cosine": by_branch(0.5, 0.05)}))["Steps mostly momentum"]
    assert found.state == "seen"
    assert "**general** +0.50 in 30 measured steps; **domain** +0.05 in 10 measured steps" in found.text


def test_time_and_padding_are_shares_of_the_step(tmp_path):
    text = signs(make_run(tmp_path, 40, **ALWAYS))["Time and padding"].text
    assert "a step takes 10 s: rollout 50%, scoring 20%, training 30%" in text
    assert "0.5 s for that of general, 0.5 s for that of domain" in text
    assert "padding 10% of what goes" in text


def test_what_is_not_measured_says_what_turns_it_on(tmp_path):
    found = signs(make_run(tmp_path, 40, **ALWAYS))
    for name, words in (
        ("Counteraction", figures.DIAGNOSTICS),
        ("Weak samples", figures.DIAGNOSTICS),
        ("Selection follows outliers", "no step says which tokens carry the score"),
        ("Steps mostly momentum", "no Adam moments that can be read"),
    ):
        assert found[name].state == "not measured"
        assert words in found[name].text


# --- pages and figures -------------------------------------------------------------------------------------------


def test_the_page_holds_its_figures_and_nothing_of_the_network(tmp_path):
    path = make_run(tmp_path / "run", 20, **ALWAYS, **DIAGNOSTICS)
    said = write_report({"run": path}, tmp_path / "out")
    page, text = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("html", "md"))
    names = [*(chart.name for chart in figures.CHARTS), "time"]
    assert page.count('src="data:image/png;base64,') == len(names)
    assert re.findall(r"https?://|<script|<link|@import|src=\"(?!data:)", page) == []
    for name in names:
        assert f"]({name}.png)" in text
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Not measured" not in text.split("## Gaps")[1]
    assert page.index("Which of my branches is hurting?") < page.index("<img")
    assert len(said) == 1 and "*" not in said[0]


def test_figures_without_data_are_left_out_with_what_turns_them_on(tmp_path):
    write_report({"run": make_run(tmp_path / "run", 20, **ALWAYS)}, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out" / "conflict.png").exists()
    assert not (tmp_path / "out" / "coherence.png").exists()
    left_out = text.split("## Not measured")[1].split("##")[0]
    assert f"the paper's Figure 1): set `{figures.DIAGNOSTICS}: 10` in the config." in left_out
    assert "Gradient coherence gain" in left_out
    assert left_out.count("\n- ") == 2


def test_several_runs_are_overlaid_in_every_panel(tmp_path):
    names = ["one", "two", "three"]
    runs = {
        name: read_run(make_run(tmp_path / name, 12 + number, **{**ALWAYS, "gap/{branch}/abs_mean": float(number)}))[0]
        for number, name in enumerate(names)
    }
    for chart in figures.CHARTS:
        figure = figures.draw(chart, runs)
        if figure is None:
            continue
        assert [text.get_text() for text in figure.legends[0].get_texts()] == names
        for axes in figure.axes:
            if axes.get_visible():
                labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
                assert labels == names, chart.name
    axes = figures.draw(figures.CHARTS[0], runs).axes[1]  # mean |gap| of the domain
    assert axes.get_title(loc="left") == "domain: mean |gap|"
    assert [list(line.get_ydata()) for line in axes.lines] == [[0] * 3, [1] * 3, [2] * 3]
    assert [list(line.get_xdata()) for line in axes.lines] == [[4, 8, 12]] * 3
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 3
    times = figures.draw_times(runs)
    assert [axes.get_title(loc="left") for axes in times.axes] == [
        "general steps", "domain steps", "teacher of general", "teacher of domain"
    ]  # fmt: skip
    assert [tick.get_text() for tick in times.axes[0].get_yticklabels()] == names


def test_one_run_has_its_branches_in_one_panel(tmp_path):
    frame = read_run(make_run(tmp_path, 12, **ALWAYS))[0]
    figure = figures.draw(figures.CHARTS[0], {"run": frame})
    assert [axes.get_ylabel() for axes in figure.axes] == ["nats per token"] * 2
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["general", "domain"]


def test_stale_cosines_are_a_line_of_their_own(tmp_path):
    metrics = {**DIAGNOSTICS, "conflict/stale": by_branch(1.0, 0.0)}
    chart = next(chart for chart in figures.CHARTS if chart.name == "conflict")
    figure = figures.draw(chart, {"run": read_run(make_run(tmp_path, 12, **GAP, **metrics))[0]})
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert lines["same parameters"] == [4, 8, 12]
    assert lines["stale"] == [1, 2, 3, 5, 6, 7, 9, 10, 11]


def test_pages_of_several_runs_have_a_line_for_each(tmp_path):
    paths = {name: make_run(tmp_path / name, 20, **GAP) for name in ("one", "two")}
    said = write_report(paths, tmp_path / "out")
    assert [line.split(":")[0] for line in said] == ["one", "two"]
    text = (tmp_path / "out" / "report.md").read_text()
    top, _, end = text.partition("## The runs one by one")
    for name in paths:
        assert f"- `{name}`: " in top
        assert f"### `{name}`" in end


def test_the_texts_of_others_stay_texts():
    blocks = [("p", "**b** `a<b`"), ("quote", "<script>**x**\n\ny"), ("table", [["h"], ["a|b & c"]])]
    page = to_html("t<", blocks, {})
    assert "<b>b</b> <code>a&lt;b</code>" in page
    assert "&lt;script&gt;**x**\n\ny</blockquote>" in page
    assert "<td>a|b &amp; c</td>" in page
    assert to_markdown(blocks) == "**b** `a<b`\n\n> <script>**x**\n> \n> y\n\n| h |\n| --- |\n| a\\|b & c |\n"


def test_every_metric_that_is_drawn_is_documented():
    """Names are stable; a chart of a metric that nobody writes would be left out without a word."""
    documented = (DOCS / "metrics.md").read_text()
    made_here = {"selection/<branch>/length_ratio", "selection/<branch>/jaccard_chance"}
    for chart in figures.CHARTS:
        for name in [q.metric for q in chart.quantities] + [q.beside for q in chart.quantities if q.beside]:
            shown = name.replace("{branch}", "<branch>")
            assert shown in made_here or f"`{shown}`" in documented, name
    assert figures.DIAGNOSTICS in {field.name for field in dataclasses.fields(CaMOPDConfig)}


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_prints_the_answer_and_where_the_page_is(tmp_path, capsys):
    for name in ("one", "two"):
        make_run(tmp_path / name, 8, **GAP)
    cli.main(["report", str(tmp_path / "one"), str(tmp_path / "two")])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("one: This run is too short to tell")
    assert said[1].startswith("two: ")
    assert said[2] == f"{tmp_path / 'one' / 'report' / 'report.html'}, and the same in report.md"
    assert (tmp_path / "one" / "report" / "report.html").is_file()


def test_a_report_into_a_file_is_refused(tmp_path, capsys):
    path = make_run(tmp_path / "run", 8, **GAP)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(path), "--out", str(path)])
    assert stopped.value.code == 2
    assert re.search(
        r"where the report is to go, is a file and no folder\. Give another --out", capsys.readouterr().err
    )


def test_without_matplotlib_the_command_to_type_is_shown():
    code = "import sys; sys.modules['matplotlib'] = None; from camopd.cli import main; main(['report', 'x'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 2
    assert re.search(r"camopd: figures need 'matplotlib.*': pip install -e '\.\[report\]'", found.stderr)


def test_a_report_imports_no_torch(tmp_path):
    path = make_run(tmp_path, 8, **GAP)
    code = (
        "import sys; from camopd.cli import main; main(sys.argv[1:])\n"
        "print(sorted({'torch', 'transformers', 'trl', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, "report", str(path)], capture_output=True, text=True, timeout=300, check=True
    )
    assert found.stdout.splitlines()[-1] == "[]"
