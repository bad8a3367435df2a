"""What held-out gaps say, against numbers worked out by hand and properties of differences (camopd/verdict.py)."""

import dataclasses
import math
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd.verdict import FEWEST, Measured, change_of, rows_of, short, signed, t_quantile, verdicts_of


def measured(step, values, of="p"):
    """An evaluation from the values of its prompts."""
    known = [value for value in values if value is not None]
    se = stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return Measured(step, fmean(known), se, len(known), tuple(values), of)


def plain(step, kl, se, prompts=40):
    return Measured(step, kl, se, prompts)


def one(*found, branch="general", last_step=None):
    (verdict,) = verdicts_of({branch: found}, last_step)
    return verdict


# Tables of Student's t.
@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (7, 2.365), (9, 2.262), (29, 2.045), (99, 1.984)],
)
def test_t_quantile_is_that_of_the_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=0.001 if freedom >= 7 else 0.006)
    with pytest.raises(ValueError, match="got 0"):
        t_quantile(0)


def test_change_of_pairs_is_that_of_their_differences():
    # Differences -0.1, -0.3, -0.2, -0.2: mean -0.2, variance (0.01 + 0.01) / 3, over 4. Means 0.5 -> 0.3, ratio 0.6.
    # Residuals a - 0.6 b: 0.3 - 0.24, 0.1 - 0.24, 0.4 - 0.36, 0.4 - 0.36 = 0.06, -0.14, 0.04, 0.04: mean 0, sum of squares
    # 0.0036 + 0.0196 + 0.0016 + 0.0016 = 0.0264
    change = change_of(measured(0, [0.4, 0.4, 0.6, 0.6]), measured(9, [0.3, 0.1, 0.4, 0.4]))
    assert (change.prompts, change.paired) == (4, True)
    assert change.value == pytest.approx(-0.2)
    assert change.se == pytest.approx(math.sqrt(0.02 / 3 / 4))
    assert change.share == pytest.approx(0.4)
    assert change.share_se == pytest.approx(math.sqrt(0.0264 / 3 / 4) / 0.5)
    assert change.half == pytest.approx(3.182 * change.se)
    assert change.smallest == pytest.approx((3.182 + 0.8416) * change.se, rel=1e-4)


def test_change_without_the_values_of_prompts_adds_the_errors():
    # 0.5 -> 0.3, errors 0.03 and 0.04: 0.05 together; the share's is sqrt(0.04^2 + (0.6 * 0.03)^2) / 0.5
    for after in (plain(9, 0.3, 0.04), Measured(9, 0.3, 0.04, 40, (0.3,) * 40, "other prompts")):
        change = change_of(plain(0, 0.5, 0.03), after)
        assert (change.paired, change.prompts) == (False, 40)
        assert (change.value, change.se) == (pytest.approx(-0.2), pytest.approx(0.05))
        assert change.share_se == pytest.approx(math.hypot(0.04, 0.018) / 0.5)


def test_change_leaves_out_prompts_with_an_empty_completion():
    both = change_of(measured(0, [0.4, 9.0, 0.6, None]), measured(9, [0.3, None, 0.4, 7.0]))
    assert both == change_of(measured(0, [0.4, 0.6]), measured(9, [0.3, 0.4]))


VALUES = st.lists(st.floats(0.015625, 4, width=32), min_size=FEWEST, max_size=30)


@given(st.data(), VALUES)
def test_change_back_is_the_change_with_its_sign_turned(data, start):
    end = data.draw(st.lists(st.floats(0, 4, width=32), min_size=len(start), max_size=len(start)))
    there, back = change_of(measured(0, start), measured(9, end)), change_of(measured(0, end), measured(9, start))
    assert there.value == pytest.approx(-back.value, abs=1e-12)
    assert there.se == pytest.approx(back.se, abs=1e-12)


