"""What the report says of its signs is what the testbed's file says (camopd/report/evidence.py)."""

import json
from pathlib import Path

import pytest
from runs import GAP, MEASURED, make_run

from camopd.report import evidence
from camopd.report.read import read_run
from camopd.report.signs import signs_of


FILE = Path(__file__).parent.parent / "benchmarks" / "results" / "testbed" / "exploratory" / "signs.json"


def test_evidence_is_that_of_the_testbeds_file():
    whole = json.loads(FILE.read_text(encoding="utf-8"))
    assert (whole["runs"], whole["seeds"]) == (evidence.RUNS, evidence.SEEDS)
    found = whole["numbers"]
    assert set(evidence.EVIDENCE) == set(found)
    for number, each in evidence.EVIDENCE.items():
        there = found[number]
        assert each.sign == there["sign"], number
        assert each.says == tuple(of for of in evidence.WORDS if of in there["says"]), number
        for outcome in evidence.WORDS:
            assert getattr(each, outcome) == pytest.approx(there[outcome]["all"]["value"], abs=0.005), number


def test_evidence_is_about_signs_of_the_report(tmp_path):
    names = {sign.name for sign in signs_of(read_run(make_run(tmp_path, 20, **GAP, **MEASURED))[0])}
    assert {each.sign for each in evidence.EVIDENCE.values() if each.sign} <= names


def test_evidence_in_words(monkeypatch):
    monkeypatch.setattr(evidence, "EVIDENCE", {
        "one": evidence.Evidence("Counteraction", -0.5, 0.25, -0.25, ("recovery", "kept")),
        "two": evidence.Evidence("Counteraction", 0.1, 0.1, 0.1),
        "three": evidence.Evidence("Imbalance", 0.1, 0.0, 0.0),
        "four": evidence.Evidence("", 0.1, 0.75, 0.1, ("preservation",)),
    })  # fmt: skip
    assert evidence.worth("Counteraction") == (
        "one: -0.50 with recovery; one: -0.25 with recovery while the domain is kept"
    )
    assert evidence.worth("Imbalance") == "nothing" and evidence.worth("Time and padding") == "not tried"
    text = evidence.in_short({"Counteraction", "Imbalance", "Time and padding"})
    assert "There the numbers of counteraction said something of it." in text
    assert "Imbalance said nothing that stands out" in text
    assert "four (+0.75 with what was kept of the domain)" in text
    text = evidence.in_short({"Imbalance"})
    assert "Imbalance said nothing that stands out" in text and "ounteraction" not in text and "So did" not in text
    assert evidence.in_short({"Time and padding"}) == evidence.in_short(()) == ""
