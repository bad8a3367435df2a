"""Held-out prompts: each counted once, with the gaps of plain log-probs, and nothing of training changed."""

import json

import pytest
import torch
from conftest import LOGP, make_model, make_prompts, make_tokenizer
from datasets import Dataset
from fake_rollouts import FakeRollouts
from steps import FakeSampler, check_evaluations, evaluations, use_sampler
from trainers import lines, make_trainer
from trl import LogCompletionsCallback

from camopd.errors import CaMOPDError, GuardError


def test_evaluation_on_one_process_counts_every_held_out_prompt_once(tmp_path):
    check_evaluations(evaluations(str(tmp_path), 2))


def test_evaluation_reports_exact_gaps_per_branch(tmp_path, tokenizer):
    heldout = {branch: make_prompts(branch, 5) for branch in ("general", "domain")}
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=heldout, per_device_eval_batch_size=2)
    use_sampler(trainer, FakeSampler())
    found = trainer.evaluate()
    student, teacher = make_model(1), make_model(2)
    means = []
    for row in heldout["general"]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion, _ = FakeSampler.complete(tuple(prompt))
        if completion:
            logits = [
                model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1) for model in (teacher, student)
            ]
            gaps = [(logits[0] - logits[1])[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion)]
            means.append([sum(f(gap) for gap in gaps) / len(gaps) for f in (float, abs, lambda gap: max(gap, 0))])
    expected = torch.tensor(means, dtype=torch.float64)
    assert found["eval_general_prompts"] == len(means)
    assert found["eval_general_gap"] == pytest.approx(expected[:, 0].mean().item(), abs=LOGP)
    assert found["eval_general_kl"] == pytest.approx(-expected[:, 0].mean().item(), abs=LOGP)
    assert found["eval_general_gap_abs"] == pytest.approx(expected[:, 1].mean().item(), abs=LOGP)
    assert found["eval_general_gap_positive"] == pytest.approx(expected[:, 2].mean().item(), abs=LOGP)
    assert found["eval_general_kl_se"] == pytest.approx((expected[:, 0].std() / len(means) ** 0.5).item(), abs=LOGP)
    assert found["eval_domain_gap_abs"] == 0  # the student is the domain teacher


def test_evaluation_takes_other_prompts_than_those_of_the_trainer_in_every_form(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset={"general": make_prompts("general", 4)})
    general, domain = make_prompts("general", 3), make_prompts("domain", 2)
    expected = trainer.evaluate({"general": general})
    assert expected["eval_general_prompts"] == 3
    assert expected["eval_general_gap_abs"] > 0
    both = trainer.evaluate({"general": general.to_iterable_dataset(), "domain": domain})
    assert both["eval_general_prompts"], both["eval_domain_prompts"] == (3, 2)
    assert both["eval_domain_gap_abs"] == 0  # the student is the domain teacher

    def marked(*parts):
        rows = [{**row, "branch": branch} for branch, prompts in parts for row in prompts]
        return Dataset.from_list(rows)

    with_column = trainer.evaluate(marked(("domain", domain), ("general", general)))
    plain = trainer.evaluate(marked(("general", general)))
    predicted = trainer.predict({"general": general})
    assert predicted.predictions is None
    assert trainer.predict(marked(("general", general))).metrics["test_prompts"] == 3
    for name in ("prompts", "kl", "kl_se", "gap_abs", "loss"):
        value = expected[f"eval_general_{name}"]
        assert with_column[f"eval_general_{name}"] == plain[f"eval_{name}"] == value
        assert predicted.metrics[f"test_general_{name}"] == value
    assert trainer.evaluate("general")["eval_prompts"] == trainer.evaluate()["eval_general_prompts"] == 4
    assert trainer.evaluate(trainer.eval_dataset["general"])["eval_prompts"] == 4
    for prompts in (general, general.to_iterable_dataset()):
        with pytest.raises(
            TypeError, match=r"eval_dataset must map branches.*\{'general': dataset\}.* column 'branch'"
        ):
            trainer.evaluate(prompts)
        with pytest.raises(TypeError, match="test_dataset must map branches"):
            trainer.predict(prompts)
    with pytest.raises(ValueError, match=r"eval_dataset='genral' names none of .*\['general'\]"):
        trainer.evaluate("genral")
    trainer.args.dataloader_drop_last, trainer.args.per_device_eval_batch_size = True, 2
    with pytest.raises(CaMOPDError, match=r"2 of 3 held-out prompts were measured.*dataloader_drop_last=False"):
        trainer.evaluate({"general": general})


def test_prompts_of_the_only_branch_need_no_name(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, schedule="general", teachers={"general": make_model(2)}, eval_dataset=make_prompts("g", 3),
        train_dataset={"general": make_prompts("general")},
    )  # fmt: skip
    assert trainer.evaluate()["eval_general_prompts"] == 3
    assert trainer.evaluate(make_prompts("g", 2).to_iterable_dataset())["eval_prompts"] == 2


def test_log_completions_callback_of_trl_takes_held_out_prompts(tmp_path, tokenizer):
    heldout = {"general": make_prompts("general", 4), "domain": make_prompts("domain", 1).to_iterable_dataset()}
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=heldout, max_steps=1)
    callbacks = [LogCompletionsCallback(trainer, num_prompts=number, freq=1) for number in (None, 3)]
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    first, *others = heldout["general"]["prompt"]
    expected = [first, make_prompts("domain", 1)[0]["prompt"], *others]
    assert [[prompt for _, prompt, _ in callback.table] for callback in callbacks] == [expected, expected[:3]]
    with pytest.raises(KeyError, match="completion"):
        trainer.eval_dataset["completion"]


