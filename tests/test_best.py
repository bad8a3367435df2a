"""Which checkpoint is kept: against what transformers does with a name it does not know."""

import itertools
import json
import logging

import pytest
from conftest import make_model, make_prompts, make_summary
from safetensors.torch import load_file
from trainers import make_args, make_trainer
from transformers import EarlyStoppingCallback

from camopd import metrics
from camopd.best import GREATER_IS_BETTER, NO_MEASURE, check_metric, history_of_model, keep_patience
from camopd.measured import lines_of


EVALUATES = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def test_metrics_of_evaluation_have_a_direction_or_say_nothing():
    found = metrics.of_evaluation([make_summary(num_tokens=2, gap=-1.0, gap_abs=1.0)])
    assert set(found) | {"loss"} == set(GREATER_IS_BETTER) | {"prompts", "kl_se"}
    assert {"prompts", "kl_se"} <= set(NO_MEASURE)


@pytest.mark.parametrize("prefix", ["", "eval_"])
@pytest.mark.parametrize(("name", "greater"), GREATER_IS_BETTER.items())
def test_model_nearer_to_its_teacher_is_the_better_one(name, greater, prefix, tmp_path):
    """Two students, by hand: one is 1 nat a token from its teacher, with one sign of the gap or the other, one 0.1."""
    args = make_args(tmp_path, metric_for_best_model=f"{prefix}general_{name}")
    assert args.greater_is_better is greater
    far, near = (
        metrics.of_evaluation([make_summary(num_tokens=3, gap=-3 * nats, gap_abs=3 * nats, gap_positive=3 * nats)] * 2)
        for nats in (1.0, 0.1)
    )
    key = "kl" if name == "loss" else name
    assert (near[key] > far[key]) is greater


@pytest.mark.parametrize(
    "name", [f"general_{name}" for name in NO_MEASURE] + ["eval_general_kll", "eval_legal_kl", "loss"]
)
def test_metric_of_another_name_is_refused_with_the_nearest(name, tmp_path):
    with pytest.raises(ValueError) as error:
        make_args(tmp_path, metric_for_best_model=name)
    text = str(error.value)
    assert repr(name) in text and "Did you mean 'eval_" in text and "eval_domain_gap_positive" in text
    if name == "eval_general_kll":
        assert "Did you mean 'eval_general_kl'?" in text


def test_branches_may_have_underscores_and_names_of_metrics(tmp_path):
    args = make_args(tmp_path, schedule="my_kl:1,my:1", scale=1.0, score="absolute", mass_target=0.8, selection=True,
                     metric_for_best_model="my_kl_gap")  # fmt: skip
    assert args.greater_is_better is True


def test_greater_is_better_is_refused_where_wrong_and_may_be_said_where_right(tmp_path):
    with pytest.raises(ValueError, match=r"greater_is_better=True.*eval_general_kl.*smaller is better"):
        make_args(tmp_path, metric_for_best_model="eval_general_kl", greater_is_better=True)
    with pytest.raises(ValueError, match=r"greater_is_better=False.*general_gap.*greater is better"):
        make_args(tmp_path, metric_for_best_model="general_gap", greater_is_better=False)
    with pytest.raises(ValueError, match="without metric_for_best_model"):
        make_args(tmp_path, greater_is_better=False)
    assert make_args(tmp_path, metric_for_best_model="general_kl", greater_is_better=False).greater_is_better is False


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"load_best_model_at_end": True, **EVALUATES}, "load_best_model_at_end=True"),
        ({**EVALUATES, "save_strategy": "best"}, "save_strategy='best'"),
        ({**EVALUATES, "lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type='reduce_lr_on_plateau'"),
        ({**EVALUATES, "lr_scheduler_type": "greedy"}, "lr_scheduler_type='greedy'"),
    ],
)
def test_settings_that_need_a_metric_ask_for_one(settings, named, tmp_path):
    with pytest.raises(ValueError) as error:
        make_args(tmp_path, **settings)
    assert named in str(error.value) and "['eval_domain_kl', 'eval_general_kl']" in str(error.value)


def test_metric_must_be_measured(tmp_path, caplog):
    branches = ("general", "domain")
    args = make_args(tmp_path, metric_for_best_model="eval_domain_kl", **EVALUATES)
    check_metric(args, branches, branches, [EarlyStoppingCallback()])
    for held_out in (["general"], []):
        with pytest.raises(ValueError, match="'eval_domain_kl' is of a branch without held-out prompts"):
            check_metric(args, branches, held_out, [])
    without = make_args(tmp_path)
    check_metric(without, branches, [], [])
    own = type("Own", (EarlyStoppingCallback,), {})
    for callback in (EarlyStoppingCallback, EarlyStoppingCallback(), own, own()):
        with pytest.raises(ValueError, match=r"EarlyStoppingCallback watches .*eval_general_kl"):
            check_metric(without, branches, branches, [callback])
    args.eval_strategy = "no"
    with pytest.raises(ValueError, match="EarlyStoppingCallback waits for evaluations"):
        check_metric(args, branches, branches, [EarlyStoppingCallback])
    check_metric(args, branches, branches, [])
    assert "'eval_domain_kl' is never looked at" in caplog.text
    args.metric_for_best_model, args.greater_is_better = "general_gap", None  # after the config was made
    check_metric(args, branches, branches, [])
    assert args.greater_is_better is True


