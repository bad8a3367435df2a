"""`CaMOPDConfig`: the paper's values by default, every way to write them down, and what a wrong value is answered."""

import dataclasses
import json
import re

import pytest
import yaml
from transformers import SchedulerType
from trl import DistillationConfig, TrlParser

from camopd import CaMOPDConfig, method_rules
from camopd.settings import OLD_NAMES


PARENT_FIELDS = {field.name: field for field in dataclasses.fields(DistillationConfig)}
NEW_FIELDS = [field for field in dataclasses.fields(CaMOPDConfig) if field.name not in PARENT_FIELDS]
BRANCHES = ("general", "domain")

# Every new field: another value than the default, and how it is written on the command line.
OTHER_VALUES = {
    "schedule": ("general:5,domain:1", "general:5,domain:1"),
    "mass_target": ({"general": 0.5, "domain": 1.0}, '{"general": 0.5, "domain": 1.0}'),
    "scale": ({"general": 4.0, "domain": 0.5}, '{"general": 4, "domain": 0.5}'),
    "score": ({"general": "positive", "domain": "absolute"}, '{"general": "positive", "domain": "absolute"}'),
    "selection": ({"general": False, "domain": True}, '{"general": false, "domain": true}'),
    "importance_sampling_mode": ("truncate", "truncate"),
    "importance_sampling_low": (0.25, "0.25"),
    "importance_sampling_high": (4.0, "4"),
    "num_iterations": (1, "1"),  # the only value there is
    "eval_tasks": (["ifeval", "gsm8k"], "ifeval,gsm8k"),
    "eval_tasks_items": (32, "32"),
    "prompts_per_step": (64, "64"),
    "max_prompt_length": (100, "100"),
    "split_special_tokens": (True, "true"),
    "prefill": (True, "true"),
    "trust_checkpoint": (True, "true"),
    "teacher_timeout": (60.0, "60"),
    "rollout_lag": (0, "0"),  # 1 needs student_logps="trainer"
    "rollout_servers": (["http://10.0.0.1:8000", "http://10.0.0.2:8000"], "http://10.0.0.1:8000, http://10.0.0.2:8000"),
    "overwrite_output_dir": (True, "true"),
    "rebalance": (False, "false"),
    "teachers": (
        {"general": ["http://10.0.0.1:8001", "http://10.0.0.2:8001"], "domain": "adapter_off"},
        '{"general": ["http://10.0.0.1:8001", "http://10.0.0.2:8001"], "domain": "adapter_off"}',
    ),
    "teacher_prompt": (
        {"domain": "Think. {prompt}", "general": [{"role": "user", "content": "{prompt}"}]},
        '{"domain": "Think. {prompt}", "general": [{"role": "user", "content": "{prompt}"}]}',
    ),
    "score_tokens": (2, "2"),
    "padding_free": (True, "true"),
    "max_tokens_per_micro_batch": (40_000, "40000"),
    "student_logps": ("engine", "engine"),
    "loss_prefix_tokens": (256, "256"),
    "optimizer_moments": ("per_branch", "per_branch"),
    "token_rule": ("relaxed_opd", "relaxed_opd"),
    "relaxed_mixture": (0.2, "0.2"),
    "relaxed_entropy_share": (0.5, "0.5"),
    "relaxed_exploration_steps": (40, "40"),
    "selectkd_reject_weight": (0.0, "0"),
    "loss_normalization": ("token", "token"),
    "divergence": ("sampled", "sampled"),  # the others do not go with this token_rule
    "divergence_top_k": (5, "5"),
    "baseline": ("none", "none"),  # "kl" needs the sampled gap
    "branch_weights": ("none", "none"),  # "sigma" needs a schedule that mixes
    "verbose": (True, "true"),
    "diagnostics_steps": (3, "3"),
    "guards": (
        {"skipped_steps": 1, "log_prob": 0.1, "log_ratio": 0.5, "outside_band": 0.9, "degenerate": 0.9, "truncated": None,
         "zero_gap": 3, "entropy": 0.2, "rounding": 2},
        '{"skipped_steps": 1, "log_prob": 0.1, "log_ratio": 0.5, "outside_band": 0.9, "degenerate": 0.9, '
        '"truncated": null, "zero_gap": 3, "entropy": 0.2, "rounding": 2}',
    ),
}  # fmt: skip


@pytest.fixture
def parse(tmp_path):
    """A YAML of the given keys, read as a user's run reads it, with arguments after it."""

    def parse_yaml(values, *arguments):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, **values}))
        (config,) = TrlParser(CaMOPDConfig).parse_args_and_config(["--config", str(path), *arguments])
        return config

    return parse_yaml


