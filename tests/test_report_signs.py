"""What a run says, against metrics made by hand: words and numbers (camopd/report/signs.py)."""

import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import ALWAYS, GAP, MEASURED, by_branch, make_run

from camopd.report.read import read_run
from camopd.report.signs import DIAGNOSTICS, hurting, signs_of, trend_of
from camopd.verdict import Measured, verdicts_of


def signs(path):
    return {sign.name: sign for sign in signs_of(read_run(path)[0])}


def series(values):
    return pd.Series(values, index=range(1, len(values) + 1), dtype=float)


def test_trend_of_a_straight_line_rises_from_its_own_ends():
    # 1..15: thirds of five; first 1..5, last 11..15
    trend = trend_of(series(range(1, 16)))
    assert (trend.steps, trend.first, trend.last, trend.verdict, trend.higher) == (15, 3, 13, "rises", True)
    assert (trend.start, trend.end) == pytest.approx((11, 15))
    trend = trend_of(series(range(15, 0, -1)))
    assert (trend.first, trend.last, trend.verdict, trend.higher) == (13, 3, "falls", False)


def test_trend_that_does_not_leave_the_noise_is_flat():
    assert trend_of(series([2.0] * 30)).verdict == "is flat"
    zigzag = trend_of(series([1.0, 2.0] * 15))
    assert (zigzag.verdict, zigzag.higher) == ("is flat", False)
    # three standard errors, but half a percent
    assert trend_of(series([100 + 0.05 * step for step in range(30)])).verdict == "is flat"


def test_trend_that_ends_early_is_told_from_one_that_goes_on():
    early = trend_of(series([0.1] * 10 + [0.2] * 20))
    assert (early.verdict, early.higher) == ("is flat", True)


def test_trend_of_twelve_steps_is_not_told():
    trend = trend_of(series(range(12)))
    assert (trend.verdict, trend.first, trend.last) == ("too few steps", 1.5, 9.5)
    assert trend_of(series(range(13))).verdict == "rises"


@given(st.lists(st.integers(-1000, 1000), min_size=13, max_size=60))
def test_trend_of_mirrored_values_is_mirrored(values):
    mirrored = {"rises": "falls", "falls": "rises", "is flat": "is flat"}
    there, back = trend_of(series(values)), trend_of(-series(values))
    assert back.verdict == mirrored[there.verdict]
    assert (back.first, back.last) == (-there.first, -there.last)
    assert not (there.higher and back.higher)


def test_answer_names_the_branch_that_gets_worse(tmp_path):
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


def test_answer_says_when_no_branch_gets_worse(tmp_path):
    found = signs(make_run(tmp_path, 60, **GAP))
    assert found["Answer"].text.startswith(
        "No branch has a training gap that rises over the last third of its steps (general, domain)."
    )
    assert "Not measured:" not in found["Answer"].text  # one line of the page says it


def test_answer_says_when_a_branch_has_moved_away_and_stays_there(tmp_path):
    found = signs(make_run(tmp_path, 120, **{"gap/{branch}/abs_mean": lambda step, _: 0.1 if step < 50 else 0.2}))
    assert (
        "**domain** has moved away from its teacher (0.1 → 0.2 nats per token, first to last third of its steps), and "
        "stays there at the end." in found["Answer"].text
    )


def test_answer_of_a_short_run_shows_its_numbers_and_tells_no_trend(tmp_path):
    found = signs(make_run(tmp_path, 8, **{"gap/{branch}/abs_mean": lambda step, _: 1 / step}))
    # general steps 1, 2, 3, 5, 6, 7: (1 + 1/2) / 2 and (1/6 + 1/7) / 2; domain steps 4 and 8
    assert "This run is too short to tell a trend, which takes 13 steps of a branch." in found["Answer"].text
    assert "**general** 0.75 → 0.155 (6 steps), **domain** 0.25 → 0.125 (2 steps)" in found["Answer"].text
    assert found["A gap that rises"].state == "unclear"


