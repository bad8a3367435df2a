"""`eval_tasks`: tasks of lm-eval on the model in training (camopd/live_tasks.py); with `-m eval` the real lm-eval.

As a script for two processes: tests/test_live_tasks.py FOLDER KIND
"""

import errno
import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_prompts, make_tokenizer
from train_tiny import fsdp_on_cpu
from trainers import lines, make_args, make_trainer
from transformers import EarlyStoppingCallback

from camopd import CaMOPDTrainer
from camopd.errors import CaMOPDError
from camopd.live_tasks import LiveTasks, metric_of
from camopd.signals import RunInterrupted
from camopd.watchdog import current


HELD_OUT = {"general": make_prompts("general", 2)}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "max_steps": 3}
ROWS = 9


class Task:
    """As lm-eval has it: some rows, and metrics of which the first counts."""

    UNSAFE_CODE = False
    eval_docs = [None] * ROWS
    config = types.SimpleNamespace(metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}])

    def __init__(self):
        self.examples = random.Random()

    def set_fewshot_seed(self, seed):
        self.examples = random.Random(seed)

    @staticmethod
    def higher_is_better():
        return {"acc": True, "acc_norm": True, "perplexity": False}


class Perplexity(Task):
    """As lm-eval's lambada, and crows_pairs, whose metrics are all the better the smaller they are."""

    config = types.SimpleNamespace(metric_list=[{"metric": "perplexity"}])


class Unsafe(Task):
    UNSAFE_CODE = True


def lm_eval_in_small():
    """lm-eval's modules by name, and what they were asked; `right` of it says which rows are right in each evaluation."""
    known = {"sums": Task(), "code": Unsafe(), "loss": Perplexity()}
    right = [set(range(ROWS)), {0, 1, 2}, {2, 3}, set()]
    found = types.SimpleNamespace(
        calls=[], penalties=[], examples=[], detector=types.SimpleNamespace(seed=None), right=right, score=float
    )  # fmt: skip

    class TaskManager:
        all_subtasks, all_tasks = list(known), [*known, "many"]

        def load(self, names):
            if names[0].endswith(".yaml"):
                raise ConnectionError("the hub is offline")
            return {"tasks": {name: known[name] for name in names}}

    def evaluate(lm, task_dict, samples, **options):
        random.random(), np.random.rand(), torch.rand(1)
        lm["pretrained"].eval()
        right = found.right[len(found.calls)]
        found.penalties.append(lm["pretrained"].generation_config.repetition_penalty)
        found.calls.append((samples, options))
        found.examples.append([task.examples.random() for task in task_dict["tasks"].values()])
        found.template = lm["chat_template_args"]
        rows = [(name, row) for name, rows in samples.items() for row in rows]
        each = [
            {"doc_id": row, "filter": f, "acc": found.score(row in right), "acc_norm": 9}
            for f in "ab" for _, row in rows
        ]  # fmt: skip
        return {"samples": {"sums": each}}

    modules = {}
    for name, content in {
        "lm_eval": {}, "lm_eval.models": {}, "lm_eval.tasks": {"TaskManager": TaskManager},
        "langdetect": {"DetectorFactory": found.detector},
        "lm_eval.evaluator": {"evaluate": evaluate}, "lm_eval.models.huggingface": {"HFLM": dict},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        module.__dict__.update(content)
        modules[name] = module
    return modules, found


@pytest.fixture
def asked(monkeypatch):
    modules, found = lm_eval_in_small()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def scores(tmp_path):
    return [json.loads(line) for line in (tmp_path / "eval_tasks.jsonl").read_text(encoding="utf-8").splitlines()]


def test_tasks_are_measured_with_each_evaluation_and_say_what_broke(tmp_path, tokenizer, asked):
    trainer = make_trainer(
        tmp_path, tokenizer, eval_dataset=HELD_OUT, eval_tasks="sums", chat_template_kwargs={"enable_thinking": False},
        **EVALUATES | {"max_steps": 2},
    )  # fmt: skip
    trainer.train()
    assert asked.template == {"enable_thinking": False}
    logged = [entry for entry in trainer.state.log_history if "eval_sums/score" in entry]
    found = [(entry["step"], entry["eval_sums/score"], entry["eval_sums/broken"]) for entry in logged]
    assert found == [(0, 1, 0), (1, 3 / 9, 6 / 9), (2, 2 / 9, 7 / 9)]
    assert [(line["step"], sum(line["scores"])) for line in scores(tmp_path)] == [(0, 9), (1, 3), (2, 2)]
    assert len(asked.examples) == 3 and all(
        drawn == asked.examples[0] for drawn in asked.examples
    )  # of few-shot prompts
    drawn, options = asked.calls[0]
    assert drawn == {"sums": list(range(ROWS))} and options["apply_chat_template"] is bool(tokenizer.chat_template)


def test_signal_before_the_tasks_of_an_evaluation_leaves_them_and_saves_the_run(
    tmp_path, tokenizer, asked, monkeypatch
):
    saves = {"save_strategy": "steps", "save_steps": 9, "max_steps": 3, "eval_on_start": False}
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=HELD_OUT, eval_tasks="sums", **EVALUATES | saves)
    add, phases = trainer.tasks.add_to, []
    monkeypatch.setattr(trainer.tasks, "measure", lambda step: phases.append(current().what) or {})

    def hear(found, given):
        if given.state.global_step == 2:
            given.stops.heard = "SIGTERM"
        return add(found, given)

    monkeypatch.setattr(trainer.tasks, "add_to", hear)
    with pytest.raises(RunInterrupted, match=r"SIGTERM: stopped; the weights after step 2 are in .*checkpoint-2"):
        trainer.train()
    assert phases == ["evaluation: sums"]  # of the first step


