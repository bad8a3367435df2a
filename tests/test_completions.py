"""The table of completions that a run logs."""

import pandas as pd
from conftest import make_prompts
from trainers import make_trainer


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
