"""Which samples of a step are kept, and what becomes of the others. The formula is in test_objective.py."""

import random

import pytest
import torch
from conftest import make_summary
from hypothesis import given
from hypothesis import strategies as st
from trainers import lines, make_trainer

from camopd.selection import Branch, select


def test_dropped_samples_cost_no_forward_or_backward(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, mass_target=0.01, prompts_per_step=8, diagnostics_steps=0)
    seen = []
    forward = trainer.student.logps

    def counting(token_ids, prompt_lens, *args, **kwargs):
        if torch.is_grad_enabled():
            seen.append(len(token_ids))
        return forward(token_ids, prompt_lens, *args, **kwargs)

    monkeypatch.setattr(trainer.student, "logps", counting)
    trainer.train()
    assert seen == [1]  # one sample holds 1 % of the mass; three of the four micro-steps do nothing


def test_domain_first_step_on_a_fresh_student_is_reported_degenerate_and_skipped(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, schedule="domain:1,general:1", max_steps=2)
    trainer.train()
    first, second = lines(tmp_path)
    assert first["selection/domain/degenerate"] == 1
    assert first["selection/domain/kept_fraction"] == 1
    assert first["loss"] == 0
    assert first["guard/skipped"] == 1 and second["guard/skipped"] == 0
    assert first["selection/domain/mass"] is None
    assert second["selection/general/degenerate"] == 0
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_selection_metrics_describe_kept_and_dropped_samples(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, max_steps=1, prompts_per_step=8, max_completion_length=12).train()
    (line,) = lines(tmp_path)
    kept, candidates = line["selection/general/kept"], line["selection/general/candidates"]
    assert line["selection/general/kept_fraction"] == kept / candidates
    assert 0.8 <= line["selection/general/mass"] <= 1
    overall = (
        kept * line["selection/general/length_kept"] + (candidates - kept) * line["selection/general/length_dropped"]
    )
    assert overall == pytest.approx(candidates * line["rollout/general/length"])
    assert line["time/step"] == pytest.approx(line["time/rollout"] + line["time/score"] + line["time/train"])


def chosen(scores, selection, seed=0):
    """Positions that are kept of samples of these scores; a score of `None` is an empty completion."""
    rows = [
        make_summary(position=place, score=score or 0.0, num_tokens=0 if score is None else 3)
        for place, score in enumerate(scores)
    ]
    return select(rows, Branch("b", 0.8, "absolute", 1.0, selection), random.Random(seed)).positions


@given(st.lists(st.none() | st.floats(0, 5), min_size=1, max_size=12), st.integers(0, 3))
def test_controls_keep_as_many_as_the_largest_gaps(scores, seed):
    largest = chosen(scores, True)
    for selection in ("random", "smallest"):
        kept = chosen(scores, selection, seed)
        assert len(kept) == len(largest)
        assert all(scores[place] is not None for place in kept)
        assert kept == chosen(scores, selection, seed)
    smallest = chosen(scores, "smallest")
    left = [score for place, score in enumerate(scores) if score is not None and place not in smallest]
    assert all(scores[place] <= score for place in smallest for score in left)


def test_random_selection_reaches_every_sample_equally_often():
    counts = [0] * 5
    for seed in range(2000):
        for place in chosen([5.0, 4.0, 0.1, 0.1, None], "random", seed):
            counts[place] += 1
    assert counts[4] == 0 and sum(counts) == 4000  # two of four hold 80 %
    assert all(abs(count - 1000) < 4 * (2000 * 0.25) ** 0.5 for count in counts[:4])  # four standard errors


def test_controls_of_selection_train_another_set_in_a_run(tmp_path, tokenizer):
    kept = {}
    for selection in (True, "random", "smallest"):
        folder = tmp_path / str(selection)
        make_trainer(
            folder, tokenizer, max_steps=1, prompts_per_step=8, selection=selection, max_completion_length=12
        ).train()
        (line,) = lines(folder)
        kept[selection] = line["selection/general/kept"], line["selection/general/mass"]
    assert len({count for count, _ in kept.values()}) == 1
    assert kept[True][1] > kept["random"][1] > kept["smallest"][1]
