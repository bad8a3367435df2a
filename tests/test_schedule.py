"""The schedule of Eq. 5: what is written, what is run, and what the error says. And which imports stay light."""

import os
import re
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd.schedule import Schedule, by_step


PAPER = {  # text -> period, and how often 120 steps are general, domain, mixed
    "general:3,domain:1": (4, {"general": 90, "domain": 30}),  # CaMOPD, 3-1
    "general:1,domain:1": (2, {"general": 60, "domain": 60}),  # 1-1
    "general:5,domain:1": (6, {"general": 100, "domain": 20}),  # 5-1
    "general:1+domain:1": (1, {"general+domain": 120}),  # Vanilla MOPD, w/o dec (1:1)
    "general:3+domain:1": (1, {"general+domain": 120}),  # w/o dec (3:1)
}

SCHEDULES = [
    *PAPER,
    "general",
    "general:2,general:1+domain:1",
    "domain:1,general:3",
    "math+code+chat",
    "math:5+code:3+chat:2",
    "math:2,code:1,chat:1,math:1+code:2+chat:4",
    "math:0.7+code:0.3,chat:2",
    "a:1+b:6,a:6+b:1,c:3",
]


@pytest.mark.parametrize("text", PAPER)
def test_schedules_of_the_paper_over_120_steps(text):
    schedule = Schedule.parse(text)
    period, steps = PAPER[text]
    assert schedule.period == period
    assert schedule.branches == ("general", "domain")
    assert Counter("+".join(schedule.shares(step)) for step in range(120)) == steps


def test_schedule_of_three_to_one_takes_the_domain_at_every_fourth_step():
    schedule = Schedule.parse("general:3,domain:1")
    assert [step for step in range(13) if schedule.shares(step) == {"domain": 1.0}] == [3, 7, 11]
    assert all(schedule.shares(step) == {"general": 1.0} for step in range(13) if step % 4 != 3)


def test_mixed_schedules_of_the_paper_have_these_shares_in_every_step():
    for step in (0, 1, 119):
        assert Schedule.parse("general:1+domain:1").shares(step) == {"general": 0.5, "domain": 0.5}
        assert Schedule.parse("general:3+domain:1").shares(step) == {"general": 0.75, "domain": 0.25}


def test_pure_and_mixed_steps_in_one_schedule():
    schedule = Schedule.parse("general:2,general:1+domain:1")
    assert schedule.period == 3
    assert schedule.branches == ("general", "domain")
    shares = [{"general": 1.0}, {"general": 1.0}, {"general": 0.5, "domain": 0.5}]
    assert [schedule.shares(step) for step in range(9)] == 3 * shares


def test_schedule_of_three_branches_keeps_their_order_of_appearance():
    schedule = Schedule.parse("math:2,code,chat:1+math:3")
    assert schedule.branches == ("math", "code", "chat")
    assert schedule.period == 4
    assert [schedule.shares(step) for step in range(4)] == [
        {"math": 1.0}, {"math": 1.0}, {"code": 1.0}, {"chat": 0.25, "math": 0.75},
    ]  # fmt: skip


def test_count_of_one_may_be_left_out():
    assert Schedule.parse("general,domain").steps == Schedule.parse("general:1,domain:1").steps
    assert Schedule.parse("general+domain").steps == Schedule.parse("general:1+domain:1").steps


def test_count_of_a_mixed_branch_is_a_share_and_may_be_any_positive_number():
    assert Schedule.parse("general:30+domain:10").steps == Schedule.parse("general:3+domain:1").steps
    assert Schedule.parse("general:0.75+domain:0.25").steps == Schedule.parse("general:3+domain:1").steps


def test_spaces_do_not_matter():
    assert Schedule.parse("  general : 3 ,\tdomain: 1 ").steps == Schedule.parse("general:3,domain:1").steps
    assert Schedule.parse(" general + domain ").steps == Schedule.parse("general+domain").steps


def test_branch_names_may_hold_letters_digits_underscore_and_dash():
    assert Schedule.parse("role-play_2,_x,A").branches == ("role-play_2", "_x", "A")


@pytest.mark.parametrize("text", SCHEDULES)
def test_str_gives_the_text_back(text):
    assert str(Schedule.parse(text)) == text
    assert Schedule.parse(str(Schedule.parse(text))) == Schedule.parse(text)