# --- defaults ----------------------------------------------------------------------------------------------------


def test_defaults_of_the_method_are_those_of_the_paper(make_config):
    config = make_config()
    assert config.schedule == "general:3,domain:1"
    assert config.per_branch("mass_target") == {"general": 0.8, "domain": 0.8}
    assert config.per_branch("scale") == {"general": 2.0, "domain": 1.0}
    assert config.per_branch("score") == {"general": "absolute", "domain": "positive"}
    assert config.per_branch("selection") == {"general": True, "domain": True}
    assert config.num_iterations == 1
    assert (config.importance_sampling_mode, config.importance_sampling_low, config.importance_sampling_high) == (
        "mask",
        0.5,
        2.0,
    )


def test_defaults_of_the_optimizer_are_those_of_the_paper(make_config):
    config = make_config()
    assert config.max_steps == 120
    assert config.prompts_per_step == 512
    assert config.learning_rate == 2e-6
    assert config.lr_scheduler_type == SchedulerType.CONSTANT
    assert config.warmup_steps == 0
    assert config.max_grad_norm == 1.0
    assert config.weight_decay == 0.0
    assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.999)


def test_run_of_the_papers_length_saves_ten_checkpoints_by_default(make_config):
    config = make_config()
    assert (config.save_strategy, config.max_steps // config.save_steps) == ("steps", 10)


def test_default_lengths_are_those_of_the_paper(make_config):
    config = make_config()
    assert config.max_prompt_length == 4096
    assert config.max_completion_length == 32768


def test_default_rollouts_are_drawn_from_the_whole_distribution_without_dropout(make_config):
    config = make_config()
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (1.0, 1.0, 0, None)
    assert config.repetition_penalty == 1.0
    assert config.disable_dropout
    assert not config.remove_unused_columns


def test_configs_share_no_dict(make_config):
    first, second = make_config(), make_config()
    for name in ("mass_target", "scale", "score", "selection"):
        assert getattr(first, name) is not getattr(second, name)


# --- gradient_accumulation_steps ---------------------------------------------------------------------------------


def test_accumulation_is_derived_from_prompts_per_step(make_config):
    assert make_config().gradient_accumulation_steps == 512
    assert make_config(per_device_train_batch_size=4).gradient_accumulation_steps == 128
    assert make_config(prompts_per_step=12, per_device_train_batch_size=4).gradient_accumulation_steps == 3
    assert make_config(prompts_per_step=12, gradient_accumulation_steps=12).gradient_accumulation_steps == 12


@pytest.mark.parametrize(
    "world_size, per_device, expected", [(1, 1, 512), (2, 1, 256), (8, 4, 16), (64, 8, 1), (512, 1, 1)]
)
def test_accumulation_keeps_the_step_at_512_prompts_for_every_world_size(
    make_config, world_size, per_device, expected
):
    config = make_config()
    config.per_device_train_batch_size = per_device
    config.gradient_accumulation_steps = None
    method_rules.derive_accumulation(config, world_size)
    assert config.gradient_accumulation_steps == expected
    assert world_size * per_device * config.gradient_accumulation_steps == config.prompts_per_step


def test_prompts_per_step_that_does_not_divide_is_refused_with_the_arithmetic(make_config):
    with pytest.raises(
        ValueError,
        match=r"prompts_per_step=10 does not divide into passes of 1 ranks x per_device_train_batch_size=4 = 4 "
        r"sequences: 10 / 4 = 2\.500\. Set prompts_per_step to 8 or 12, or change per_device_train_batch_size",
    ):
        make_config(prompts_per_step=10, per_device_train_batch_size=4)
    config = make_config()
    config.gradient_accumulation_steps = None
    with pytest.raises(
        ValueError,
        match=r"prompts_per_step=512 .* 24 ranks x per_device_train_batch_size=1 = 24 sequences: 512 / 24 = 21\.333\. "
        "Set prompts_per_step to 504 or 528",
    ):
        method_rules.derive_accumulation(config, 24)


def test_prompts_per_step_below_one_pass_is_told_the_smallest_that_works(make_config):
    with pytest.raises(ValueError, match=r"3 / 4 = 0\.750\. Set prompts_per_step to 4, or"):
        make_config(prompts_per_step=3, per_device_train_batch_size=4)


def test_world_size_in_the_environment_is_taken_before_anything_else(make_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"prompts_per_step=512 does not divide into passes of 3 ranks"):
        make_config()


def test_contradicting_accumulation_is_refused_with_both_ways_out(make_config):
    with pytest.raises(
        ValueError,
        match=r"gradient_accumulation_steps=8 contradicts prompts_per_step=512, which makes it 512 / \(1 ranks x 4\) "
        r"= 128\. Leave it out, in a copy of a config set it to None, or set prompts_per_step to 32\.",
    ):
        make_config(gradient_accumulation_steps=8, per_device_train_batch_size=4)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, reason, way_out",
    [
        ("num_iterations", 2, "one update per rollout", "1"),
        ("temperature", 0.7, "rollouts must be drawn from the very distribution", "1.0"),
        ("top_p", 0.95, "rollouts must be drawn from the very distribution", "1.0"),
        ("top_k", 50, "rollouts must be drawn from the very distribution", "0"),
        ("min_p", 0.05, "rollouts must be drawn from the very distribution", "None"),
        ("repetition_penalty", 1.1, "rollouts must be drawn from the very distribution", "1.0"),
        ("beta", 0.5, "the loss is Eq. 9", "1.0"),
        ("teacher_model_name_or_path", "Qwen/Qwen3-8B", "each branch has its own teacher", "None"),
        ("teacher_model_revision", "main", "put the revision into teacher_model_init_kwargs", "None"),
        ("auto_find_batch_size", True, "change prompts_per_step in the middle of a run", "False"),
        ("remove_unused_columns", True, "the branch of a row is a column", "False"),
        ("ignore_data_skip", True, "a resumed run would get the prompts and branches of step 0 again", "False"),
    ],
)
def test_settings_that_the_method_cannot_use_are_refused(make_config, name, value, reason, way_out):
    way = re.escape(f"Leave it out, or at {way_out}.")
    expected = rf"{name}={value!r} cannot be used with CaMOPD: .*{re.escape(reason)}.*{way}"
    with pytest.raises(ValueError, match=expected):
        make_config(**{name: value})