def test_best_model_must_have_been_saved(tmp_path):
    """Evaluated at 1, 2, 3 and saved at 3 alone, a run whose best step is 2 ended with the weights of step 3."""
    best = {"metric_for_best_model": "eval_general_kl", "eval_strategy": "steps", "load_best_model_at_end": True}
    branches = ("general", "domain")
    rare = make_args(tmp_path, **best, eval_steps=1, save_strategy="steps", save_steps=500)
    with pytest.raises(
        ValueError, match=r"eval_steps=1 and save_steps=500: .*Set save_steps to 1, or save_strategy to 'best'"
    ):
        check_metric(rare, branches, branches, [])
    for saves in ({"save_strategy": "steps", "save_steps": 1}, {"save_strategy": "best"}):
        check_metric(make_args(tmp_path, **best, eval_steps=1, **saves), branches, branches, [])
    rare.load_best_model_at_end = False
    check_metric(rare, branches, branches, [])
    rare.save_total_limit = 1
    with pytest.raises(
        ValueError, match=r"save_total_limit=1 .* no last one to go on from\. Set save_total_limit to 2"
    ):
        check_metric(rare, branches, branches, [])
    for saves in ("best", "no"):  # where the newest is the best, or there is none
        check_metric(make_args(tmp_path, **{**best, "load_best_model_at_end": False}, eval_steps=1, save_strategy=saves,
                               save_total_limit=1), branches, branches, [])  # fmt: skip
    rare.save_total_limit, rare.eval_delay = 2, 5
    with pytest.raises(
        ValueError, match=r"metric_for_best_model waits .* eval_delay=5 is after max_steps=4\. Lower eval_delay"
    ):
        check_metric(rare, branches, branches, [])


def test_best_checkpoint_is_kept_and_loaded_and_on_the_card(tmp_path, tokenizer, monkeypatch):
    """The run of the report: 2.708, then 1.490, then worse. It stops, keeps the second checkpoint and ends with it."""
    values = itertools.cycle([2.708, 1.490, 1.6, 1.7])
    of_evaluation = metrics.of_evaluation
    monkeypatch.setattr(metrics, "of_evaluation", lambda rows: {**of_evaluation(rows), "kl": next(values)})
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=6, metric_for_best_model="eval_general_kl", load_best_model_at_end=True,
        save_total_limit=1, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)], diagnostics_steps=0,
        eval_dataset={"general": make_prompts("general", 2)}, model=make_model(3), **EVALUATES,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_global_step == 2 and trainer.state.best_metric == 1.490
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for name, weight in trainer.model.named_parameters():
        assert name not in kept or (kept[name] == weight).all(), name
    written = lines_of(tmp_path / "held_out.jsonl")
    assert [line["step"] for line in written] == [1, 2, 3, 4, 2] and written[-1] == {"step": 2, "loaded": True}
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    said = next(line for line in card.splitlines() if line.startswith("- general:"))
    assert "its gap at step 2 is 1.490 " in said and "1.7" not in said and "measured at step" not in said
    assert "; the weights are those of step 2, the best one |" in card


def test_history_of_a_model_that_was_loaded_again():
    history = [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 3, "a": 3}, {"step": 3, "a": 4}]
    assert history_of_model(history, None, 0) == history
    assert [entry["a"] for entry in history_of_model(history, 2, 3)] == [
        1,
        2,
        4,
    ]  # the last was measured after loading


def test_early_stopping_is_as_patient_in_a_run_that_was_resumed(tmp_path, tokenizer, monkeypatch):
    """It stops where an undisturbed run does; the evaluation before the first step is none of a run that goes on."""
    of_evaluation = metrics.of_evaluation
    monkeypatch.setattr(metrics, "of_evaluation", lambda rows: {**of_evaluation(rows), "kl": 1.5})

    def run(resume=None, patience=3, **more):
        trainer = make_trainer(
            tmp_path, tokenizer, metric_for_best_model="eval_general_kl", eval_on_start=True, diagnostics_steps=0,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=patience)],
            eval_dataset={"general": make_prompts("general", 2)},
            **{**EVALUATES, "max_steps": 6, **more},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    assert run(max_steps=2).state.global_step == 2
    resumed = run("auto")
    assert (
        resumed.state.global_step == 4 and resumed.args.eval_on_start
    )  # the first one is the best, then three are not
    assert [line["step"] for line in lines_of(tmp_path / "held_out.jsonl")] == [0, 1, 2, 3, 4]
    assert run("auto", patience=9).state.global_step == 6  # how patient it is stays as the user has it


def test_each_of_several_stopping_callbacks_goes_on_with_its_own_count(tmp_path):
    saved = [{"args": {}, "attributes": {"early_stopping_patience_counter": count}} for count in (1, 2)]
    state = {"stateful_callbacks": {"EarlyStoppingCallback": saved, "TrainerControl": {"args": {}, "attributes": {}}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    found = [EarlyStoppingCallback(early_stopping_patience=9) for _ in range(3)]
    keep_patience([*found, object()], tmp_path)
    assert [each.early_stopping_patience_counter for each in found] == [1, 2, 0]


def test_early_stopping_is_not_said_to_be_off_where_its_metric_is_that_of_one_branch(tmp_path, tokenizer, caplog):
    logging.getLogger("transformers").propagate = True
    own = {branch: make_prompts(branch, 3) for branch in ("general", "domain")}
    trainer = make_trainer(
        tmp_path, tokenizer, eval_dataset=own, callbacks=[EarlyStoppingCallback(2)], max_steps=2, eval_strategy="steps",
        eval_steps=1, metric_for_best_model="eval_domain_kl",
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.train()
        assert "early stopping is disabled" not in caplog.text
        logging.getLogger(EarlyStoppingCallback.__module__).warning(
            "so early stopping is disabled"
        )  # of another trainer
    assert "early stopping is disabled" in caplog.text