@pytest.mark.parametrize("text", SCHEDULES)
def test_shares_add_up_to_one_and_repeat_with_the_period(text):
    schedule = Schedule.parse(text)
    for step in range(2 * schedule.period):
        assert sum(schedule.shares(step).values()) == pytest.approx(1)
        assert schedule.shares(step) == schedule.shares(step + 7 * schedule.period)


def test_changing_the_shares_that_were_given_out_does_not_change_the_schedule():
    schedule = Schedule.parse("general:3,domain:1")
    schedule.shares(0)["domain"] = 9.0
    assert schedule.shares(0) == {"general": 1.0}
    assert schedule.shares(1) == {"general": 1.0}


@pytest.mark.parametrize(
    "text, rows_per_step, expected",
    [
        ("general:3,domain:1", 512, {"general": 512}),
        ("general:1+domain:1", 512, {"general": 256, "domain": 256}),
        ("general:3+domain:1", 512, {"general": 384, "domain": 128}),
        ("general+domain", 7, {"general": 4, "domain": 3}),  # 3.5 and 3.5: the tie goes to the branch named first
        ("general:2+domain:1", 512, {"general": 341, "domain": 171}),  # 341.33 and 170.67
        ("general:7+domain:3", 512, {"general": 358, "domain": 154}),  # 358.4 and 153.6
        ("a+b+c", 512, {"a": 171, "b": 171, "c": 170}),  # 170.67 each
        ("a+b+c", 2, {"a": 1, "b": 1, "c": 0}),
        ("a:5+b:3+c:2", 7, {"a": 4, "b": 2, "c": 1}),  # 3.5, 2.1, 1.4
        ("a:0.1+b:0.2+c:0.7", 10, {"a": 1, "b": 2, "c": 7}),
        ("a:1+b:99", 10, {"a": 0, "b": 10}),  # 0.1 and 9.9
    ],
)
def test_rows_by_largest_remainder(text, rows_per_step, expected):
    assert Schedule.parse(text).rows(0, rows_per_step) == expected


@given(st.lists(st.floats(1e-6, 1e300), min_size=2, max_size=6), st.integers(1, 2048))
def test_rows_add_up_whatever_the_shares(shares, rows_per_step):
    schedule = Schedule.parse("+".join(f"b{place}:{share:.6f}" for place, share in enumerate(shares)))
    rows = schedule.rows(0, rows_per_step)
    assert sum(rows.values()) == rows_per_step
    assert min(rows.values()) >= 0


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 1, 1), (5, 3, 2), (1, 2, 4), (7, 11, 13), (1, 30)], ids=str)
def test_rows_add_up_and_stay_within_one_of_the_exact_share(weights):
    names = "abc"[: len(weights)]
    schedule = Schedule.parse("+".join(f"{name}:{weight}" for name, weight in zip(names, weights, strict=True)))
    for rows_per_step in range(1, 130):
        rows = schedule.rows(0, rows_per_step)
        exact = {
            name: Fraction(weight * rows_per_step, sum(weights)) for name, weight in zip(names, weights, strict=True)
        }
        assert sum(rows.values()) == rows_per_step
        assert all(0 <= rows[name] - exact[name] // 1 <= 1 for name in names)
        assert all(rows[name] == exact[name] for name in names if exact[name].denominator == 1)
        raised = [exact[name] % 1 for name in names if rows[name] > exact[name]]
        others = [exact[name] % 1 for name in names if rows[name] <= exact[name]]
        assert not raised or not others or min(raised) >= max(others)


@pytest.mark.parametrize("rows_per_step", [1, 2, 7, 10, 512])
@pytest.mark.parametrize("text", SCHEDULES)
def test_rows_before_is_the_sum_of_all_earlier_steps(text, rows_per_step):
    schedule = Schedule.parse(text)
    drawn = dict.fromkeys(schedule.branches, 0)
    for step in range(4 * schedule.period + 3):
        assert schedule.rows_before(step, rows_per_step) == drawn
        for name, count in schedule.rows(step, rows_per_step).items():
            drawn[name] += count


def test_rows_before_of_the_whole_run_of_the_paper():
    assert Schedule.parse("general:3,domain:1").rows_before(120, 512) == {"general": 90 * 512, "domain": 30 * 512}
    assert Schedule.parse("general:3+domain:1").rows_before(120, 512) == {"general": 90 * 512, "domain": 30 * 512}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)), min_size=1, max_size=8), st.integers(1, 9))