def test_evaluation_changes_nothing_about_training(tmp_path, tokenizer):
    heldout = {branch: make_prompts(branch, 5) for branch in ("general", "domain")}
    losses = []
    for name, extra in (("with", {"eval_strategy": "steps", "eval_steps": 1}), ("without", {})):
        make_trainer(tmp_path / name, tokenizer, eval_dataset=heldout, **extra).train()
        losses.append([line["loss"] for line in lines(tmp_path / name)])
    assert losses[0] == losses[1]


def test_evaluation_measures_nothing_into_a_step(tmp_path, tokenizer):
    """FSDP2 takes a step of zeros on resume, before any step of the run: with nothing to add to, also after `evaluate`."""
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset={"general": make_prompts("general", 2)}, max_steps=2)
    trainer.evaluate()
    optimizer = trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    assert trainer.step is None
    trainer.train()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_evaluation_whose_completions_another_model_has_drawn_stops(tmp_path, tokenizer):
    """A server that takes the weights and does not load them would decide which checkpoint is the best."""
    server = FakeRollouts(make_model(9), tokenizer)
    server.reload = lambda folder: (200, json.dumps({"results": [None]}))
    trainer = make_trainer(
        tmp_path, tokenizer, rollout_servers=[server.url], eval_dataset={"general": make_prompts("general", 3)}
    )
    try:
        with pytest.raises(GuardError, match=r"^evaluation: .* nats per token apart.*guards\['log_ratio'\]=0\.01"):
            trainer.evaluate()
        trainer.args.guards["log_ratio"] = None
        trainer.evaluate()
        rows = trainer.held_out_results.rows
        assert sum(row.log_ratio for row in rows) > 0.1 * sum(row.num_ratios for row in rows)  # as it was all along
    finally:
        trainer.run.sampler.close()
        server.close()


@pytest.mark.parametrize("form", ["text", "messages"])
@pytest.mark.parametrize("shared", [0, 2])
def test_held_out_prompts_that_are_trained_on_are_warned_of(shared, form, tmp_path, tokenizer, caplog):
    prompts = make_prompts("general", 8)
    held = prompts.select([*range(shared), *range(6, 8)])
    if form == "messages":  # of which another row has a key that Arrow fills in
        rows = [[{"role": "user", "content": text}] for text in prompts["prompt"]]
        held = Dataset.from_list([{"prompt": rows[place]} for place in (*range(shared), 6, 7)])
        rows[5] = [{"role": "user", "content": "more", "name": "x"}]
        more = {"chat_template_kwargs": {"day": "2026-01-01"}}
        held, prompts = (Dataset.from_list([{**row, **more} for row in each])
                         for each in (held, [{"prompt": row} for row in rows]))  # fmt: skip
    with caplog.at_level("WARNING", logger="camopd"):
        make_trainer(
            tmp_path, tokenizer, train_dataset={"general": prompts.select(range(6)), "domain": prompts},
            eval_dataset={"general": held},
        )  # fmt: skip
    said = [record.getMessage() for record in caplog.records if "held-out prompts" in record.msg]
    assert len(said) == shared // 2
    assert all(text.startswith("2 of 4 held-out prompts of branch 'general' are among its training") for text in said)


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_prompts_in_a_format_of_tensors_or_tables_are_the_texts_that_they_are(kind, tmp_path):
    def messages(branch, count):
        rows = [
            {"prompt": [{"role": "user", "content": f"{branch} {place}"}], "category": place} for place in range(count)
        ]
        return Dataset.from_list(rows)

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    plain = {branch: messages(branch, 5) for branch in ("general", "domain")}
    runs = []
    for name, prompts in (
        ("plain", plain),
        (kind, {branch: each.with_format(kind) for branch, each in plain.items()}),
    ):
        trainer = make_trainer(
            tmp_path / name,
            tokenizer,
            train_dataset=prompts,
            eval_dataset={"general": prompts["general"]},
            max_steps=1,
        )
        trainer.train()
        runs.append((trainer.evaluate(), [sample.token_ids for sample in trainer.step.samples]))
        marked = prompts["general"].add_column("branch", ["general"] * 5)
        runs[-1] += (trainer.evaluate(marked.with_format(kind))["eval_kl"],)
    (found, samples, kl), (other, other_samples, other_kl) = runs
    assert kl == other_kl == found["eval_general_kl"]
    assert found["eval_general_prompts"] == 5 and samples == other_samples
    assert {name: value for name, value in found.items() if "kl" in name} == {
        name: value for name, value in other.items() if "kl" in name
    }


def test_held_out_prompts_that_a_transform_makes_are_measured(tmp_path, tokenizer):
    texts = Dataset.from_dict({"prompt": ["a", "b", "c"], "question": ["1", "2", "3"]})

    def ask(rows):
        return {"prompt": [f"what is {text}?" for text in rows["question"]]}

    made = texts.with_transform(ask)
    plain = Dataset.from_dict({"prompt": [f"what is {text}?" for text in "123"]})
    found, drawn = [], []
    for name, prompts in (("made", made), ("plain", plain)):
        train = {branch: make_prompts(branch) for branch in ("general", "domain")} | {"general": prompts}
        trainer = make_trainer(
            tmp_path / name, tokenizer, train_dataset=train, eval_dataset={"general": prompts}, max_steps=1,
            eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        trainer.train()
        found.append([entry["eval_general_kl"] for entry in trainer.state.log_history if "eval_general_kl" in entry])
        drawn.append([each.token_ids for each in trainer.step.samples])
    assert len(found[0]) == 1 and found[0] == found[1] and drawn[0] == drawn[1]
