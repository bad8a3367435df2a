"""`--help` names every setting of a run with its default, and is quick."""

import ast
import contextlib
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from trl import ModelConfig

from camopd import CaMOPDConfig, method_rules
from camopd.run import PromptArguments
from camopd.settings import (
    OLD_NAMES,
    PER_BRANCH,
    TABLE,
    UNITS,
    declared,
    default_of,
    facts_of,
    list_of_settings,
    write_table,
)


def test_list_has_every_setting_and_none_else_with_its_help():
    found = {name: (default, text) for _, name, default, text in declared()}
    wanted = {item.name: item for kind in (PromptArguments, ModelConfig, CaMOPDConfig) for item in fields(kind)}
    assert set(found) == {name for name, item in wanted.items() if item.init}
    for name, (default, text) in found.items():
        item = wanted[name]
        if "help" in item.metadata and text[:1] not in ("f", "(", "'"):
            assert text == " ".join(item.metadata["help"].split()), name
        if item.default is not MISSING:
            with contextlib.suppress(ValueError):  # a name of transformers
                assert ast.literal_eval(default) == item.default, name
    assert len(list(declared())) == len(found)


OF_BRANCHES = {
    "prompts",
    "eval_prompts",
    "teachers",
    "teacher_prompt",
}  # and of nothing else: they have no value for all


def test_table_of_the_docs_is_current(tmp_path):
    """If not: python -m camopd.settings docs/settings.md"""
    text = (Path(__file__).parents[1] / "docs" / "settings.md").read_text(encoding="utf-8")
    (tmp_path / "settings.md").write_text(text.replace("| **scale** |", "| **stale** |"), encoding="utf-8")
    write_table(str(tmp_path / "settings.md"))
    assert (tmp_path / "settings.md").read_text(encoding="utf-8") == text
    assert text.count(TABLE) == 2
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| **")]
    own = {name: default for group, name, default, _ in declared() if group in ("Prompts", "CaMOPD")}
    assert [row[0] for row in rows] == [f"| **{name}**" for name in own if name not in OLD_NAMES]


def test_numbers_have_a_unit_and_settings_of_branches_say_so():
    own = {name: (default, text) for group, name, default, text in declared() if group == "CaMOPD"}
    known = [name for names in UNITS.values() for name in names.split()]
    assert len(known) == len(set(known)) and set(known) <= set(own)
    numbers = {name for name, (default, _) in own.items() if type(ast.literal_eval(default)) in (int, float)}
    assert numbers - set(known) == {"num_train_epochs", "learning_rate"}
    assert {rule.names for rule in method_rules.PER_BRANCH} == set(PER_BRANCH) - OF_BRANCHES
    assert facts_of("scale", own["scale"][1]) == ("factor", "Eq. 9", "per branch")
    assert facts_of("score", own["score"][1]) == ("", "Eq. 6, 7", "per branch")
    assert facts_of("num_iterations", "") == ("updates", "", "")
    assert default_of("max_prompt_length") == 4096


def test_groups_stand_in_the_order_of_use():
    text = list_of_settings()
    words = ("Prompts:", "--model_name_or_path", "CaMOPD:", "--schedule", "--use_vllm", "--weight_decay")
    places = [text.index(word) for word in words]
    assert places == sorted(places)
    assert "--scale ({'general': 2.0, 'domain': 1.0})  [factor, Eq. 9, per branch]" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("command", ["train", "check", "serve"])
def test_help_lists_the_settings_and_imports_nothing_heavy(command):
    code = (
        "import sys; from camopd.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", code, command, "--help"]
    found = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    for name in ("prompts", "mass_target", "lora_r", "use_vllm", "weight_decay", "config"):
        assert f"--{name} " in found
    assert found.splitlines()[-1] == "[]"