def test_completion_length_may_be_a_schedule(make_config, parse):
    steps = {0: 256, 40: 1024, 80: 512}
    for config in (
        make_config(max_completion_length=steps),
        parse({"max_completion_length": steps}),
        parse({}, "--max_completion_length", json.dumps(steps)),
    ):
        assert config.max_completion_length == 1024  # what memory, servers and checks must allow for
        lengths = [config.completion_length_at(step) for step in (0, 39, 40, 79, 80, 119)]
        assert lengths == [256, 256, 1024, 1024, 512, 512]
    assert dataclasses.replace(config).completion_length_at(0) == 256
    assert dataclasses.replace(config, max_completion_length=99).completion_length_at(0) == 99
    assert make_config(max_completion_length=77).completion_length_at(5) == 77


@pytest.mark.parametrize("steps", [{1: 256}, {0: 256, -3: 1}, {0: 0}, {0: 1.5}, {}, {"a": 1}, {0: 256, 5: None}])
def test_schedule_of_lengths_that_cannot_be_is_refused(make_config, steps):
    with pytest.raises(ValueError, match=r"max_completion_length .* begins at step 0: \{0: 2048, 40: 8192\}"):
        make_config(max_completion_length=steps)


def test_schedule_of_lengths_beyond_the_run_is_refused(make_config):
    with pytest.raises(ValueError, match="changes at step 8, but the run ends after max_steps=8 steps"):
        make_config(max_completion_length={0: 64, 8: 128}, max_steps=8)


def test_sampling_cuts_are_switched_off_in_both_ways(make_config):
    config = make_config(min_p=0.0, top_k=-1)
    assert (config.min_p, config.top_k) == (None, 0)


def test_schedule_that_cannot_be_read_is_refused(make_config):
    with pytest.raises(ValueError, match="schedule cannot be read: 0 must be above 0"):
        make_config(schedule="general:3,domain:0")


# --- branches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value", [("mass_target", 0.5), ("scale", 3.0), ("score", "absolute"), ("selection", False)]
)
def test_value_given_once_stands_for_all_branches(make_config, name, value):
    config = make_config(schedule="general:2,domain:1,code+tools", **{name: value} | others(name))
    assert config.per_branch(name) == dict.fromkeys(("general", "domain", "code", "tools"), value)


def others(but):
    """One value for each other per-branch field, whose defaults know only two branches."""
    values = {"mass_target": 0.8, "scale": 1.0, "score": "absolute", "selection": True}
    return {name: value for name, value in values.items() if name != but}


