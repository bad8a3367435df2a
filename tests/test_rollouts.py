"""Rollouts on disk, and the log-probs of a conversation with tools."""

import math

import pytest
import torch

from camopd.rollouts import Turn, load_rollouts, logps_of_turns, save_rollouts
from camopd.samples import Sample


def test_kept_rollouts_of_other_rows_or_a_broken_file_are_not_used(tmp_path):
    samples = [
        Sample(
            "general", 3, [4, 5, 6], 1, torch.tensor([True, False]), 1, True, "maths", torch.tensor([-1.0, math.nan])
        ),
        Sample("domain", 5, [7, 8], 2, torch.zeros(0, dtype=torch.bool), 0, False, None, torch.zeros(0)),
    ]
    path = tmp_path / "rollouts.safetensors"
    rows = [{"branch": "general", "position": 3, "category": "maths"}, {"branch": "domain", "position": 5}]
    assert load_rollouts(path, rows) is None
    save_rollouts(samples, 1, path)
    found, prompts_cut = load_rollouts(path, rows)
    assert prompts_cut == 1
    for one, other in zip(found, samples, strict=True):
        for name, value in vars(other).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(getattr(one, name), value, equal_nan=True)
            else:
                assert getattr(one, name) == value, name
    assert load_rollouts(path, rows[::-1]) is None
    assert load_rollouts(path, rows[:1]) is None
    path.write_bytes(path.read_bytes()[:-9])
    assert load_rollouts(path, rows) is None


def test_logps_of_a_tool_conversation_are_put_back_where_they_were_sampled():
    # Row 1 calls a tool: prompt [1], samples [2, 3], reads the tool result [9, 9], samples [4, 5] of which 5 is cut off.
    turns = [Turn([1], [7], [-0.7]), Turn([1], [2, 3], [-0.2, -0.3]), Turn([1, 2, 3, 9, 9], [4, 5], [-0.4, -0.5])]
    logps = logps_of_turns(turns, row=1, num_rows=2, prompt=[1], completion=[2, 3, 9, 9, 4])
    assert logps.isnan().tolist() == [False, False, True, True, False]
    torch.testing.assert_close(logps[[0, 1, 4]], torch.tensor([-0.2, -0.3, -0.4]))
    assert logps_of_turns(turns, row=0, num_rows=2, prompt=[1], completion=[7]).tolist() == pytest.approx([-0.7])
