"""How long a rank may wait for a teacher, and that the process group waits as long (camopd/vllm/limits.py)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camopd import CaMOPDConfig
from camopd.vllm import limits


# 4 sequences of 64,000 tokens on each of two ranks may be in flight: 300 s + 256,000 / 500 s = 812 s for a request. Two
# of them around a wait of 100 s are 1724 s.
SERVED = {"general": "adapter_off", "domain": "http://localhost:8002"}
LONG = {
    "prompts_per_step": 8, "max_prompt_length": 1000, "max_completion_length": 63000, "teacher_timeout": 100.0,
    "teachers": SERVED,
}  # fmt: skip


@pytest.fixture
def two_ranks(tmp_path, monkeypatch):
    """Make the config of a run on two ranks."""
    monkeypatch.setattr(CaMOPDConfig, "world_size", property(lambda self: 2))
    return lambda **values: CaMOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **values)


def test_ddp_timeout_must_cover_the_longest_requests_and_the_wait_between_them(two_ranks):
    two_ranks(**LONG, ddp_timeout=1724)
    with pytest.raises(
        ValueError,
        match=r"may take 812 seconds.*come to 1724, more than ddp_timeout=1723: .*Set it to 1724",
    ):
        two_ranks(**LONG, ddp_timeout=1723)


def test_ddp_timeout_must_cover_an_evaluation_where_there_is_one(two_ranks):
    wide = {**LONG, "ddp_timeout": 1724, "per_device_eval_batch_size": 8}
    two_ranks(**wide)
    with pytest.raises(ValueError, match=r"may take 1324 seconds"):
        two_ranks(**wide, eval_on_start=True)


def test_ddp_timeout_is_as_it_likes_where_no_teacher_is_on_a_server(two_ranks):
    for teachers in (
        {"general": "adapter_off", "domain": "org/domain"},
        None,
    ):  # those of the trainer are looked at there
        two_ranks(**{**LONG, "teachers": teachers}, ddp_timeout=10)
    with pytest.raises(ValueError, match="ddp_timeout=10"):
        two_ranks(**LONG, ddp_timeout=10)


def test_ddp_timeout_must_cover_the_longest_completion_of_a_rollout_server(two_ranks):
    # 300 s and 0.2 s for each of 1000 tokens are 500 s; two of them around a wait of 100 s are 1100 s.
    values = {**LONG, "teachers": None, "max_completion_length": 1000, "rollout_servers": ["http://localhost:8003"]}
    two_ranks(**values, ddp_timeout=1100)
    with pytest.raises(
        ValueError, match=r"a completion of 1000 tokens, may take 500 seconds.*come to 1100, .*ddp_timeout=1099"
    ):
        two_ranks(**values, ddp_timeout=1099)
    two_ranks(**{**values, "rollout_servers": None}, ddp_timeout=1099)


def test_ddp_timeout_is_not_looked_at_on_a_single_rank(tmp_path):
    CaMOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **LONG, ddp_timeout=10)


@given(st.integers(1, 1000), st.integers(1, 10**6))
def test_request_may_take_longer_with_more_rows_and_longer_ones(rows, longest):
    most = limits.most_tokens_in_flight(rows, longest)
    assert longest <= most <= rows * longest
    assert most <= limits.most_tokens_in_flight(rows + 1, longest)
    assert most < limits.most_tokens_in_flight(rows, longest + 1) or most == limits.most_tokens_in_flight(
        10**9, longest
    )
    assert limits.request_seconds(most) > limits.SCORE_SECONDS