def test_new_branch_gets_defaults_and_a_line_says_which(make_config, caplog):
    config = make_config(schedule="general:2,domain:1,code", scale={"general": 3.0, "code": 1.5})
    assert config.per_branch("scale") == {"general": 3.0, "domain": 1.0, "code": 1.5}
    for name, of_code in (("mass_target", 0.8), ("score", "absolute"), ("selection", True)):
        assert config.per_branch(name) == {**getattr(CaMOPDConfig("x"), name), "code": of_code}
    assert [record.getMessage() for record in caplog.records if "no values of its own" in record.message] == [
        "branch 'domain' has no values of its own: scale 1.0. To change one, set scale: {domain: ...}",
        "branch 'code' has no values of its own: mass_target 0.8, score absolute, selection True. To change one, set "
        "mass_target: {code: ...}",
    ]
    caplog.clear()
    make_config(schedule="general,code", **others("none"))
    make_config()
    assert not caplog.text


@pytest.mark.parametrize("name", ["mass_target", "scale", "score", "selection"])
def test_branch_that_the_schedule_does_not_know_is_refused(make_config, name):
    default = getattr(make_config(), name)
    with pytest.raises(
        ValueError,
        match=rf"{name} has a value for \['domian'\], but the branches of schedule 'general:3,domain:1' are "
        r"\['general', 'domain'\]\. Fix the name",
    ):
        make_config(**{name: {"general": default["general"], "domian": default["domain"]}})


def test_schedule_of_one_branch_needs_no_values_for_the_other(make_config):
    config = make_config(schedule="domain")
    assert config.per_branch("mass_target") == {"domain": 0.8}
    assert config.per_branch("scale") == {"domain": 1.0}


# --- YAML and command line ---------------------------------------------------------------------------------------


def test_new_fields_all_have_another_value_in_this_file():
    assert set(OTHER_VALUES) | {"completion_lengths"} | set(OLD_NAMES) == {field.name for field in NEW_FIELDS}


def test_new_fields_are_read_from_yaml(parse):
    config = parse({name: value for name, (value, _) in OTHER_VALUES.items()})
    for name, (value, _) in OTHER_VALUES.items():
        assert getattr(config, name) == value


def test_new_fields_on_the_command_line_win_over_the_yaml(parse):
    of_yaml = dataclasses.asdict(CaMOPDConfig(output_dir="unused", use_cpu=True, bf16=False))
    arguments = [part for name, (_, text) in OTHER_VALUES.items() for part in (f"--{name}", text)]
    config = parse({name: of_yaml[name] for name in OTHER_VALUES if name != "teachers"}, *arguments)
    for name, (value, _) in OTHER_VALUES.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize(
    "arguments, name, expected",
    [
        (["--selection", "false"], "selection", False),
        (["--selection", "True"], "selection", True),
        (["--mass_target", "0.7"], "mass_target", 0.7),
        (["--scale", "3"], "scale", 3.0),
        (["--score", "positive"], "score", "positive"),
    ],
)
def test_value_given_once_on_the_command_line_stands_for_all_branches(parse, arguments, name, expected):
    config = parse({name: OTHER_VALUES[name][0]}, *arguments)
    assert config.per_branch(name) == dict.fromkeys(BRANCHES, expected)
    assert all(type(value) is type(expected) for value in config.per_branch(name).values())


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("selection", False, False),
        ("mass_target", 0.7, 0.7),
        ("mass_target", 1, 1.0),
        ("scale", {"general": 4, "domain": 1}, {"general": 4.0, "domain": 1.0}),
        ("score", "positive", "positive"),
    ],
)
def test_yaml_may_give_one_value_or_a_mapping(parse, name, value, expected):
    expected = expected if isinstance(expected, dict) else dict.fromkeys(BRANCHES, expected)
    assert parse({name: value}).per_branch(name) == expected


def test_number_in_a_json_object_on_the_command_line_may_be_a_text(parse):
    config = parse({}, "--mass_target", json.dumps({"general": "0.5", "domain": "1"}))
    assert config.per_branch("mass_target") == {"general": 0.5, "domain": 1.0}


def test_defaults_that_changed_hold_on_the_command_line_too(parse):
    config = parse({})
    assert (config.max_steps, config.learning_rate, config.max_completion_length) == (120, 2e-6, 32768)
    assert config.gradient_accumulation_steps == 512
    assert parse({"max_steps": 7}, "--learning_rate", "1e-5").max_steps == 7


def test_unknown_key_in_yaml_is_refused(parse):
    with pytest.raises(ValueError, match="prompts_per_stp"):
        parse({"prompts_per_stp": 64})


def test_values_that_are_wrong_are_refused_from_yaml_and_command_line_alike(parse):
    with pytest.raises(ValueError, match=r"mass_target of branch 'general' must be in \(0, 1\], got 1\.5"):
        parse({"mass_target": {"general": 1.5, "domain": 0.8}})
    with pytest.raises(ValueError, match="mass_target must be a number or a mapping from branch to that, got 'most'"):
        parse({}, "--mass_target", "most")
    with pytest.raises(
        ValueError, match="selection must be true or false or a mapping from branch to that, got 'no!'"
    ):
        parse({}, "--selection", "no!")


