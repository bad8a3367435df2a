import sys
from pathlib import Path

import pytest
import transformers
from packaging.version import Version


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import architectures  # noqa: E402


# Each with the reason that its refusal gives.
REFUSED = {
    "CpmAntForCausalLM": "attends to both sides",
    "DoryForCausalLM": "does something to its logits",  # a learned factor for each token
    "MusicgenForCausalLM": "cannot be computed",  # four heads for the codes of sound
    "MusicgenMelodyForCausalLM": "cannot be computed",
    "ProphetNetForCausalLM": "does not hand the hidden states of all tokens",  # it predicts several tokens at once
    "XLMWithLMHeadModel": "attends to both sides",
    "XLNetLMHeadModel": "attends to both sides",
}


# transformers before 5.24 has not all that the page names, and before 5.23 cannot build the tiny configs of two.
VERSION = Version(transformers.__version__)
OLD = Version("5.24") > VERSION
NOT_BUILT = {"CohereCompassForCausalLM", "DbrxForCausalLM"} if Version("5.23") > VERSION else set()


@pytest.fixture(scope="module")
def verdicts():
    return [verdict for verdict in architectures.sweep() if verdict.architecture not in NOT_BUILT]


def test_causal_architectures_are_each_right_or_refused(verdicts):
    """All of the installed transformers; one that a new version brings is tried, too."""
    odd = {name: (word, reason) for name, word, _, reason in verdicts if word not in ("right", "refused", "not tried")}
    assert not odd, "fix the log-probs, or say in benchmarks/architectures.py how a tiny one is built"
    refused = {name: reason for name, word, _, reason in verdicts if word == "refused"}
    assert set(refused) == set(REFUSED) - ({"DoryForCausalLM"} if OLD else set())
    for name, reason in refused.items():
        assert REFUSED[name] in reason
    assert len(verdicts) >= (171 if OLD else 185)


def test_documentation_of_architectures_says_what_the_sweep_finds(verdicts):
    rows = {}
    for line in (ROOT / "docs" / "architectures.md").read_text().splitlines():
        name, word, *_ = (cell.strip() for cell in [*line.strip("|").split("|"), ""])
        if word in ("right", "refused", "not tried"):
            rows[name] = word
    found = {verdict.architecture: verdict.word for verdict in verdicts}
    assert {name: word for name, word in rows.items() if name in found or not OLD} == found


def test_model_made_from_bert_is_refused_where_it_attends_to_both_sides():
    verdict = architectures.judge(architectures.tiny_model("BertLMHeadModel", {"is_decoder": False}))
    assert verdict.word == "refused"
    assert "is_decoder: true" in verdict.reason
