"""The testbed: its skills and statistics by other means, and the gate, which sees whether training still teaches."""

import itertools
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from testbed import arms, figures, models, run, skills, tables


# --- skills and models -------------------------------------------------------------------------------------------


def test_skills_have_the_answers_they_are_named_after():
    draw = random.Random(0)
    for _ in range(50):
        items = {skill: skills.general_item(skill, draw, (3, 6)) for skill in skills.GENERAL}
        words = {skill: item.prompt.split()[1].rstrip("=") for skill, item in items.items()}
        answers = {skill: item.answer for skill, item in items.items()}
        assert answers["copy"] == words["copy"]
        assert list(reversed(answers["rev"])) == list(words["rev"])
        assert sorted(answers["sort"]) == sorted(words["sort"]) and answers["sort"] <= "".join(sorted(words["sort"]))
        assert answers["shift"] == words["shift"].translate(str.maketrans("abcdefghij", "bcdefghija"))
        assert answers["last"] == 3 * words["last"][-1:]
        assert answers["max"] == 2 * sorted(words["max"])[-1]
        assert answers["dup"][::2] == answers["dup"][1::2] == words["dup"]
        assert answers["add"] == str(eval(words["add"]))
        assert max(map(len, answers.values())) < run.LONGEST


def test_near_domain_answers_the_same_words_otherwise():
    assert sorted(skills.CIPHER.values()) == list(skills.LETTERS)
    draw = random.Random(0)
    for _ in range(50):
        item = skills.domain_item(skills.NEAR, draw, (3, 6))
        name, word = item.prompt.rstrip("!").split()
        plain = skills.SKILLS[name](word)
        back = {secret: letter for letter, secret in skills.CIPHER.items()}
        assert "".join(back[letter] for letter in item.answer) == plain
        assert all(a != b for a, b in zip(item.answer, plain, strict=True))