# --- documentation and round trip --------------------------------------------------------------------------------


@pytest.mark.parametrize("field", NEW_FIELDS, ids=lambda field: field.name)
def test_new_fields_are_documented_with_type_default_and_help(field):
    entry = re.search(rf"^\s*{field.name} \((.*)\):$", CaMOPDConfig.__doc__, flags=re.MULTILINE)
    assert entry, f"{field.name} is missing in the docstring"
    if field.default is not dataclasses.MISSING and field.default is not None:
        default = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
        assert f"defaults to `{default}`" in entry[1]
    assert field.metadata["help"].strip()


def test_defaults_that_differ_from_the_parent_are_named_in_the_docstring():
    changed = [
        field.name
        for field in dataclasses.fields(CaMOPDConfig)
        if field.name in PARENT_FIELDS and field.default != PARENT_FIELDS[field.name].default
    ]
    assert "learning_rate" in changed
    note = CaMOPDConfig.__doc__.partition("[!NOTE]")[2]
    assert [name for name in changed if f"`{name}" not in note] == []


def test_config_made_from_the_values_of_another_is_equal(make_config):
    config = make_config(**{name: value for name, (value, _) in OTHER_VALUES.items()}, weight_decay=0.25, seed=7)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    again = CaMOPDConfig(**values)
    assert {name: getattr(again, name) for name in values} == values


def test_config_as_a_dict_is_json_and_holds_every_new_field(make_config):
    values = json.loads(json.dumps(make_config(teachers=OTHER_VALUES["teachers"][0]).to_dict()))
    assert {field.name for field in NEW_FIELDS} <= set(values)
    assert values["teachers"] == OTHER_VALUES["teachers"][0]


@pytest.mark.parametrize(
    ("old", "value", "new", "expected"),
    [
        ("gap_student", "engine", "student_logps", "engine"),
        ("exchange", False, "rebalance", False),
        ("teacher_patience", 60.0, "teacher_timeout", 60.0),
        ("score_batch_size", 3, "score_tokens", 3 * (100 + 28)),
    ],
)
def test_names_of_before_are_taken_with_a_warning(old, value, new, expected, make_config, caplog):
    lengths = {"max_prompt_length": 100, "max_completion_length": 28}
    config = make_config(**{old: value}, **lengths)
    assert getattr(config, new) == expected and getattr(config, old) is None
    assert old in caplog.text and f"{new}={expected!r}" in caplog.text
    if old == "score_batch_size":
        assert config.score_rows == 3
    other = {"student_logps": "nonsense", "rebalance": "nonsense", "teacher_timeout": 61.0, "score_tokens": 7}[new]
    with pytest.raises(ValueError, match=rf"{old}=.* is the old name of {new}="):
        make_config(**{old: value, new: other}, **lengths)


def test_names_of_before_all_have_a_test():
    (mark,) = test_names_of_before_are_taken_with_a_warning.pytestmark
    assert {(old, new) for old, _, new, _ in mark.args[1]} == set(OLD_NAMES.items())


def test_scoring_forward_holds_as_many_of_the_longest_sequences_as_its_tokens_allow(make_config):
    assert make_config(max_prompt_length=1000, max_completion_length=3096).score_rows == 16  # 65536 tokens
    assert make_config(max_prompt_length=4096, max_completion_length=10**6).score_rows == 1


@pytest.mark.parametrize(
    "given", ["http://a:8000,http://b:8000", '["http://a:8000", "http://b:8000"]', ["http://a:8000", "http://b:8000"]]
)
def test_rollout_servers_are_read_as_a_list_and_alone(make_config, given):
    assert make_config(rollout_servers=given).rollout_servers == ["http://a:8000", "http://b:8000"]
    with pytest.raises(ValueError, match=r"rollout_servers and use_vllm=True are two ways to roll out"):
        make_config(rollout_servers=given, use_vllm=True)


@pytest.mark.parametrize("given", ["a:8000", ["http://a", 3], {"general": "http://a"}, 3, "ftp://sk-key@a"])
def test_rollout_servers_that_are_no_urls_are_refused(make_config, given):
    with pytest.raises(
        ValueError, match=r"rollout_servers must be URLs of vLLM servers, got .* Write rollout_servers:"
    ):
        make_config(rollout_servers=given)
    for nothing in (None, [], ""):
        assert make_config(rollout_servers=nothing).rollout_servers is None
