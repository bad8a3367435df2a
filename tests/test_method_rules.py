"""What a wrong value of a setting of the method is answered, and which settings have to fit together."""

import re

import pytest


@pytest.mark.parametrize("value", [0, 1.5, -0.1, float("nan")])
def test_mass_target_outside_0_to_1_is_refused(make_config, value):
    shown = re.escape(str(float(value)))
    with pytest.raises(
        ValueError,
        match=rf"mass_target of branch 'general' must be in \(0, 1\], got {shown}\. .*\(Eq\. 8\).*selection to False",
    ):
        make_config(mass_target=value)
    with pytest.raises(ValueError, match=rf"mass_target of branch 'domain' must .* got {shown}"):
        make_config(mass_target={"general": 1, "domain": value})


@pytest.mark.parametrize("value", [0, -2.0, float("inf")])
def test_scale_that_is_not_positive_is_refused(make_config, value):
    with pytest.raises(
        ValueError,
        match=r"scale of branch 'domain' must be a positive number, got .*r_b of Eq\. 9\. .*out of the schedule",
    ):
        make_config(scale={"general": 2.0, "domain": value})


def test_score_that_is_unknown_is_refused_with_the_two_there_are(make_config):
    with pytest.raises(
        ValueError,
        match=r"score of branch 'domain' must be one of \('absolute', 'positive'\), got 'squared'\. They are Eq",
    ):
        make_config(score={"general": "absolute", "domain": "squared"})
    with pytest.raises(ValueError, match=r"score of branch 'general' must .* got 'Absolute'"):
        make_config(score="Absolute")


