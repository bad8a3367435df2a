"""What single settings may be: the same before torch is imported and when the config is made."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from camopd import CaMOPDConfig
from camopd.ranges import RANGES, check_written


NAMES = [name for rule in RANGES for name in rule.names.split()]
values = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.just([1])
    | st.sampled_from(["trainer", "auto", "no", "4e-5", ""])
)  # fmt: skip


def test_every_setting_stands_once():
    assert len(NAMES) == len(set(NAMES)) > 25


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(NAMES), values)
def test_what_is_refused_early_is_refused_by_the_config_in_the_same_words(name, value):
    written = yaml.safe_load(yaml.safe_dump({name: value}))
    try:
        check_written(written)
    except ValueError as error:
        with pytest.raises((ValueError, TypeError)) as refused:
            CaMOPDConfig("x", use_cpu=True, bf16=False, **written)
        if not isinstance(value, str):  # the command line's parser makes numbers of these
            assert str(error) == str(refused.value)


@pytest.mark.parametrize(
    "right", [{"learning_rate": "4e-5"}, {"prompts_per_step": "8"}, {"rebalance": "no"}, {"save_steps": "0.5"}, {}]
)
def test_texts_of_a_command_line_are_taken(right):
    check_written(right)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_grad_norm", None), ("max_grad_norm", -1), ("max_grad_norm", float("nan")), ("per_device_eval_batch_size", 0),
     ("adam_beta1", 1.0), ("adam_beta2", 1.5), ("weight_decay", -0.1), ("adam_epsilon", -1e-8),
     ("overwrite_output_dir", "false"), ("verbose", "no")],
)  # fmt: skip
def test_value_that_would_fail_or_act_later_is_refused_by_the_config(name, value, make_config):
    with pytest.raises(ValueError, match=f"{name} must be"):
        make_config(**{name: value})


@pytest.mark.parametrize("wrong", [{"learning_rate": "-4e-5"}, {"prompts_per_step": "0"}, {"max_steps": "1.5"}])
def test_texts_that_are_no_such_number_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be "):
        check_written(wrong)