def test_metric_is_the_first_of_which_more_is_better():
    task, listed = Task(), [{"metric": "perplexity"}, {"metric": "acc"}]
    task.config = types.SimpleNamespace(metric_list=listed)
    assert metric_of(Task()) == metric_of(task) == "acc"
    task.config = types.SimpleNamespace(metric_list=None)
    assert metric_of(task) == "acc" and metric_of(Perplexity()) is None


def test_answers_are_drawn_plainly_and_languages_are_told_by_a_seed(tmp_path, tokenizer, asked):
    """Whatever penalty the model's folder has for chats: it would decide which checkpoint is the best."""
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=HELD_OUT, eval_tasks=["sums"], max_steps=1)
    trainer.model.generation_config.repetition_penalty = 1.3
    trainer.tasks.measure(0)
    assert asked.penalties == [None] and asked.detector.seed == 0
    assert trainer.model.generation_config.repetition_penalty == 1.3


def test_metric_of_all_rows_together_is_none_of_each(tmp_path, tokenizer, asked):
    """As lm-eval's cola has pairs, from which it makes one number in the end."""
    asked.score = lambda right: (1, int(right))
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=HELD_OUT, eval_tasks=["sums"], max_steps=1)
    with pytest.raises(CaMOPDError, match=r"eval_tasks: 'sums' has no score of each row.*'acc'.*Leave it out"):
        trainer.tasks.measure(0)


def test_rows_are_drawn_once_and_for_all(tmp_path, tokenizer, asked):
    made = [make_trainer(tmp_path / name, tokenizer, eval_dataset=HELD_OUT, eval_tasks=["sums"], eval_tasks_items=4)
            for name in "ab"]  # fmt: skip
    for trainer in made:
        trainer.evaluate()
    (first,), (second,) = (call[0].values() for call in asked.calls)
    assert first == second == sorted(set(first)) and len(first) == 4