def test_rows_before_is_the_sum_whatever_order_branches_come_in(parts, rows_per_step):
    schedule = Schedule.parse(",".join(f"{name}:{count}" for name, count in parts) + ",a+b:2")
    counts = [schedule.rows(step, rows_per_step) for step in range(2 * schedule.period + 2)]
    for step in range(len(counts)):
        wanted = {name: sum(each.get(name, 0) for each in counts[:step]) for name in schedule.branches}
        assert schedule.rows_before(step, rows_per_step) == wanted


def test_rows_before_of_a_period_of_a_million_steps_are_found_quickly():
    """The first call counts a period once; the others, one in each step, take no longer than in a short one."""
    schedule = Schedule.parse("a:499999,b,a:499999,b")
    assert schedule.rows_before(10**6 + 600_000, 8) == {"a": 8 * (10**6 + 600_000 - 3), "b": 8 * 3}
    start = time.process_time()
    for step in range(1000):
        schedule.rows_before(step * 999, 8)
    assert time.process_time() - start < 1  # one that counts a period takes seconds by itself


# --- errors ---


@pytest.mark.parametrize("text", ["", "  ", None, 3, ["general:3"]])
def test_schedule_that_is_not_a_text_is_refused(text):
    with pytest.raises(ValueError, match=r"schedule must be a text such as 'general:3,domain:1', got "):
        Schedule.parse(text)


@pytest.mark.parametrize(
    "text, column, offending, reason",
    [
        ("general:3,,domain:1", 10, ",", r"a branch is missing here\."),
        ("general:3,domain:1,", 19, "", r"a branch is missing here\."),
        ("+domain", 0, "+", r"a branch is missing here\."),
        ("general:3,2nd:1", 10, "2nd:1", r"'2nd' is not a branch name \(letters, digits, '_' and '-'\)\."),
        (":3,domain", 0, ":3", r"'' is not a branch name"),
        ("general,do main:2", 8, "do main:2", r"'do main' is not a branch name"),
        ("general:3;domain:1", 0, "general:3;domain:1", r"'3;domain:1' is not a number\."),
        (
            "general+domain+general:2",
            15,
            "general:2",
            r"branch 'general' is already in this step; add its shares up\.",
        ),
        ("general:three,domain", 0, "general:three", r"'three' is not a number\."),
        ("general:3,domain:", 10, "domain:", r"'' is not a number\."),
        ("general:3,domain:1:2", 10, "domain:1:2", r"'1:2' is not a number\."),
        ("general:0,domain:1", 0, "general:0", r"0 must be above 0; leave the branch out instead\."),
        ("general:3+domain:-1", 10, "domain:-1", r"-1 must be above 0; leave the branch out instead\."),
        ("general:3,domain:nan", 10, "domain:nan", r"nan is not a finite number"),
        ("general:inf", 0, "general:inf", r"inf is not a finite number"),
        ("general:3,domain:0.5", 10, "domain:0.5", r"0\.5 is not a whole number of steps; use '\+' to mix by share\."),
        (" general : 3 ,   domain : x  ", 17, "domain : x", r"'x' is not a number\."),
        ("a:2,b:1+c:1, d:q ,e", 13, "d:q", r"'q' is not a number\."),
        ("a:2,b:1e308+c:1e308,a", 4, "b:1e308+c:1e308", r"its shares add up to no finite number\."),
    ],
)
def test_error_names_the_reason_and_the_caret_points_at_the_part(text, column, offending, reason):
    with pytest.raises(ValueError, match=rf"^schedule cannot be read: {reason}") as caught:
        Schedule.parse(text)
    _, shown, marker, advice = str(caught.value).split("\n")
    assert shown == "    " + text
    assert marker == " " * (4 + column) + "^" * max(1, len(offending))
    assert text[column : column + len(offending)] == offending
    assert advice == ("Write 'general:3,domain:1' for separate steps or 'general:3+domain:1' to mix inside each step.")


@pytest.mark.parametrize(
    "number",
    ["1_000", "1__0", "\u0661", "\uff13", "\u00b2", "1e1_0", "0x10", "1 000", "1,000.0e", "--1", "1..0", "\u00bd"],
)
def test_number_has_ascii_digits_and_no_underscores(number):
    for text in (f"a:{number}", f"a:1+b:{number}"):
        with pytest.raises(ValueError, match="schedule cannot be read: "):
            Schedule.parse(text)


@pytest.mark.parametrize(("number", "value"), [("3", 3), ("3.", 3), ("3.0", 3), ("1e2", 100), ("2.5E1", 25)])
def test_number_may_have_a_dot_and_an_exponent(number, value):
    assert Schedule.parse(f"a:{number}").period == value
    assert Schedule.parse(f"a:{number}+b:{value}").shares(0) == {"a": 0.5, "b": 0.5}