def test_answer_names_a_branch_with_too_few_steps(tmp_path):
    found = signs(make_run(tmp_path, 20, **GAP))  # 15 and 5
    assert "(general). Too few steps of domain to tell (5)." in found["Answer"].text


MOVED = "on held-out prompts it has moved away from its teacher, by"


def held_out(**branches):
    """Verdicts of branches with a KL of each of twelve prompts before and after."""
    return verdicts_of({
        branch: [Measured(step, sum(values) / len(values), 0.1, len(values), tuple(values))
                 for step, values in zip((0, 8), ends, strict=True)]
        for branch, ends in branches.items()
    })  # fmt: skip


@pytest.mark.parametrize(
    ("branches", "said"),
    [
        # The domain began as its own teacher: differences 0.2 and 0.3, mean 0.25, sd 0.0522, t of 11 2.201: half 0.033.
        ({"general": ([1.0] * 12, [0.2, 0.3] * 6), "domain": ([0.0] * 12, [0.2, 0.3] * 6)},
         f"**domain**: {MOVED} 0.250 nats per token (+0.217 to +0.283)."),
        ({"general": ([0.9, 1.1] * 6, [1.0, 1.3] * 6)},
         f"**general**: {MOVED} 0.150 nats per token (+0.117 to +0.183)."),
        ({"general": ([0.9, 1.1] * 6, [0.2, 0.3] * 6), "domain": ([0.0] * 12, [0.01, 0.02] * 6)},
         "None that held-out prompts show: general has recovered, domain is kept."),
        ({"general": ([0.9, 1.1] * 6, [1.1, 0.9] * 6), "domain": ([0.0] * 12, [0.0, 0.3] * 6)},
         "None that held-out prompts show: general has not recovered. Not settled by held-out prompts: domain."),
        ({"general": ([1.0], [2.0])}, "Not settled by held-out prompts: general."),
        ({}, ""),
    ],
)  # fmt: skip
def test_branch_that_hurts_is_the_one_that_has_moved_away_on_held_out_prompts(branches, said):
    assert hurting(held_out(**branches)) == said


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


def test_counteraction_in_few_measured_steps_is_unclear(tmp_path):
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


def test_signs_of_weak_samples_lie_above_the_random_control(tmp_path):
    metrics = {"coherence/{branch}/gcg": 20.0, "coherence/{branch}/gcg_control": by_branch(15.0, 20.0),
               "coherence/{branch}/gcg_excess": by_branch(5.0, 0.0)}  # fmt: skip
    found = signs(make_run(tmp_path, 40, **GAP, **metrics))["Weak samples"]
    assert found.state == "seen"
    assert "kept samples agree more than chance gives" in found.text
    assert "**general** GCG +20.0%, random control +15.0%, difference +5.0 points (30 measured steps)" in found.text
    metrics["coherence/{branch}/gcg_excess"] = lambda step, _: 1.0 if step % 8 < 4 else -1.0
    found = signs(make_run(tmp_path, 40, **GAP, **metrics))["Weak samples"]
    assert (found.state, "agree no more than chance gives" in found.text) == ("not seen", True)


def test_selection_by_length_is_compared_with_chance(tmp_path):
    metrics = {**ALWAYS, **MEASURED, "score/{branch}/length_spearman": by_branch(-0.4, 0.1)}
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


def test_selection_of_every_sample_follows_nothing(tmp_path):
    metrics = {**ALWAYS, "score/{branch}/length_spearman": 0.9, "selection/{branch}/kept_fraction": 1.0}
    found = signs(make_run(tmp_path / "off", 40, **metrics))
    assert found["Weak samples"].state == "not measured" and "every sample is kept" in found["Weak samples"].text
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


def test_signs_that_are_not_measured_say_what_turns_them_on(tmp_path):
    found = signs(make_run(tmp_path, 40, **ALWAYS))
    for name, words in (
        ("Counteraction", DIAGNOSTICS),
        ("Weak samples", DIAGNOSTICS),
        ("Selection follows outliers", "no step says which tokens carry the score"),
        ("Steps mostly momentum", "no Adam moments that can be read"),
    ):
        assert found[name].state == "not measured"
        assert words in found[name].text
