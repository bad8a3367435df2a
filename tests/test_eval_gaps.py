"""The task without labels (camopd/eval/gaps.py)."""

import json

import pytest
from conftest import make_prompts
from eval_items import items
from steps import FakeSampler, use_sampler
from trainers import make_trainer

from camopd import cli
from camopd.eval import gaps, page
from camopd.eval.compare import compare
from camopd.eval.tasks import TASKS


def line(step, values, branch="general", of="a", categories=None):
    found = {"step": step, "branch": branch, "kl": 0.0, "kl_by_prompt": values, "of": of}
    return found | ({"category_by_prompt": categories} if categories else {})


def save(folder, *lines):
    (folder / "held_out.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    return folder


MATHS = ["math"] * 20 + ["chat"] * 20
BEFORE = [0.4] * 20 + [0.2, 0.4] * 10
AFTER = [0.1] * 20 + [0.3, 0.3] * 10


def test_gaps_are_those_of_each_category_and_of_all(tmp_path):
    folder = save(
        tmp_path,
        line(0, BEFORE, categories=MATHS),
        line(4, BEFORE, categories=MATHS),
        line(8, AFTER, categories=MATHS),
    )
    rows = gaps.of_run(folder)
    assert [(row.branch, row.category, row.prompts, row.steps) for row in rows] == [
        ("general", "all", 40, (0, 8)), ("general", "chat", 20, (0, 8)), ("general", "math", 20, (0, 8)),
    ]  # fmt: skip
    whole, chat, math = rows
    assert (math.before, math.after) == pytest.approx((0.4, 0.1))
    assert (math.gone.value, math.gone.low, math.gone.high) == pytest.approx(
        (0.75, 0.75, 0.75)
    )  # the same for every prompt
    assert chat.change.value == pytest.approx(0) and chat.change.low < 0 < chat.change.high
    assert whole.gone.value == pytest.approx(1 - 0.2 / 0.35) and whole.gone.low < whole.gone.value < whole.gone.high


def test_category_may_be_called_all(tmp_path):
    names = ["all"] * 20 + ["chat"] * 20
    rows = gaps.of_run(save(tmp_path, line(0, BEFORE, categories=names), line(8, AFTER, categories=names)))
    assert [(row.category, row.prompts) for row in rows] == [("all", 40), ("all", 20), ("chat", 20)]


def test_gaps_are_those_of_the_model_that_was_loaded_at_the_end(tmp_path):
    later = [0.9] * 40
    (row,) = gaps.of_run(save(tmp_path, line(0, BEFORE), line(4, AFTER), line(8, later), {"step": 4, "loaded": True}))
    assert row.steps == (0, 4) and row.after == pytest.approx(0.2)


def test_prompts_without_a_completion_are_left_out_of_both(tmp_path):
    (row,) = gaps.of_run(save(tmp_path, line(0, [None, 0.2, 0.4, 0.6]), line(1, [0.1, None, 0.2, 0.4])))
    assert (row.prompts, row.before, row.after) == (2, pytest.approx(0.5), pytest.approx(0.3))


def test_later_evaluation_of_other_prompts_is_not_taken(tmp_path):
    with pytest.raises(
        ValueError, match=r"no evaluation before the first step with a later one of the same prompts\. Train with"
    ):
        gaps.of_run(
            save(tmp_path, line(0, [0.1, 0.2]), line(1, [0.1, 0.2], of="b"), line(2, [0.1, 0.2], branch="domain"))
        )


def test_branch_that_begins_at_its_teacher_has_no_share(tmp_path):
    (row,) = gaps.of_run(save(tmp_path, line(0, [0.0, 0.0, 0.0], "domain"), line(1, [0.01, 0.02, 0.03], "domain")))
    assert gaps.table_of([row])[1][-1] == "no gap before" and row.as_json()["gone"] == [None, None, None]
    assert row.change.value == pytest.approx(0.02)


def test_gaps_stand_on_the_page_alone_and_beside_tasks(tmp_path, capsys):
    run = save(tmp_path, line(0, BEFORE, categories=MATHS), line(8, AFTER, categories=MATHS))
    cli.main(["eval", str(run), "--tasks", "gaps", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "| general | math | 20 | 0.400 | 0.100 | -0.300 [-0.300, -0.300] | 75% [75%, 75%] |" in said
    assert "nats per token, steps 0 and 8." in said
    kept = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    assert kept["gaps"][2]["gone"] == pytest.approx([0.75] * 3) and kept["tasks"] == []
    rows = compare([TASKS["ifeval"]], {"start": {"ifeval": items([0, 1])}})
    short = page.write(rows, (), {}, tmp_path / "out", gaps=gaps.of_run(run))
    assert short[0] == page.SCORES and len(short) == 5  # two tables with what they are, and a note


def test_gaps_without_a_run_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--tasks", "gaps"])
    assert "the task 'gaps' is of a run: name its output_dir or its config" in capsys.readouterr().err


def test_evaluation_of_a_trainer_writes_the_category_of_each_prompt(tmp_path, tokenizer):
    categories = ["math", "chat", "math"]
    prompts = make_prompts("general", 3).add_column("category", categories)
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset={"general": prompts, "domain": make_prompts("domain", 2)})
    use_sampler(trainer, FakeSampler())
    trainer.evaluate("general")
    record = trainer.held_out_results.record()
    assert record["category_by_prompt"] == categories and len(record["kl_by_prompt"]) == 3
    trainer.evaluate("domain")
    assert "category_by_prompt" not in trainer.held_out_results.record()
