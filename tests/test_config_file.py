"""A run's YAML file is read whole: what YAML would lose or turn into something else is an error or is mended."""

import pytest

from camopd.config_file import read_config


def read(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return read_config(str(path))


def test_settings_are_what_the_file_says(tmp_path):
    text = "max_steps: 3\nteachers: {general: a, domain: b}\nscale: &both {general: 1.0}\n"
    text += "mass_target: {<<: *both, domain: 2}\n"
    assert read(tmp_path, text) == {
        "max_steps": 3, "teachers": {"general": "a", "domain": "b"}, "scale": {"general": 1.0},
        "mass_target": {"general": 1.0, "domain": 2},
    }  # fmt: skip


def test_key_of_a_node_that_is_merged_elsewhere_comes_once(tmp_path):
    text = """
prompts:
  general:
    - &a
      <<: &b {path: p, split: s}
      path: q
  domain:
    <<: *a
"""
    same = {"path": "q", "split": "s"}
    assert read(tmp_path, text) == {"prompts": {"general": [same], "domain": same}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_steps: 3\nmax_steps: 4\n", r"run\.yaml' is not valid YAML: 'max_steps' comes twice, in line 2"),
        ("teachers:\n  general: a\n  general: b\n", "'general' comes twice, in line 3"),
        ("~: 1\n~: 2\n", "'~' comes twice"),
        ("a: [{b: 1, b: 2}]\n", "'b' comes twice, in line 1"),
        ("- a\n", "must be a mapping"),
        ("a: [\n", "is not valid YAML"),
    ],
)
def test_what_would_be_lost_is_an_error(text, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        read(tmp_path, text)


def test_no_is_a_strategy_and_not_false(tmp_path):
    found = read(tmp_path, "save_strategy: no\neval_strategy: steps\nlogging_strategy: no\nbf16: no\n")
    assert found == {"save_strategy": "no", "eval_strategy": "steps", "logging_strategy": "no", "bf16": False}
