"""Mistakes in a run's settings that are said without torch (camopd/early.py)."""

import importlib
import os
import subprocess
import sys

import pytest
import yaml
from transformers.hf_argparser import string_to_bool
from transformers.trainer_utils import SchedulerType
from trl import ModelConfig

from camopd.early import BOOLS, DTYPES, ENUMERATIONS, check_early
from camopd.settings import keys_of, types, values_of
from camopd.token_rules import TOKEN_RULES


RIGHT = {
    "model_name_or_path": "org/student", "prompts": {"general": "g.jsonl", "domain": "d.jsonl"},
    "teachers": {"general": "org/teacher", "domain": "http://localhost:1"}, "dtype": "float32", "learning_rate": "4e-5",
    "lr_scheduler_type": "cosine", "schedule": "general:3,domain:1",
}  # fmt: skip
WRONG = [
    ({"learning_rte": 1}, r"'learning_rte' in .* is not a setting of a run\. Did you mean 'learning_rate'\?"),
    (
        {"prompts": {"generl": "g", "domain": "d"}},
        r"visits branch 'general', but prompts has only \['domain', 'generl'\]",
    ),
    (
        {"teachers": {"general": "./gone", "domain": "org/x"}},
        r"branch 'general' is named as '\./gone', but there is no such",
    ),
    (
        {"model_name_or_path": "./gone"},
        r"student '\./gone' cannot be loaded: model_name_or_path names no path on this",
    ),
    ({"model_name_or_path": None}, r"run\.yaml' names no student\. Set model_name_or_path"),
    (
        {"eval_prompts": {"generl": "g.jsonl"}},
        r"eval_prompts has 'generl', which schedule 'general:3,domain:1' never visits\. Add it there or leave it out",
    ),
    (
        {"eval_prompts": {"general": "g.jsonl"}, "prompts_per_step": 0},
        r"prompts_per_step must be a whole number of at l",
    ),
    ({"prompts": "g.jsonl"}, r"prompts must map each branch to its prompts, got 'g\.jsonl'"),
    ({"dtype": "flot32"}, r"dtype='flot32' is none of auto, .*\. Did you mean 'float32'\?"),
    ({"learning_rate": -4e-5}, r"learning_rate must be a number of at least 0, got -4e-05"),
    ({"learning_rate": "fast"}, r"learning_rate must be a number of at least 0, got 'fast'"),
    ({"lr_scheduler_type": "cosin"}, r"lr_scheduler_type='cosin' is none of linear, .*\. Did you mean 'cosine'\?"),
    ({"eval_strategy": "stps"}, r"eval_strategy='stps' is none of no, steps, epoch\. Did you mean 'steps'\?"),
    ({"save_strategy": "stepz"}, r"save_strategy='stepz' is none of no, steps, epoch, best\. Did you mean 'steps'\?"),
    ({"optim": "adamwx"}, r"optim='adamwx' is none of the names there are\. Did you mean 'adamw_torch'\?"),
    ({"token_rule": "foo"}, r"token_rule='foo' is none of none, relaxed_opd, selectkd, teacher_free\.$"),
    ({"bf16": "maybe"}, r"bf16 must be true or false, got 'maybe'"),
    ({"use_peft": "x"}, r"use_peft must be true or false, got 'x'"),
    ({"lora_r": "x"}, r"lora_r must be a whole number, got 'x'"),
    ({"seed": "1.5"}, r"seed must be a whole number, got '1\.5'"),
    ({"weight_decay": "small"}, r"weight_decay must be a number of at least 0, got 'small'"),
    ({"num_train_epochs": 2}, r"num_train_epochs=2 cannot be used with CaMOPD: .* set max_steps"),
]


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**RIGHT, **changes}))
        return str(path)

    return write


def test_early_check_lets_settings_of_a_run_pass(write):
    check_early(write(), [])
    check_early(
        write(), ["--learning_rate", "0", "--lr-scheduler-type", "constant", "--env", "{A: b}", "--no_exchange"]
    )
    check_early(write(bf16="Yes", tf32="0", seed="08", num_train_epochs="-1", optim="adamw_torch", output_dir="x"), [])
    check_early(write(eval_strategy=False, save_strategy="best", weight_decay="1e-3", max_completion_length="2"), [])


def test_env_of_a_run_that_computes_as_the_trainer_has_its_devices(write, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    check_early(write(env={"CUDA_VISIBLE_DEVICES": "0,1"}), [])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    check_early(write(), ["--env", "{CUDA_VISIBLE_DEVICES: 3}"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(("change", "says"), WRONG)
def test_early_check_names_value_reason_and_way_out(write, change, says):
    with pytest.raises(ValueError, match=says):
        check_early(write(**change), [])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompts": None}, r"prompts must map each branch to its prompts, got None"),
        ({"teachers": None}, r"teachers must map each branch to its teacher, got None"),
        (
            {"teachers": {"general": "a/b"}},
            r"visits branch 'domain', but teachers has only \['general'\]\. Add teachers\.",
        ),
    ],
)
def test_what_training_alone_needs_is_asked_of_training_alone(write, change, says):
    with pytest.raises(ValueError, match=says):
        check_early(write(**change), [], training=True)
    if change != {"teachers": None}:
        check_early(write(**change), [])
    assert check_early(write(), ["--seed", "3"], training=True) == {**RIGHT, "seed": 3}


@pytest.mark.parametrize("rate", [0, 2e-6, 1.0, "2e-6", "4.0e-5"])
def test_early_check_takes_a_learning_rate_in_every_form(write, rate):
    check_early(write(learning_rate=rate), ["--learning_rate", str(rate)])


def test_allowed_values_are_those_of_the_libraries():
    assert values_of("transformers", "trainer_utils.py", "SchedulerType") == tuple(
        each.value for each in SchedulerType
    )
    for name, (file, enumeration) in ENUMERATIONS.items():
        theirs = getattr(importlib.import_module(f"transformers.{file.removesuffix('.py')}"), enumeration)
        assert values_of("transformers", file, enumeration) == tuple(each.value for each in theirs), name
    assert keys_of("camopd", "token_rules/__init__.py", "TOKEN_RULES") == tuple(TOKEN_RULES)
    assert {string_to_bool(each) for each in BOOLS} == {True, False}
    kinds = types()
    assert {name: kinds[name] for name in ("bf16", "use_peft", "lora_r", "save_total_limit", "eval_steps")} == {
        "bf16": {"bool"}, "use_peft": {"bool"}, "lora_r": {"int"}, "save_total_limit": {"int"}, "eval_steps": {"float"}
    }  # fmt: skip
    assert list(DTYPES) == ModelConfig.__dataclass_fields__["dtype"].metadata["choices"]


def test_tab_in_a_config_is_said_to_be_one(tmp_path):
    (tmp_path / "run.yaml").write_text("prompts:\n\tgeneral: g.jsonl\n")
    with pytest.raises(ValueError, match=r"(.|\n)*line 2, column 1(.|\n)*Indent with spaces, not with tabs"):
        check_early(str(tmp_path / "run.yaml"), [])


@pytest.mark.parametrize("command", ["train", "check", "gaps"])
def test_mistakes_are_said_without_torch(write, command):
    words = ["./gone-model", "--config", write(dtype="flot32")] if command == "gaps" else [write(dtype="flot32")]
    code = (
        "import sys; from camopd.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stopped: print(stopped.code)\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, command, *words], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n[]\n"
    assert done.stderr.startswith("camopd: dtype='flot32' is none of ")