def test_right_is_what_greedy_decoding_gives():
    """Of a model that knows some answers by heart and not others."""
    model = models.make_general(models.Size(layers=1, width=32, steps=1, batch=4), lambda text: None)
    items = skills.mixture(("last", "max", "copy"), skills.NEAR, (3, 6), seed=9, count=24)
    models.fit(model, items[:8] * 150, 8, 1e-2, lambda text: None)
    tokenizer = models.make_tokenizer()
    inputs = tokenizer([item.prompt for item in items], return_tensors="pt", padding=True, return_token_type_ids=False)
    drawn = model.generate(**inputs, max_new_tokens=run.LONGEST, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    decoded = [run._until_end(row) for row in drawn.tolist()]
    ended = [models.END in row for row in drawn.tolist()]
    expected = [text == item.answer and end for text, item, end in zip(decoded, items, ended, strict=True)]
    assert models.right(model, items) == expected
    assert 0 < sum(expected) < len(items)


def test_models_are_made_once(tmp_path):
    size = models.Size(layers=1, width=32, steps=2, batch=4)
    first = models.load_or_make(tmp_path / "general", lambda: models.make_general(size, lambda text: None))
    again = models.load_or_make(tmp_path / "general", lambda: pytest.fail("it is there"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


# --- outcomes and statistics -------------------------------------------------------------------------------------


def result(*points, arm="camopd", seed=1, rate=1.0, stage="comparison"):
    """A run's file: points are (covered, domain) on both halves, the first before training."""
    return {
        "arm": arm, "seed": seed, "learning_rate": rate, "stage": stage, "seconds": 1.0,
        "general": {half: {"covered": 1.0, "uncovered": 1.0, "domain": 0.0} for half in run.HALVES},
        "points": [
            {"step": place, "tokens": 100 * place,
             **{half: {"covered": covered, "uncovered": 0.5, "domain": domain} for half in run.HALVES}}
            for place, (covered, domain) in enumerate(points)
        ],
    }  # fmt: skip


def test_outcome_is_the_best_measured_step_that_keeps_the_domain():
    found = tables.outcome(result((0.2, 0.8), (0.6, 0.77), (0.9, 0.75), (0.5, 0.8)))
    assert (found.step, found.recovery, found.uncovered) == (1, pytest.approx(0.5), 0.0)  # 0.76 is 95 % of 0.8
    assert tables.outcome(result((0.2, 0.8), (0.9, 0.1))).step == 0
    assert tables.outcome(result((0.2, 0.8), (0.4, 0.8), (0.6, 0.8)), most_tokens=150).step == 1


def test_outcome_is_read_from_the_half_that_did_not_choose():
    one = result((0.2, 0.8), (0.6, 0.8), (0.5, 0.8))
    one["points"][1]["report"]["covered"] = 0.3
    assert tables.outcome(one).recovery == pytest.approx(0.125)


def test_rate_is_that_of_the_best_mean_over_the_tuning_seeds():
    grid = [(arm, rate, seed) for arm in arms.ARMS for rate in arms.rates(arm) for seed in (1, 2)]
    best = dict(zip(arms.ARMS, itertools.cycle(arms.RATES), strict=False)) | {"sgd": 0.1}
    runs = [
        result((0.0, 1.0), (0.9 if rate == best[arm] else 0.8, 1.0), arm=arm, seed=seed, rate=rate, stage="tuning")
        for arm, rate, seed in grid
    ]
    assert tables.chosen_rates(runs) == best


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=7))
def test_flips_are_counted_one_by_one(values):
    seen = abs(sum(values))
    signs = list(itertools.product((1, -1), repeat=len(values)))
    flips = [abs(sum(sign * value for sign, value in zip(row, values, strict=True))) for row in signs]
    assert tables.flip_p(values) == sum(flip >= seen - 1e-12 for flip in flips) / len(flips)


def test_holm_by_hand():
    assert tables.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert tables.holm([0.5, 0.9]) == [1.0, 1.0]


def test_tables_and_figures_of_what_is_there(tmp_path):
    """Seeds without all arms are left out; the rest is in every table."""
    (tmp_path / "runs").mkdir()
    runs = [
        result((0.0, 1.0), (0.5 + 0.01 * seed + 0.002 * place, 1.0), arm=arm, seed=seed, rate=rate, stage=stage)
        for place, arm in enumerate(arms.ARMS)
        for stage, seed, rate in (
            *(("tuning", 101, rate) for rate in arms.rates(arm)),
            *(("comparison", seed, arms.rates(arm)[0]) for seed in (1, 2, 3)),
        )
        if (arm, seed) != ("sgd", 3)
    ]  # fmt: skip
    for place, one in enumerate(runs):
        (tmp_path / "runs" / f"{place}.json").write_text(json.dumps(one), encoding="utf-8")
    tables.write(tmp_path)
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "2 seeds of the comparison" in text and "nan" not in text
    assert all(text.count(f"| {name}") >= 4 for name in arms.NAMES.values())
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"differences", "plane", "rates"}


def test_arms_are_all_named_and_of_one_kind():
    assert set(arms.NAMES) == set(arms.ARMS) == set(figures.KIND)
    assert not {arms.PILOT_SEED, *arms.TUNING_SEEDS} & set(arms.SEEDS)


# --- the gate ----------------------------------------------------------------------------------------------------

# Bands of the recovery of covered skills at the end of the runs. CaMOPD had 0.87 and 0.81 with seeds 1 and 2, vanilla
# 0.61 and without selection 0.87 with seed 1; 40 items of two skills have a standard error of 0.05.
GATE = {"camopd": (0.6, 1.01), "vanilla": (0.35, 0.9), "without_selection": (0.6, 1.01)}


@pytest.mark.slow
def test_gate_recovery_is_in_its_band():
    """Three runs of a trainer that computes everything right and learns."""
    size = models.Size(
        layers=2, width=64, steps=300, batch=64, specialise_steps=120, skills=("last", "max", "dup"), domain=("last",)
    )
    general = models.make_general(size, lambda text: None)
    specialised = models.specialise(general, size, 1, lambda text: None)
    bench = run.Bench.of(general, specialised, size.skills, size.domain, covered=("max", "dup"))
    for arm, (low, high) in GATE.items():
        found = run.run(bench, arm, 5e-4, seed=1, steps=32, every=32)
        end = tables.at(found, found["points"][-1])
        assert low <= end.recovery <= high, (arm, end)
        assert end.preservation >= 0.3, (arm, end)