@pytest.mark.parametrize("name", ["mass_target", "scale"])
@pytest.mark.parametrize("value", ["much", None, [0.5, 0.5]])
def test_per_branch_number_that_is_none_is_refused(make_config, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number or a mapping from branch to that, got"):
        make_config(**{name: value})
    with pytest.raises(ValueError, match=rf"{name}\['domain'\] must be a number"):
        make_config(**{name: {"general": 0.5, "domain": value}})


@pytest.mark.parametrize("value", ["maybe", None, 2, 0.5])
def test_selection_that_is_not_true_or_false_is_refused(make_config, value):
    with pytest.raises(ValueError, match="selection must be true or false or a mapping from branch to that, got"):
        make_config(selection=value)
    with pytest.raises(ValueError, match=r"selection\['domain'\] must be true or false"):
        make_config(selection={"general": True, "domain": value})


def test_importance_mode_that_is_unknown_is_refused_with_the_modes_there_are(make_config):
    with pytest.raises(
        ValueError, match=r"importance_sampling_mode must be one of \('mask', 'truncate', 'none'\), got 'clip'"
    ):
        make_config(importance_sampling_mode="clip")


@pytest.mark.parametrize("low, high", [(-0.5, 2.0), (1.5, 2.0), (0.5, 0.9), (2.0, 0.5), (float("nan"), 2.0)])
def test_importance_band_that_does_not_enclose_1_is_refused(make_config, low, high):
    with pytest.raises(
        ValueError,
        match=rf"importance_sampling_low={re.escape(str(low))} and importance_sampling_high={high} must enclose 1"
        r".*0 <= low <= 1 <= high.*default band is 0\.5 to 2\.0",
    ):
        make_config(importance_sampling_low=low, importance_sampling_high=high)


def test_importance_bands_at_their_limits_are_taken(make_config):
    for low, high in ((0.0, 1.0), (1.0, float("inf"))):
        config = make_config(importance_sampling_low=low, importance_sampling_high=high)
        assert (config.importance_sampling_low, config.importance_sampling_high) == (low, high)


@pytest.mark.parametrize(
    "name", ["prompts_per_step", "max_prompt_length", "max_completion_length", "score_tokens", "max_steps"]
)
@pytest.mark.parametrize("value", [0, -1, 2.5, "8", None])
def test_count_that_is_no_whole_number_of_at_least_1_is_refused(make_config, name, value):
    if (name, value) == ("max_completion_length", "8"):  # a number or a mapping, so the command line gives it as text
        assert make_config(max_completion_length="8").max_completion_length == 8
        return
    with pytest.raises(ValueError, match=rf"{name} must be a whole number of at least 1, got {value!r}\."):
        make_config(**{name: value})


@pytest.mark.parametrize("name", ["max_tokens_per_micro_batch", "loss_prefix_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "8"])
def test_optional_count_is_a_whole_number_of_at_least_1(make_config, name, value):
    assert getattr(make_config(), name) is None
    with pytest.raises(ValueError, match=rf"{name} must be a whole number of at least 1, got {value!r}\."):
        make_config(**{name: value})


@pytest.mark.parametrize("value", [-1, 2.5, "8", True, None])
def test_interval_of_diagnostics_that_is_no_whole_number_is_refused(make_config, value):
    assert make_config(diagnostics_steps=0).diagnostics_steps == 0
    with pytest.raises(
        ValueError, match=rf"diagnostics_steps must be a whole number of at least 1, or 0 .* got {value!r}\."
    ):
        make_config(diagnostics_steps=value)


def test_token_budget_below_one_sample_is_refused_with_the_arithmetic(make_config):
    message = (
        r"max_tokens_per_micro_batch=5000 is smaller than one sample: max_prompt_length \+ max_completion_length = "
        r"4096 \+ 1000 = 5096\. Raise it to 5096 or lower"
    )
    with pytest.raises(ValueError, match=message):
        make_config(max_tokens_per_micro_batch=5000, max_completion_length=1000)
    assert make_config(max_tokens_per_micro_batch=5096, max_completion_length=1000)


def test_token_budget_and_a_batch_size_contradict_each_other(make_config):
    with pytest.raises(
        ValueError, match=r"decides how many samples .* per_device_train_batch_size=4\. Leave the second at 1"
    ):
        make_config(max_tokens_per_micro_batch=50_000, per_device_train_batch_size=4)


@pytest.mark.parametrize(
    "name", ["student_logps", "optimizer_moments", "token_rule", "loss_normalization", "branch_weights"]
)
def test_choice_that_is_none_is_refused(make_config, name):
    with pytest.raises(ValueError, match=rf"{name} must be one of \(.*\), got 'nobody'"):
        make_config(**{name: "nobody"})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("relaxed_mixture", 0.0, r"\(0, 1\), got 0\.0\. It is lambda of Relaxed OPD"),
        ("relaxed_mixture", 1.0, r"\(0, 1\), got 1\.0"),
        ("relaxed_mixture", "much", r"\(0, 1\), got 'much'"),
        ("relaxed_entropy_share", 0.0, r"\(0, 1\], got 0\.0\. .*1 leaves the choice by entropy out"),
        ("relaxed_entropy_share", 1.5, r"\(0, 1\], got 1\.5"),
        ("selectkd_reject_weight", -0.1, r"\[0, 1\), got -0\.1"),
        ("selectkd_reject_weight", 1.0, r"\[0, 1\), got 1\.0\. .*set token_rule to 'none'"),
        ("selectkd_reject_weight", float("nan"), r"\[0, 1\), got nan"),
    ],
)
def test_parameter_of_a_baseline_outside_its_range_is_refused(make_config, name, value, reason):
    with pytest.raises(ValueError, match=rf"{name} must be in {reason}"):
        make_config(**{name: value})


@pytest.mark.parametrize("value", [-1, 2.5, True])
def test_exploration_steps_are_a_whole_number(make_config, value):
    with pytest.raises(
        ValueError, match=rf"relaxed_exploration_steps must be a whole number of at least 0, got {value}"
    ):
        make_config(relaxed_exploration_steps=value)


def test_weights_of_branches_need_a_step_that_mixes_them(make_config):
    with pytest.raises(
        ValueError,
        match=r"branch_weights='sigma' .* no step of schedule 'general:3,domain:1' mixes any.*'general:1\+domain:1'",
    ):
        make_config(branch_weights="sigma")
    assert make_config(branch_weights="sigma", schedule="general,general:3+domain").branch_weights == "sigma"


def test_max_steps_left_to_the_epochs_is_refused_with_the_reason(make_config):
    with pytest.raises(ValueError, match=r"max_steps .* got -1\. .*no epoch to count; say how many optimizer steps"):
        make_config(max_steps=-1)


def test_teachers_as_one_text_are_refused_with_the_form_to_write(make_config):
    with pytest.raises(ValueError, match=r"got 'http://host:8000'\. In YAML:\nteachers:\n  general: "):
        make_config(teachers="http://host:8000")


def test_teachers_as_a_list_are_refused(make_config):
    with pytest.raises(ValueError, match=r"teachers must map each branch to its teacher, got \['http://a:1'\]"):
        make_config(teachers=["http://a:1"])


def test_batch_size_of_0_is_refused(make_config):
    with pytest.raises(ValueError, match="per_device_train_batch_size must be a whole number of at least 1, got 0"):
        make_config(per_device_train_batch_size=0)


def test_json_that_cannot_be_read_is_refused_with_the_field_and_the_form(make_config):
    with pytest.raises(
        ValueError, match=r"mass_target is not valid JSON: \{general: 0.8\}.*double quotes: --mass_target"
    ):
        make_config(mass_target="{general: 0.8}")


def test_mass_target_cannot_be_true(make_config):
    with pytest.raises(ValueError, match="mass_target must be a number"):
        make_config(mass_target=True)


def test_schedule_that_gives_a_branch_no_rows_is_refused(make_config):
    with pytest.raises(
        ValueError,
        match=r"schedule 'general:1,general:9\+domain:1' gives branch 'domain' none of the 4 prompts of step 1\. "
        "Raise prompts_per_step or the branch's share",
    ):
        make_config(schedule="general:1,general:9+domain:1", prompts_per_step=4)


@pytest.mark.parametrize(("schedule", "steps", "named"), [
    ("general:3,domain:1", 3, ["domain"]), ("general:3,domain:1", 4, []), ("general:1+domain:1", 1, []),
    ("general:300,domain:1", 120, ["domain"]),
])  # fmt: skip
def test_branch_that_the_run_never_reaches_is_warned_of(make_config, schedule, steps, named, caplog):
    make_config(schedule=schedule, max_steps=steps)
    said = [record.args for record in caplog.records if "is never trained" in record.msg]
    assert [args[0] for args in said] == named and all(steps in args for args in said)


@pytest.mark.parametrize("name", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_dtype_may_have_its_name_of_before_and_not_both(make_config, name):
    given = {"torch_dtype": "bfloat16", "revision": "main"}
    assert getattr(make_config(**{name: given}), name) == {"dtype": "bfloat16", "revision": "main"}
    assert given == {"torch_dtype": "bfloat16", "revision": "main"}
    with pytest.raises(ValueError, match=rf"{name} has dtype='float32' and torch_dtype='bfloat16'\. Leave one out"):
        make_config(**{name: {"torch_dtype": "bfloat16", "dtype": "float32"}})


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimizer_that_steps_in_the_backward_is_refused(optim, make_config):
    with pytest.raises(ValueError, match=f"optim='{optim}' changes the weights in the backward"):
        make_config(optim=optim, optim_target_modules=["q_proj"])