@given(st.data(), VALUES, st.sampled_from([0.25, 8.0]))
def test_share_does_not_depend_on_the_unit_and_the_change_does(data, start, factor):
    end = data.draw(st.lists(st.floats(0, 4, width=32), min_size=len(start), max_size=len(start)))
    one_unit = change_of(measured(0, start), measured(9, end))
    other = change_of(measured(0, [factor * each for each in start]), measured(9, [factor * each for each in end]))
    assert other.value == pytest.approx(factor * one_unit.value, abs=1e-12)
    assert other.se == pytest.approx(factor * one_unit.se, abs=1e-12)
    assert other.share == pytest.approx(one_unit.share)
    assert other.share_se == pytest.approx(one_unit.share_se, abs=1e-9)


@given(VALUES, st.floats(0.1, 0.9))
def test_gap_that_shrinks_alike_for_every_prompt_has_no_error_of_its_share(start, left):
    verdict = one(measured(0, start), measured(9, [left * each for each in start]))
    assert verdict.change.share == pytest.approx(1 - left)
    assert verdict.change.share_se == pytest.approx(0, abs=1e-9)


@given(st.data(), VALUES)
def test_every_verdict_has_words_numbers_and_one_of_the_states(data, start):
    """Also of an unchanged gap, and of one without a spread."""
    end = data.draw(st.lists(st.floats(0, 4, width=32), min_size=len(start), max_size=len(start)))
    for after in (end, start, [start[0]] * len(start)):
        verdict = one(measured(0, start), measured(9, after))
        assert verdict.state in {"recovered", "in part", "not recovered", "not shown", "kept", "moved", "not settled"}
        assert verdict.text.startswith("general") and "nan" not in verdict.text + str(rows_of([verdict]))
        low, high = (verdict.change.value + sign * verdict.change.half for sign in (-1, 1))
        if verdict.state in ("recovered", "in part"):
            assert high < 0
        if verdict.state == "not shown":
            assert low <= 0 <= high


def test_verdict_of_the_run_that_its_training_gaps_praise():
    """0.123 ± 0.050 -> 0.131 ± 0.054, while training gaps fell from 0.501 to 0.354."""
    verdict = one(plain(0, 0.123, 0.050, 24), plain(40, 0.131, 0.054, 24))
    assert verdict.state == "not recovered"
    # sqrt(0.05^2 + 0.054^2) = 0.0736, times 2.069 (23 degrees of freedom) = 0.152; times 2.069 + 0.842 = 0.214 = 174 %
    assert verdict.words == "general has NOT recovered: 0.123 → 0.131, change +0.008 (-0.144 to +0.160)"
    # 24 * (0.21418 / 0.0615)^2 = 291.1, rounded up
    assert verdict.limits.startswith(
        "24 prompts find a change of 0.214 (174% of the gap) four times in five; to find half of the gap takes about 292"
    )
    assert "not paired" in verdict.limits


@pytest.mark.parametrize(
    ("before", "after", "state", "words"),
    [
        ((0.5, 0.01), (0.1, 0.01), "recovered", "HAS RECOVERED 80% of its gap"),
        ((0.5, 0.01), (0.4, 0.01), "in part", "has recovered IN PART, 20% of its gap"),
        ((0.5, 0.01), (0.5, 0.01), "not recovered", "has NOT recovered: 0.500 → 0.500, change +0.000"),
        ((0.5, 0.01), (0.6, 0.01), "not recovered", "has NOT recovered, it has moved further away"),
        ((0.5, 0.01), (0.49, 0.01), "not recovered", "has NOT recovered: "),  # half is ruled out
        ((0.5, 0.15), (0.3, 0.15), "not shown", "is not shown to have recovered: 0.500 → 0.300"),
        ((0.05, 0.04), (0.01, 0.01), "not settled", "nothing to recover that 40 prompts can tell from no gap"),
        ((0.05, 0.04), (0.6, 0.01), "not recovered", "has NOT recovered, it has moved further away: 0.050 → 0.600"),
        ((0.0, 0.0), (0.004, 0.001), "kept", "is kept: 0.000 → 0.004, change +0.004 (+0.002 to +0.006)"),
        ((0.0, 0.0), (0.2, 0.01), "moved", "has MOVED AWAY from its teacher: 0.000 → 0.200"),
        ((0.0, 0.0), (0.02, 0.01), "not settled", "whether it is kept is not settled"),
    ],
)
def test_verdict_in_words(before, after, state, words):
    verdict = one(plain(0, *before), plain(9, *after))
    assert (verdict.state, words in verdict.words) == (state, True), verdict.words