def test_training_is_the_same_with_and_without_tasks(tmp_path, tokenizer, asked):
    losses = []
    for name, extra in (("with", {"eval_tasks": ["sums"]}), ("without", {})):
        asked.right = [set()] * 9
        make_trainer(tmp_path / name, tokenizer, eval_dataset=HELD_OUT, **EVALUATES, **extra).train()
        losses.append([line["loss"] for line in lines(tmp_path / name)])
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_resumed_run_compares_with_its_first_evaluation(tmp_path, tokenizer, asked):
    saves = {"save_strategy": "steps", "save_steps": 1, "eval_tasks": ["sums"], "eval_dataset": HELD_OUT}
    make_trainer(tmp_path, tokenizer, **EVALUATES | {"max_steps": 1}, **saves).train()
    with open(tmp_path / "eval_tasks.jsonl", "a", encoding="utf-8") as file:  # of a step after the checkpoint
        file.write(json.dumps({**scores(tmp_path)[0], "step": 5, "scores": [0.0] * ROWS}) + "\n")
    trainer = make_trainer(tmp_path, tokenizer, **EVALUATES | {"max_steps": 2, "eval_on_start": False}, **saves)
    trainer.train(resume_from_checkpoint=True)
    assert [line["step"] for line in scores(tmp_path)] == [0, 1, 2]
    assert (
        trainer.state.log_history[-1].get("eval_sums/broken", trainer.state.log_history[-2].get("eval_sums/broken"))
        == 7 / 9
    )


@pytest.mark.parametrize(
    "strange",
    [
        '{"step": 0, "task": "sums"}',
        '{"step": "x", "task": "sums"}',
        '{"step": 0, "task": ["sums"], "rows": 3}',
        '{"step": 0, "task": "sums", "rows": [0, 1, 2, 3, 4, 5, 6, 7, 8], "scores": "000000000"}',
        '{"step": 0, "task": "sums", "rows": [0, 1, 2, 3, 4, 5, 6, 7, 8], "scores": [0]}',
        "[1]",
    ],
)
def test_line_that_is_no_evaluation_does_not_keep_a_run_from_going_on(strange, tmp_path, tokenizer, asked):
    saves = {"save_strategy": "steps", "save_steps": 1, "eval_tasks": ["sums"], "eval_dataset": HELD_OUT}
    make_trainer(tmp_path, tokenizer, **EVALUATES | {"max_steps": 1}, **saves).train()
    path = tmp_path / "eval_tasks.jsonl"
    path.write_text(f"{strange}\n{path.read_text()}")
    trainer = make_trainer(tmp_path, tokenizer, **EVALUATES | {"max_steps": 2, "eval_on_start": False}, **saves)
    trainer.train(resume_from_checkpoint=True)
    logged = [entry["eval_sums/broken"] for entry in trainer.state.log_history if "eval_sums/broken" in entry]
    assert logged[-1] == 7 / 9  # against the first that is one


def test_full_disk_leaves_no_half_line_of_a_task_and_an_error_that_names_the_file(
    tmp_path, tokenizer, asked, monkeypatch
):
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=HELD_OUT, eval_tasks="sums", **EVALUATES)
    tasks = next(each for each in trainer.callback_handler.callbacks if isinstance(each, LiveTasks))
    tasks.on_train_begin(trainer.args, trainer.state, None)
    tasks.measure(0)
    before = (tmp_path / "eval_tasks.jsonl").read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        CaMOPDError,
        match=r"eval_tasks.jsonl' cannot be written: No space left.* is full: free some, and go on from the",
    ):
        tasks.measure(1)
    assert (tmp_path / "eval_tasks.jsonl").read_bytes() == before


def test_measure_after_the_best_model_was_loaded_is_of_its_step(tmp_path, tokenizer, asked):
    asked.right = [set(), {0, 1}, {0}, {0}, {0, 1}]
    trainer = make_trainer(
        tmp_path, tokenizer, eval_dataset=HELD_OUT, eval_tasks=["sums"], metric_for_best_model="eval_sums/score",
        load_best_model_at_end=True, save_strategy="steps", save_steps=1, **EVALUATES,
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    assert trainer.state.best_global_step == 1
    for name in ("eval_tasks", "held_out"):
        found = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in found if "loaded" not in line] == [0, 1, 2, 3, 1]


