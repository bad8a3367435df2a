"""Which samples of a step are kept, and what becomes of the others. The formula is in test_objective.py."""

import pytest
import torch
from trainers import lines, make_trainer


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