def test_verdict_on_a_kept_branch_is_held_against_the_largest_gap_of_the_run():
    found = {"general": [plain(0, 0.5, 0.01), plain(9, 0.3, 0.01)], "domain": [plain(0, 0, 0), plain(9, 0.03, 0.005)]}
    assert [verdict.state for verdict in verdicts_of(found)] == ["in part", "kept"]  # 0.04 of 0.05 that are allowed
    found["domain"][1] = plain(9, 0.25, 0.01)
    domain = verdicts_of(found)[1]
    assert domain.words.startswith(
        "domain has MOVED AWAY from its teacher by 50% of the largest gap before: 0.000 → 0.250"
    )


def test_small_gap_is_judged_by_how_far_it_has_moved_and_not_by_what_is_left_of_it():
    """0.006 of 1.034 is 0.6 %: a domain that is an eighth further from its teacher has lost nothing."""
    general, near = [plain(0, 1.034, 0.05), plain(9, 0.206, 0.02)], plain(0, 0.048, 0.001)
    found = {"general": general, "domain": [near, plain(9, 0.054, 0.001)]}
    domain = verdicts_of(found)[1]
    assert (domain.state, domain.small) == ("kept", True)
    assert domain.words == (
        "domain is kept, a change of +0.6% of the largest gap before: 0.048 → 0.054, change +0.006 (+0.003 to +0.009)"
    )
    assert "of the gap" not in domain.limits and rows_of([domain])[1][4] == ""  # no share of it is shown
    for after, state, words in (
        (plain(9, 0.01, 0.001), "kept", "domain is kept, a change of -4% of the largest gap before"),
        (plain(9, 0.3, 0.01), "moved", "domain has MOVED AWAY from its teacher by 24% of the largest gap before"),
        (plain(9, 0.15, 0.01), "not settled", "domain: whether it is kept is not settled"),
    ):
        found["domain"][1] = after
        domain = verdicts_of(found)[1]
        assert (domain.state, domain.words[: len(words)]) == (state, words)
        assert "half of the gap" not in domain.limits
    found["domain"] = [plain(0, 0.104, 0.001), plain(9, 0.12, 0.001)]  # a tenth of the largest and more
    assert verdicts_of(found)[1].words.startswith("domain has NOT recovered, it has moved further away")
    assert one(near, plain(9, 0.054, 0.001)).state == "not recovered"  # where it is the largest itself


def test_verdict_takes_the_last_evaluation_of_the_same_prompts():
    found = [measured(0, [0.5] * 4 + [0.6] * 4), measured(5, [0.1] * 8), measured(5, [9.0] * 3, of="other")]
    assert one(*found).after is found[1]
    assert "(measured at step 5 of 20)" in one(*found, last_step=20).words
    assert "measured at" not in one(*found, last_step=5).words


def test_verdict_says_that_other_prompts_were_measured_after():
    verdict = one(measured(0, [0.5] * 8 + [0.6] * 8, of="p"), measured(9, [0.1] * 8, of="q"))
    assert (verdict.state, verdict.after) == ("not known", None)
    assert "that at step 9 was measured on other prompts" in verdict.words and "none was measured" not in verdict.words


