"""`--help` names every setting of a run with its default, and is quick."""

import ast
import contextlib
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
from trl import ModelConfig

from camopd import CaMOPDConfig
from camopd.run import PromptArguments
from camopd.settings import declared, list_of_settings


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


def test_groups_stand_in_the_order_of_use():
    text = list_of_settings()
    words = ("Prompts:", "--model_name_or_path", "CaMOPD:", "--schedule", "--use_vllm", "--weight_decay")
    places = [text.index(word) for word in words]
    assert places == sorted(places)
    assert "--scale ({'general': 2.0, 'domain': 1.0})" in text
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
