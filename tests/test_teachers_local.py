"""Teachers in the process: plain log-probs, frozen, and on the accelerator only while they score."""

import copy
import os

import pytest
import torch
from conftest import LOGP, make_model
from fake_vllm import PROMPT_LENS, TOKEN_IDS, assert_same_scores, reference_logps

from camopd.teachers.base import Teacher
from camopd.teachers.local import LocalTeacher, load_teacher_model


def test_local_scores_equal_a_plain_log_softmax(teacher_model):
    scores = LocalTeacher(teacher_model, "local", "cpu", batch_size=8).score(TOKEN_IDS, PROMPT_LENS, top_k=3)
    for score, ids, prompt_len in zip(scores, TOKEN_IDS, PROMPT_LENS, strict=True):
        sampled, everything = (logps[prompt_len - 1 :] for logps in reference_logps(teacher_model, ids))
        torch.testing.assert_close(score.logps, sampled, rtol=0, atol=LOGP)
        top = everything.topk(3, dim=-1)
        torch.testing.assert_close(score.top_ids, top.indices)
        torch.testing.assert_close(score.top_logps, top.values, rtol=0, atol=LOGP)
        assert score.logps.dtype == torch.float32


def test_local_scores_without_top_k_have_none(teacher_model):
    scores = LocalTeacher(teacher_model, "local", "cpu", batch_size=8).score(TOKEN_IDS, PROMPT_LENS)
    assert all(score.top_ids is None and score.top_logps is None for score in scores)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_local_batch_size_changes_no_score(teacher_model, batch_size):
    alone = LocalTeacher(teacher_model, "local", "cpu", batch_size).score(TOKEN_IDS, PROMPT_LENS, top_k=2)
    together = LocalTeacher(teacher_model, "local", "cpu", 8).score(TOKEN_IDS, PROMPT_LENS, top_k=2)
    assert_same_scores(alone, together)


@pytest.mark.parametrize("top_k", [0, 2])
def test_local_teacher_scores_a_batch_of_nothing_but_empty_completions(teacher_model, top_k):
    scores = LocalTeacher(teacher_model, "local", "cpu", 8).score([[4, 5], [6]], [2, 1], top_k)
    assert [score.logps.shape for score in scores] == [(0,), (0,)]
    if top_k:
        assert [score.top_ids.shape for score in scores] == [(0, 2), (0, 2)]


def test_local_teacher_is_frozen_and_stays_as_it_was(teacher_model):
    before = copy.deepcopy(teacher_model.state_dict())
    teacher_model.train()
    teacher = LocalTeacher(teacher_model, "local", "cpu", batch_size=2)
    assert not teacher_model.training
    scores = teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert not any(parameter.requires_grad for parameter in teacher_model.parameters())
    assert not any(score.logps.requires_grad for score in scores)
    assert all(torch.equal(value, before[name]) for name, value in teacher_model.state_dict().items())
    assert isinstance(teacher, Teacher)


@pytest.mark.parametrize("full", [False, True], ids=["used", "full"])
def test_local_teacher_comes_back_to_the_memory_that_it_had(full, teacher_model, monkeypatch):
    """The copies on the device (`meta` is one that every machine has) are dropped, not brought back: that takes as long.
    Also where the device is found to be full on the way to it."""
    before = {name: (value.data_ptr(), value.clone()) for name, value in teacher_model.state_dict().items()}
    teacher, to = LocalTeacher(teacher_model, "local", "meta", batch_size=2), teacher_model.to
    seen = set()

    def move(device):
        if str(device) == "cpu":  # nothing comes back from `meta`, buffers neither
            return
        to(device)
        seen.update(weight.device.type for weight in teacher_model.parameters())
        if full:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(teacher_model, "to", move)
    monkeypatch.setattr(teacher.forward, "probe", lambda: 1 / 0)
    with pytest.raises(torch.OutOfMemoryError if full else ZeroDivisionError):
        teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert seen == {"meta"}
    for name, value in teacher_model.state_dict().items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])


def test_local_teacher_scores_under_the_trainers_autocast_and_answers_in_float32(teacher_model):
    plain = LocalTeacher(teacher_model, "local", "cpu", batch_size=2).score(TOKEN_IDS, PROMPT_LENS)
    rounded = LocalTeacher(
        teacher_model, "local", "cpu", batch_size=2, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    ).score(TOKEN_IDS, PROMPT_LENS)
    assert rounded[1].logps.dtype == torch.float32
    difference = (rounded[1].logps - plain[1].logps).abs().max()
    assert 1e-5 < difference < 0.5


def test_local_teacher_is_on_the_accelerator_only_while_it_scores(monkeypatch):
    teacher = LocalTeacher(make_model(1), "local", "cpu", 4)
    moves = []
    monkeypatch.setattr(teacher.model, "to", moves.append)
    teacher.score([[5, 6, 7]], [1])
    assert moves == []  # on the CPU there is nowhere to go
    teacher.rests_on_cpu = True
    teacher.score([[5, 6, 7]], [1])
    assert moves == [teacher.device, "cpu"]
    with pytest.raises(ValueError, match="at least one prompt token"):
        teacher.score([[5, 6, 7]], [0])
    assert moves[2:] == [teacher.device, "cpu"]  # a failed call does not leave it there


def test_local_teacher_is_moved_once_per_score_and_not_for_a_probe_that_is_done(model_factory, monkeypatch):
    teacher = LocalTeacher(model_factory(0), "local", "cpu", batch_size=2)
    teacher.rests_on_cpu = True  # as on a GPU
    moves = []
    monkeypatch.setattr(teacher.model, "to", lambda device: moves.append(str(device)))
    teacher.probe()
    assert len(moves) == 2  # there and back
    for _ in range(2):
        teacher.probe()
        teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert len(moves) == 6


def test_teacher_is_loaded_on_every_rank_where_fsdp_loads_the_student_on_the_first(
    teacher_model, tmp_path, monkeypatch
):
    teacher_model.save_pretrained(tmp_path / "teacher")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("LOCAL_RANK", "1")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        loaded = load_teacher_model(str(tmp_path / "teacher"), {"dtype": torch.float32}, "general")
    finally:
        torch.distributed.destroy_process_group()
    for name, weight in teacher_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