def test_early_stopping_counts_the_scores_of_a_task(tmp_path, tokenizer, asked):
    asked.right = [{0}, {0, 1}, {0}, {0}, {0, 1, 2}, set()]
    trainer = make_trainer(
        tmp_path, tokenizer, eval_dataset=HELD_OUT, eval_tasks=["sums"], metric_for_best_model="sums/score",
        callbacks=[EarlyStoppingCallback(2)], **{**EVALUATES, "max_steps": 5},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3  # at step 1 two rows are right, and then twice one


def test_best_model_is_that_with_the_greater_score_or_that_broke_less(tmp_path, tokenizer, asked):
    saves = {"save_strategy": "steps", "save_steps": 1, "eval_tasks": ["sums"], "load_best_model_at_end": True}
    for metric, greater in (("eval_sums/score", True), ("sums/broken", False)):
        args = make_args(tmp_path, metric_for_best_model=metric, eval_tasks="sums")
        assert args.greater_is_better is greater
        asked.calls.clear()
        asked.right = [{0}, {0, 1}, {0, 1, 2}, {5}]
        trainer = make_trainer(tmp_path / str(greater), tokenizer, eval_dataset=HELD_OUT, metric_for_best_model=metric,
                               **EVALUATES, **saves)  # fmt: skip
        trainer.train()
        assert trainer.state.best_global_step == (2 if greater else 1)
    with pytest.raises(ValueError, match=r"Did you mean 'eval_sums/score'\?"):
        make_args(tmp_path, metric_for_best_model="eval_sums_score", eval_tasks="sums")
    with pytest.raises(ValueError, match=r"would keep the worst"):
        make_args(tmp_path, metric_for_best_model="eval_sums/broken", eval_tasks="sums", greater_is_better=True)


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (["sum"], r"'sum' is not a task of lm-eval\. Did you mean 'sums'\?"),
        (["many"], "'many' is a group of tasks"),
        (["loss"], "'loss' has no metric of which a greater value is better"),
        (["code"], r"'code' runs code of the model here\. `camopd eval` runs it in a cage"),
        (["my/own.yaml"], r"'my/own.yaml' cannot be loaded \(ConnectionError: the hub is offline\)"),
    ],
)
def test_task_that_cannot_be_measured_is_refused_before_the_first_step(tasks, said, tmp_path, tokenizer, asked):
    with pytest.raises(ValueError, match=said):
        make_trainer(tmp_path, tokenizer, eval_dataset=HELD_OUT, eval_tasks=tasks)


def test_tasks_need_held_out_prompts_and_names(tmp_path, tokenizer, asked):
    with pytest.raises(ValueError, match=r"eval_tasks=\['sums'\] are measured with the held-out prompts"):
        make_trainer(tmp_path, tokenizer, eval_tasks="sums")
    for wrong in (3, [3], {"a": 1}, ""):
        with pytest.raises(ValueError, match="eval_tasks must be names"):
            make_args(tmp_path, eval_tasks=wrong)


def test_missing_lm_eval_is_named_with_the_line_that_installs_it(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"lm-eval, which is not here .*`pip install -e '\.\[eval\]'` in a clone"):
        make_trainer(tmp_path, tokenizer, eval_dataset=HELD_OUT, eval_tasks=["ifeval"])
    make_trainer(tmp_path, tokenizer, eval_dataset=HELD_OUT).evaluate()  # which needs none of it


# --- two processes -----------------------------------------------------------------------------------------------------


def main(folder: Path, kind: str) -> None:
    """On each of two ranks, of which the second finds all rows wrong: what it logs of a run, and what it meets."""
    rank, found = int(os.environ["RANK"]), {}
    modules, asked = lm_eval_in_small()
    sys.modules.update(modules)
    if rank:
        asked.right = [set()] * 4

    def run(name, **extra):
        args = make_args(folder / name, **EVALUATES, **extra)
        if kind == "sharded":
            fsdp_on_cpu()
        trainer = CaMOPDTrainer(
            model=make_model(1), teachers={"general": make_model(2), "domain": make_model(1)}, args=args,
            train_dataset={branch: make_prompts(branch) for branch in ("general", "domain")}, eval_dataset=HELD_OUT,
            processing_class=make_tokenizer(),
        )  # fmt: skip
        try:
            trainer.train()
        finally:
            found[name] = [e for e in trainer.state.log_history if "eval_sums/score" in e]

    try:
        run("with", eval_tasks="sums")
        run("without")
        asked.calls.clear()
        asked.right = [set(range(ROWS))] * (1 if rank else 4)  # the second rank fails in the second evaluation
        run("failing", eval_tasks="sums")
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(found))