def peak_memory(call):
    """Most bytes that Python objects took while `call` ran."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a:1e8", r"1e\+08 steps make the period longer than 1000000, the most it may have"),
        ("a:1e308", r"1e\+308 steps make the period longer"),
        ("a:1000001", r"1e\+06 steps make the period longer"),
        ("b,a:1000000", r"1e\+06 steps make the period longer"),
        ("a:1e308+b:1e308", "its shares add up to no finite number"),
        ("a:1e309", "1e309 is not a finite number"),
        ("a:" + "9" * 60_000, "is not a finite number"),
        ("a," * 40_000, r"has 80000 characters, and 65536 are the most.*'general:300'"),
    ],
)
def test_period_of_more_than_a_million_steps_is_refused_and_takes_no_memory(text, reason):
    def parse():
        with pytest.raises(ValueError, match=reason) as raised:
            Schedule.parse(text)
        assert len(str(raised.value)) < 1000

    assert peak_memory(parse) < 4 << 20


def test_period_of_a_million_steps_is_taken():
    schedule = Schedule.parse("a:999999,b")
    assert schedule.period == 1_000_000 and schedule.shares(999_999) == {"b": 1.0}


@given(st.text("ab_:+,.eE0123456789-\u0661\uff13 \t", max_size=24))
def test_any_text_is_read_as_it_says_or_refused_in_words(text):
    """What is read comes out: every number as Python's own exact arithmetic has it."""
    try:
        schedule = Schedule.parse(text)
    except ValueError as error:
        assert str(error).startswith(("schedule cannot be read: ", "schedule must be a text"))
        return
    steps = []
    for group in text.split(","):
        parts = [part.partition(":") for part in group.split("+")]
        counts = {name.strip(): Fraction(number.strip()) if colon else Fraction(1) for name, colon, number in parts}
        assert len(counts) == len(parts) and all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name) for name in counts)
        total = sum(counts.values())
        steps += [counts] * (1 if len(parts) > 1 else int(total))
    assert schedule.period == len(steps)
    for step in {0, len(steps) // 2, len(steps) - 1}:
        total = sum(steps[step].values())
        for name, share in schedule.shares(step).items():
            assert share == pytest.approx(float(steps[step][name] / total), rel=1e-14)


@pytest.mark.parametrize("value", ["1_000", "\u0661\u0662", "1.0", "1e3", "9" * 5000, "0x1", "", None, True, [1], 1.0])
def test_length_by_step_is_a_whole_number_in_ascii(value):
    with pytest.raises(ValueError, match=r"^max_completion_length must be a whole number of at least 1, got "):
        by_step("max_completion_length", value)
    assert by_step("max_completion_length", {"0": "12", "40": 8}) == {0: 12, 40: 8}


# --- imports ---


def modules_after(code):
    """Top-level packages in a fresh process after `code`."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    output = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"],
        check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    return set(output.stdout.split())


def test_importing_the_package_is_light():
    modules = modules_after("import camopd")
    assert "camopd" in modules
    assert not modules & {"torch", "transformers", "trl", "datasets", "accelerate", "numpy"}


def test_importing_the_schedule_does_not_import_torch():
    modules = modules_after("import camopd.schedule")
    assert "camopd" in modules
    assert not modules & {"torch", "transformers", "trl", "datasets", "accelerate", "numpy"}


@pytest.mark.slow
def test_importing_the_objective_needs_torch_alone():
    modules = modules_after("import camopd.objective")
    assert "torch" in modules
    assert not modules & {"transformers", "trl", "datasets", "accelerate", "httpx"}


@given(
    st.sampled_from(SCHEDULES),
    st.dictionaries(st.sampled_from(["general", "domain", "math", "a", "z"]), st.none() | st.just("x")),
)
def test_mismatches_are_the_branches_that_only_one_side_has(text, mapping):
    schedule = Schedule.parse(text)
    found = dict(schedule.mismatches("teachers", mapping))
    assert found.keys() == {
        branch
        for branch in {*schedule.branches, *mapping}
        if branch not in schedule.branches or mapping.get(branch) is None
    }
    for branch, said in found.items():
        visited = branch in schedule.branches
        assert repr(branch) in said and repr(text) in said
        assert (f"Add teachers.{branch} or take" if visited else "Add it there or leave it out") in said
