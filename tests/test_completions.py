"""The table of completions that a run logs."""

import errno
import os
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import make_model, make_prompts
from trainers import make_trainer

from camopd.callbacks.completions import CompletionsTable
from camopd.errors import CaMOPDError, TeacherError


def test_table_of_completions_has_the_branch_of_each(tmp_path, tokenizer, capsys):
    trainer = make_trainer(
        tmp_path, tokenizer, schedule="general:1+domain:1", max_steps=2, logging_steps=2, log_completions=True,
        eval_dataset={"domain": make_prompts("domain", 3)},
    )  # fmt: skip
    trainer.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert list(table.columns) == ["step", "branch", "prompt", "completion"]
    assert sorted(table["branch"]) == ["domain"] * 2 + ["general"] * 2  # of the latest step
    for branch, prompt in zip(table["branch"], table["prompt"], strict=True):
        assert prompt.replace(" ", "").startswith(branch)
    assert "branch" in capsys.readouterr().out


def test_completions_of_an_evaluation_do_not_take_the_place_of_the_steps(tmp_path, tokenizer):
    make_trainer(
        tmp_path, tokenizer, schedule="general", max_steps=2, log_completions=True, teachers={"general": make_model(2)},
        train_dataset={"general": make_prompts("train", 5)}, eval_dataset={"general": make_prompts("held", 3)},
        eval_strategy="steps", eval_steps=1, eval_on_start=True,
    ).train()  # fmt: skip
    found = {path.stem: pd.read_parquet(path) for path in (tmp_path / "completions").iterdir()}
    assert sorted(found) == [
        "completions_00001",
        "completions_00002",
        "held_out_00000",
        "held_out_00001",
        "held_out_00002",
    ]
    for name, table in found.items():
        kind, count = ("held", 3) if name.startswith("held") else ("train", 4)
        assert len(table) == count and all(kind in prompt.replace(" ", "") for prompt in table["prompt"])


@pytest.mark.parametrize("is_first", [True, False])
def test_table_that_cannot_be_written_is_an_error_on_all_ranks_and_leaves_the_one_before(
    is_first, tmp_path, tokenizer, monkeypatch
):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    said = []  # by the other rank
    table = CompletionsTable(SimpleNamespace(prompts_per_step=4), tokenizer, lambda mine: [*said, *mine], lambda: True)
    table.on_rolled_out([])
    if not is_first:
        said = [(CaMOPDError, "completions_00001.parquet' cannot be written: No space left on device")]
    folder = tmp_path / "completions"
    folder.mkdir()
    (folder / "completions_00001.parquet").write_text("whole")
    monkeypatch.setattr(os, "fsync", fail)
    state = SimpleNamespace(global_step=1, is_world_process_zero=is_first)
    with pytest.raises(CaMOPDError, match=r"completions_00001.parquet' cannot be written: No space left on device"):
        table.on_log(SimpleNamespace(output_dir=str(tmp_path)), state, None, logs={"loss": 1.0})
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("completions_00001.parquet", "whole")]


def test_completions_that_a_stopped_run_has_left_are_in_the_table(tmp_path, tokenizer):
    """They are drawn in one process and logged in another."""
    settings = {"max_steps": 2, "log_completions": True, "schedule": "general", "teachers": {"general": make_model(2)},
                "train_dataset": {"general": make_prompts("train", 5)}}  # fmt: skip
    trainer = make_trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=1, **settings)

    def fail(*_):
        raise TeacherError("it is gone")

    score = trainer.teachers["general"].score
    trainer.teachers["general"].score = lambda *rows: score(*rows) if trainer.state.global_step < 1 else fail()
    with pytest.raises(TeacherError, match="Nothing is lost"):
        trainer.train()
    assert list((tmp_path / "checkpoint-1").glob("rollouts-*"))
    make_trainer(tmp_path, tokenizer, **settings).train(resume_from_checkpoint=True)
    tables = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert tables == ["completions_00001.parquet", "completions_00002.parquet"]
    assert len(pd.read_parquet(tmp_path / "completions" / tables[1])) == 4


def test_prediction_before_training_leaves_no_empty_table(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, log_completions=True)
    trainer.predict({"general": make_prompts("other", 3)})
    trainer.train()
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["completions_00001.parquet"]


def held_out_of(tmp_path):
    return pd.read_parquet(tmp_path / "completions" / "held_out_00000.parquet")


def test_held_out_rows_that_fill_up_a_batch_are_in_the_table_once(tmp_path, tokenizer):
    """As two ranks have them: the second has the first row once more."""
    rows = [
        SimpleNamespace(branch="general", position=place, token_ids=[place + 5] * 4, prompt_len=2) for place in (1, 0)
    ]
    args = SimpleNamespace(prompts_per_step=4)
    table = CompletionsTable(args, tokenizer, lambda mine: [*mine, *mine[-1:]], lambda: False)
    table.on_rolled_out(rows)
    args = SimpleNamespace(
        output_dir=str(tmp_path), num_completions_to_print=1, log_unique_prompts=False, report_to=[]
    )
    table.on_log(args, SimpleNamespace(global_step=0, is_world_process_zero=True), None, logs={"eval_loss": 1.0})
    wanted = [tokenizer.decode(row.token_ids[:2], skip_special_tokens=True) for row in rows[::-1]]
    assert list(held_out_of(tmp_path)["prompt"]) == wanted and len(set(wanted)) == 2


def test_held_out_completions_are_those_of_each_branchs_latest_evaluation(tmp_path, tokenizer):
    held = {"general": make_prompts("general", 3), "domain": make_prompts("domain", 2)}
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, log_completions=True, eval_dataset=held)
    trainer.evaluate()
    assert list(held_out_of(tmp_path)["branch"]) == ["general"] * 3 + ["domain"] * 2
    first = held_out_of(tmp_path)
    with torch.no_grad():  # other weights at the same step, as where the best model has been loaded
        for weight in trainer.model.parameters():
            weight.add_(torch.randn_like(weight))
    trainer.predict({"domain": make_prompts("other", 3)})
    trainer.evaluate("general")
    second = held_out_of(tmp_path)
    assert list(second["branch"]) == ["domain"] * 2 + ["general"] * 3  # no prediction, and none twice
    for branch, same in (("general", False), ("domain", True)):
        one, two = (table[table["branch"] == branch]["completion"].tolist() for table in (first, second))
        assert (one == two) == same


def test_completions_of_an_evaluation_that_has_failed_are_not_those_of_the_next(tmp_path, tokenizer):
    held = {"general": make_prompts("general", 3), "domain": make_prompts("domain", 2)}
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, log_completions=True, eval_dataset=held)

    def fail(*_):
        raise TeacherError("it is gone")

    trainer.teachers["general"].score, score = fail, trainer.teachers["general"].score
    with pytest.raises(TeacherError):
        trainer.evaluate("general")
    trainer.teachers["general"].score = score
    trainer.evaluate("domain")
    assert list(held_out_of(tmp_path)["branch"]) == ["domain"] * 2