def on_two_processes(folder, kind, *launcher):
    tests = Path(__file__).parent
    environment = {
        **os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    words = [*launcher, __file__, str(folder), kind]
    run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_go_by_what_the_first_has_measured(tmp_path, python):
    """Each has the whole model and asks it all rows. What one meets ends all, and none waits for ever."""
    launcher = [python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    first, second = on_two_processes(tmp_path, "whole", *launcher)
    assert [(e["step"], e["eval_sums/score"], e["eval_sums/broken"]) for e in first["with"]] == [
        (0, 1, 0), (1, 3 / 9, 6 / 9), (2, 2 / 9, 7 / 9), (3, 0, 1),
    ]  # fmt: skip
    assert second["with"] == first["with"] and not first["without"]
    assert [line["step"] for line in scores(tmp_path / "with")] == [0, 1, 2, 3]
    assert [line["loss"] for line in lines(tmp_path / "with")] == [
        line["loss"] for line in lines(tmp_path / "without")
    ]
    assert second["error"].startswith("IndexError: ") and first["error"].startswith("OtherRankError: list index")
    assert len(first["failing"]) == len(second["failing"]) == 1


@pytest.mark.slow
def test_shards_of_a_model_are_refused_on_each_process_before_the_first_step(tmp_path, python):
    config = Path(__file__).parents[1] / "configs" / "accelerate" / "fsdp2.yaml"
    found = on_two_processes(
        tmp_path, "sharded", python, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes",
        "2", "--main_process_port", "0", "--mixed_precision", "no",
    )  # fmt: skip
    for each in found:
        assert each["error"].startswith(
            "ValueError: eval_tasks=['sums'] need the whole model on each process, and FSDP"
        )
        assert each["error"].endswith("Leave them out, and run `camopd eval` on checkpoints.")
    assert not (tmp_path / "with" / "metrics.jsonl").exists()


# --- with the real lm-eval ---------------------------------------------------------------------------------------------


@pytest.mark.eval
def test_choices_are_those_that_the_model_finds_likelier(tmp_path, tokenizer):
    """Against sums of log-probs of the model itself, and with the same training as without."""
    words = ["cat", "dog", "sun", "tree", "house", "red"]
    docs = [{"q": f"{a} {b}", "choices": [f" {c}" for c in words], "gold": n % 6} for n, (a, b) in
            enumerate((a, b) for a in words for b in words[:3])]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    task = tmp_path / "pets.yaml"
    task.write_text(
        f"task: pets\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{gold}}'\n"
        "target_delimiter: ''\nnum_fewshot: 0\nmetric_list: [{metric: acc}]\n", encoding="utf-8",
    )  # fmt: skip
    losses = []
    for name, extra in (("with", {"eval_tasks": [str(task)], "eval_tasks_items": 12}), ("without", {})):
        trainer = make_trainer(tmp_path / name, tokenizer, eval_dataset=HELD_OUT, **EVALUATES, **extra)
        trainer.train()
        losses.append([line["loss"] for line in lines(tmp_path / name)])
    assert losses[0] == losses[1]
    first, *_, last = scores(tmp_path / "with")
    assert len(first["rows"]) == 12 and (first["step"], last["step"]) == (0, 3)
    model = make_model(1)
    for row, score in zip(first["rows"], first["scores"], strict=True):
        sums = []
        for choice in docs[row]["choices"]:
            context = tokenizer(docs[row]["q"], add_special_tokens=False)["input_ids"]
            ids = tokenizer(docs[row]["q"] + choice, add_special_tokens=False)["input_ids"]
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(logps[at - 1, ids[at]].item() for at in range(len(context), len(ids))))
        assert score == float(max(range(6), key=sums.__getitem__) == docs[row]["gold"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