def test_verdict_says_what_was_not_measured():
    assert one().words == "general: not measured on held-out prompts"
    assert "none was measured after" in one(plain(0, 0.5, 0.01)).words
    assert "`eval_on_start: true` does that" in one(plain(4, 0.5, 0.01), plain(8, 0.4, 0.01)).words
    few = one(measured(0, [0.5] * 7), measured(9, [0.1] * 7))
    assert (few.state, few.words) == ("not settled", "general: 7 held-out prompts are too few to tell (0.500 → 0.100)")
    assert verdicts_of({}) == []


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ((41.25, 1.0), "; its answers are almost EMPTY, 1.0 tokens on average, 41.2 before: a gap of almost no text"),
        ((2.0, 2.0), "; its answers are almost EMPTY, 2.0 tokens on average, 2.0 before: a gap of almost no text"),
        ((40.0, 9.5), "; its answers have become SHORT, 9.5 tokens on average, 40.0 before"),
        ((math.nan, 1.0), "; its answers are almost EMPTY, 1.0 tokens on average: a gap of almost no text"),
        ((40.0, 10.0), ""),
        ((1.0, 40.0), ""),
        ((40.0, math.nan), ""),
    ],
)
def test_verdict_names_answers_with_almost_no_tokens(lengths, said):
    found = [plain(0, 0.5, 0.01), plain(9, 0.1, 0.01)]
    with_lengths = [dataclasses.replace(each, length=length) for each, length in zip(found, lengths, strict=True)]
    (verdict,) = verdicts_of({"general": with_lengths})
    (without,) = verdicts_of({"general": found})
    assert verdict.words == without.words + said and verdict.state == "recovered"


def test_verdict_names_empty_answers():
    start = [0.5, 0.6] * 10
    half = one(measured(0, start), measured(9, [0.1] * 10 + [None] * 10))
    assert half.words.endswith("; 10 of 20 answers after are EMPTY and have no gap") and half.change.prompts == 10
    assert "EMPTY" not in one(measured(0, start), measured(9, [0.1] * 11 + [None] * 9)).words
    assert (
        "; 10 of 20 answers before are EMPTY" in one(measured(0, [None] * 10 + start[:10]), measured(9, start)).words
    )
    none = one(measured(0, start), Measured(9, math.nan, math.nan, 0, (None,) * 20, "p"))
    assert none.text == (
        "general: no held-out prompt has an answer before and after; 20 of 20 answers after are EMPTY and have no gap."
    )
    assert none.state == "not settled" and rows_of([none])[1][2] == "-"


def test_rows_have_the_numbers_of_each_branch():
    found = {"general": [plain(0, 0.5, 0.03), plain(9, 0.3, 0.04)], "domain": [plain(0, 0, 0)]}
    head, general, domain = rows_of(verdicts_of(found))
    assert len(head) == len(general) == len(domain)
    assert [("±" in cell, "95 %" in name) for name, cell in zip(head, general, strict=True)] == [
        (name.split()[0] in ("before", "after", "change", "recovered"),) * 2 for name in head
    ]
    assert general[:4] == ["general", "0.500 ± 0.061", "0.300 ± 0.081", "-0.200 ± 0.101"]
    assert domain == ["domain", "0.000 ± 0.000", "not measured", "", "", "", ""]


@given(st.floats(-1e3, 1e3))
def test_short_numbers_keep_their_size_and_sign(value):
    assert float(short(value)) == pytest.approx(value, abs=0.0005, rel=0.06 if abs(value) < 0.0005 else None) or (
        abs(value) < 0.0005 and float(short(value)) == pytest.approx(value, rel=0.5)
    )
    assert signed(value)[0] in "+-"


def test_two_evaluations_before_the_first_step_are_no_change():
    verdict = one(plain(0, 0.5, 0.03), plain(0, 0.5, 0.03), last_step=40)
    assert (verdict.state, verdict.after) == ("not known", None)
