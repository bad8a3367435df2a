"""The YAML file of a sweep (camopd/sweep.py)."""

import sys
from pathlib import Path

import pytest
import yaml

from camopd.run import read_settings
from camopd.sweep import TRAIN, read_sweep


ONE = {"values": [9.0, 1.0, 3.0]}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write configs and a sweep of them into a folder that is then the current one."""
    monkeypatch.chdir(tmp_path)

    def write(configs, /, **settings):
        for name, content in configs.items():
            Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
        sweep = {"output_dir": "out", "configs": [f"{name}.yaml" for name in configs], "seeds": [0, 1],
                 "command": "run {config} {seed} {output_dir}"}  # fmt: skip
        Path("sweep.yaml").write_text(yaml.safe_dump({**sweep, **settings}, sort_keys=False))
        return "sweep.yaml"

    return write


def test_default_command_trains_with_the_common_settings(write):
    common = {"max_steps": 3, "bf16": False, "run_name": "a b", "mass_target": {"general": 0.5}}
    sweep = read_sweep(write({"one": ONE}, command=TRAIN, set=common, output_dir="the out"))
    words = sweep.words(sweep.runs[1], resume=True)
    assert words[:5] == [sys.executable, "-m", "camopd.cli", "train", "one.yaml"]
    read = read_settings("one.yaml", words[5:])
    assert read == {**ONE, **common, "seed": 1, "output_dir": "the out/one/seed-1", "resume_from_checkpoint": True}
    assert "--resume_from_checkpoint" not in sweep.words(sweep.runs[1], resume=False)
    assert sweep.words(sweep.runs[1], resume="auto")[-2:] == ["--resume_from_checkpoint", "auto"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": ["a.yaml"]}, r"'config' in 'sweep\.yaml' is not a setting of a sweep\. Did you mean 'configs'\?"),
        ({"max_steps": 3}, r"'max_steps' in .* There are configs, seeds, .*; settings of runs go to `set`"),
        ({"configs": "one.yaml"}, r"configs in 'sweep\.yaml' must be a list of YAML files, got 'one\.yaml'"),
        ({"configs": []}, r"configs in 'sweep\.yaml' must be a list of YAML files, got \[\]"),
        ({"seeds": 3}, r"seeds in 'sweep\.yaml' must be a list of whole numbers such as \[0, 1\], got 3"),
        ({"seeds": [0, True]}, r"seeds in .* got \[0, True\]"),
        ({"seeds": [0, 0]}, r"seeds in 'sweep\.yaml' has '0' twice; its runs would share a folder\. Take one out\."),
        ({"configs": ["one.yaml", "b/one.yaml"]}, r"configs in .* has 'one' twice; .* Take one out, or rename a file"),
        ({"output_dir": None}, r"output_dir in 'sweep\.yaml' must be the folder for the runs and the table, got None"),
        ({"set": ["max_steps"]}, r"set in 'sweep\.yaml' must be a mapping from settings to values, got \['max_steps'\]"),
        ({"set": {"seed": 3}}, r"set in 'sweep\.yaml' has 'seed', which the sweep gives each run itself\. Take it out"),
        ({"columns": ["loss@0"]}, r"columns in .* must be a list of metrics such as gap/.*got \['loss@0'\]"),
        ({"columns": "loss"}, r"columns in .* must be a list of metrics .* got 'loss'"),
        ({"command": ["a"]}, r"command in 'sweep\.yaml' must be one line of text, got \['a'\]"),
        ({"command": "a 'b"}, r"command in .* cannot be split into words: No closing quotation\. Fix its quotes"),
        ({"command": "a {seed}"}, r"command in .* has no \{output_dir\}, but the table is made from what a run"),
        ({"command": "a {output_dir}"}, r"command in .* has no \{seed\}, but there are 2 seeds\. Put it in: 'a \{out"),
        ({"configs": ["a", "b"], "command": "a {output_dir} {seed}"}, r"has no \{config\}, but there are 2 configs"),
        ({"set": {"max_steps": 1}}, r"command in .* has no \{set\} as a word of its own, where `set` would go"),
        ({"configs": ["no.yaml"], "command": TRAIN}, r"configs in .* has 'no\.yaml', but there is no such file\. Paths"),
    ],
)  # fmt: skip
def test_sweep_that_is_wrong_is_refused_before_anything_runs(write, settings, message):
    with pytest.raises(ValueError, match=message):
        read_sweep(write({"one": ONE}, **settings))
    assert not Path("out").exists()


PUSHES = {"push_to_hub": True}
PUSHED = "camopd train {config} --seed {seed} --output_dir {output_dir} {set}"


@pytest.mark.parametrize(
    ("one", "two", "settings", "place"),
    [
        ({}, {}, {"set": {"push_to_hub": True}}, "seed-0"),
        ({"push_to_hub": True, "hub_model_id": "me/one"}, {}, {}, "me/one"),
        ({}, {"push_to_hub": True}, {"set": {"hub_model_id": "me/all"}}, "me/all"),
        ({**PUSHES, "hub_model_id": "me/a"}, {**PUSHES, "hub_model_id": "me/b"}, {}, "me/a"),
        ({**PUSHES, "hub_model_id": "me/a"}, {**PUSHES, "hub_model_id": "me/b"}, {"seeds": [3]}, None),
        ({**PUSHES, "hub_revision": "a"}, {**PUSHES, "hub_revision": "b"}, {"seeds": [3]}, None),
        ({**PUSHES, "hub_revision": "a"}, {**PUSHES, "hub_revision": "a"}, {"seeds": [3]}, "seed-3@a"),
        (PUSHES, PUSHES, {"set": {"push_to_hub": False}}, None),
        ({"push_to_hub": True, "hub_model_id": "me/a"}, {}, {"seeds": [3]}, None),
        ({}, {}, {}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [TRAIN, PUSHED])
def test_sweep_whose_runs_would_push_over_each_other_is_refused(write, one, two, settings, place, command):
    path = write({"one": {**ONE, **one}, "two": {**ONE, **two}}, command=command, **settings)
    if place is None:
        read_sweep(path)
    else:
        with pytest.raises(ValueError, match=rf"would send their models to one repository of the Hub, '{place}'"):
            read_sweep(path)


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("--method {config}", True),
        ("--method {config} --push_to_hub false", False),
        ("--method {config} --hub_model_id me/{config}-{seed}", False),
    ],
)
def test_push_of_the_runs_own_config_and_of_the_commands_words_counts(write, words, refused):
    write({"run": {**ONE, **PUSHES}})
    path = write(
        {},
        configs=["camopd", "vanilla_mopd"],
        command=f"camopd train run.yaml {words} --seed {{seed}} --output_dir {{output_dir}}",
    )
    if refused:
        with pytest.raises(ValueError, match=r"camopd/seed-0 and vanilla_mopd/seed-0 .* of the Hub, 'seed-0'"):
            read_sweep(path)
    else:
        read_sweep(path)


def test_sweep_that_is_not_there_is_an_error_with_its_path():
    with pytest.raises(ValueError, match=r"the config 'no\.yaml' cannot be read"):
        read_sweep("no.yaml")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"hub_token": "hf_abc"}, "hub_token"),
        ({"env": {"WANDB_API_KEY": "abc"}}, "WANDB_API_KEY"),
        ({"env": '{"hf_token": "abc"}'}, "hf_token"),
        ({"model_init_kwargs": {"token": "abc"}}, "token"),
        ({"hub_token": None}, None),
        ({"env": {"CUDA_VISIBLE_DEVICES": "0", "TOKENIZERS_PARALLELISM": "false"}, "score_tokens": 8}, None),
    ],
)
def test_keys_are_not_put_on_the_command_lines_of_runs(write, settings, name):
    path = write({"one": ONE}, command=TRAIN, set=settings)
    if name is None:
        read_sweep(path)
        return
    with pytest.raises(
        ValueError, match=rf"set in .* has '{name}', .* on command lines and in logs. Export"
    ) as caught:
        read_sweep(path)
    assert "abc" not in str(caught.value)
