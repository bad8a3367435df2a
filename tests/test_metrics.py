"""Metrics of a branch from the summaries of its samples, against numbers worked by hand."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import make_prompts
from steps import FakeSampler, use_sampler
from trainers import lines, make_trainer

from camopd import metrics
from camopd.samples import Sample, SampleSummary


def row(position: int, length: int, gaps: list[float], teacher_logp: float = -1.0, **columns) -> SampleSummary:
    mask, zeros = torch.ones(len(gaps), dtype=torch.bool), torch.zeros(len(gaps))
    sample = Sample(
        "b", position, [0] * (1 + len(gaps)), 1, mask, length, False, teacher_logps=zeros + teacher_logp, entropy=zeros,
        gaps=torch.tensor(gaps), **columns,
    )  # fmt: skip
    return metrics.summary(sample, score=sum(map(abs, gaps)) / len(gaps), rank=0)


def of_rows(rows, kept, score="absolute"):
    found = metrics.of_branch("b", rows, set(kept), False, score)
    return {name.removeprefix("selection/b/"): value for name, value in found.items()}


def test_overlap_with_selecting_by_length():
    rows = [row(position, length, [1.0]) for position, length in enumerate((5, 9, 7, 9))]
    assert of_rows(rows, {0, 1})["jaccard_length"] == pytest.approx(1 / 3)  # the longest two are 1 and 3
    assert of_rows(rows, {1, 3})["jaccard_length"] == 1
    assert of_rows(rows, {0, 2})["jaccard_length"] == 0
    assert math.isnan(of_rows(rows, {3})["jaccard_length"])  # which of two equals is the longest one?
    assert math.isnan(of_rows(rows, {0, 1, 2, 3})["jaccard_length"])


def test_trained_tokens_are_those_of_the_prefix_of_kept_samples():
    rows = [row(0, 1000, [1.0] * 4), row(1, 4, [1.0] * 3), row(2, 900, [1.0] * 4)]
    assert of_rows(rows, {0, 1})["tokens"] == 7


def test_share_of_the_score_on_the_top_tokens():
    # 200 tokens, 2 of them are 1 %. Score 0.5 + 0.5: the large two hold 40/100 and 10/100 of it.
    rows = [row(0, 100, [-40.0] + [10 / 99] * 99), row(1, 100, [10.0] + [40 / 99] * 99)]
    assert of_rows(rows, {0})["top1_share"] == pytest.approx(0.5)
    # Only 10 and 40/99 count where gaps below 0 do not.
    positive = 10 + (10 + 40) - 10 / 99 * 0
    top = 10 + 40 / 99
    assert of_rows(rows, {0}, "positive")["top1_share"] == pytest.approx(top / (10 + 10 + 40))
    assert positive == 60
    # A token of a short sample is a larger part of that sample's score: 1/50 of it, and 0.5 of the 50 tokens are 1 %.
    assert of_rows([row(0, 50, [1.0] * 50)], {0})["top1_share"] == pytest.approx(0.01)
    # Long samples are looked at in steps: 1024 tokens, every fourth.
    assert of_rows([row(0, 1024, [1.0, 0.0, 0.0, 0.0] * 256)], {0})["top1_share"] == pytest.approx(0.01)
    assert math.isnan(of_rows([row(0, 2, [0.0, 0.0])], {0})["top1_share"])


def test_rank_correlation_of_score_and_teacher_perplexity():
    rows = [row(position, 2, [value, value], teacher_logp=-value) for position, value in enumerate((1.0, 3.0, 2.0))]
    assert of_rows(rows, {1})["score_perplexity_spearman"] == pytest.approx(1)
    rows = [row(position, 2, [value, value], teacher_logp=value - 9) for position, value in enumerate((1.0, 3.0, 2.0))]
    assert of_rows(rows, {1})["score_perplexity_spearman"] == pytest.approx(-1)


def test_kept_share_by_category(tmp_path, tokenizer):
    rows = [row(0, 1, [1.0], category="maths"), row(1, 1, [2.0], category="maths"), row(2, 1, [3.0], category=None)]
    found = of_rows(rows, {1, 2})
    assert {name: value for name, value in found.items() if name.startswith("category")} == {"category/maths": 0.5}
    datasets = {branch: make_prompts(branch) for branch in ("general", "domain")}
    kinds = ["a", "b"] * 6
    datasets["general"] = datasets["general"].add_column("category", kinds[: len(datasets["general"])])
    make_trainer(tmp_path, tokenizer, max_steps=1, prompts_per_step=8, train_dataset=datasets).train()
    (line,) = lines(tmp_path)
    shares = [line[f"selection/general/category/{kind}"] for kind in "ab"]
    assert min(shares) <= line["selection/general/kept_fraction"] <= max(shares)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["selection/general/kept"] < 8


def test_metrics_are_all_written_and_documented(tmp_path, tokenizer):
    datasets = {branch: make_prompts(branch) for branch in ("general", "domain")}
    datasets["general"] = datasets["general"].add_column("category", ["maths"] * len(datasets["general"]))
    trainer = make_trainer(tmp_path, tokenizer, max_steps=4, train_dataset=datasets)
    use_sampler(trainer, FakeSampler())
    trainer.train()
    written = {
        re.sub(r"(?<=[/_])(general|domain)(?=[/_]|$)", "<branch>", name).replace("/maths", "/<category>")
        for line in lines(tmp_path)
        for name in line
    }
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    table = text.split("## metrics.jsonl")[1].split("\n## ")[0]
    documented = {row.split("`")[1] for row in table.splitlines() if row.startswith("| `")}
    # With rollout_servers alone; tests/test_ahead.py reads them.
    assert written == documented - {"time/rollout/writing", "time/rollout/hidden"}
