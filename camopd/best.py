"""Which checkpoint is the best one: the metrics of evaluation that can say so, and which way each of them is good."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback
from transformers.trainer import TRAINER_STATE_NAME


logger = logging.getLogger(__name__)

# Of `metrics.of_evaluation`, and the loss. A gap is teacher's minus student's log-prob, minus the KL: it grows to 0.
GREATER_IS_BETTER = {"kl": False, "loss": False, "gap": True, "gap_abs": False, "gap_positive": False}
OF_TASKS = {"score": True, "broken": False}  # of each of `eval_tasks`
# What evaluation also gives, and what says nothing about the model.
NO_MEASURE = (
    "kl_se", "prompts", "runtime", "samples_per_second", "steps_per_second", "entropy", "completions/clipped_ratio",
    *(f"completions/{kind}_{ended}length" for kind in ("mean", "min", "max") for ended in ("", "terminated_")),
)  # fmt: skip


def task_name(task: str) -> str:
    """The name of one of `eval_tasks`, which may be the path of its YAML file.

    >>> task_name("gsm8k"), task_name("tasks/qasc.yaml")
    ('gsm8k', 'qasc')
    """
    return Path(task).stem if task.endswith(".yaml") else task


def _of_tasks(args: Any) -> dict[str, bool]:
    """The metrics of `eval_tasks`, and whether a greater value is the better one."""
    tasks = [task_name(task) for task in args.eval_tasks or ()]
    return {f"eval_{task}/{name}": better for task in tasks for name, better in OF_TASKS.items()}


def settle_metric(args: Any, branches: Iterable[str]) -> None:
    """Set `greater_is_better` for `metric_for_best_model`.

    transformers takes a greater value for the better one unless the name ends in "loss", and would keep the checkpoint with
    the largest distance from the teacher.

    Raises `ValueError` for a name that evaluation does not give, a direction that is the wrong one, and a setting that
    needs a metric where none is named.
    """
    names = {f"eval_{branch}_{name}": better for branch in branches for name, better in GREATER_IS_BETTER.items()}
    names |= _of_tasks(args)
    metric = args.metric_for_best_model
    if metric is None:
        for setting in _needs_metric(args):
            raise ValueError(
                f"{setting} needs to know which checkpoint is the better one, and a run has a gap for each branch. Set "
                f"metric_for_best_model to one of {sorted(name for name in names if name.endswith('_kl'))} (smaller is "
                "better, which is set by itself)."
            )
        if args.greater_is_better is not None:
            raise ValueError(
                f"greater_is_better={args.greater_is_better} says nothing without metric_for_best_model. Leave it out."
            )
        return
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        what = "is not a metric of evaluation"
        if name in {f"eval_{branch}_{other}" for branch in branches for other in NO_MEASURE}:
            what = "does not say how good a model is"
        raise ValueError(
            f"metric_for_best_model={metric!r} {what}. Did you mean {near!r}? There are {sorted(names)}; docs/metrics.md "
            "says what they are."
        )
    if args.greater_is_better not in (None, names[name]):
        raise ValueError(
            f"greater_is_better={args.greater_is_better} with metric_for_best_model={metric!r} would keep the worst "
            f"checkpoint: {'greater' if names[name] else 'smaller'} is better there. Leave greater_is_better out, or in a "
            "copy of a config set it to None."
        )
    args.greater_is_better = names[name]


def check_metric(
    args: Any, schedule_branches: Iterable[str], held_out: Iterable[str], callbacks: Iterable[Any]
) -> None:
    """Raise `ValueError` when `metric_for_best_model` will not be measured, or early stopping has none.

    Args:
        args: the config; its metric is settled anew, as it may have been set after the config was made.
        schedule_branches: all branches.
        held_out: those that have held-out prompts.
        callbacks: the user's, as instances or classes.
    """
    stops = any(
        issubclass(callback if isinstance(callback, type) else type(callback), EarlyStoppingCallback)
        for callback in callbacks
    )
    settle_metric(args, schedule_branches)
    metric, held_out = args.metric_for_best_model, list(held_out)
    if metric is None:
        if stops:
            raise ValueError(
                "EarlyStoppingCallback watches metric_for_best_model, and none is set. Set it to one of "
                f"{[f'eval_{branch}_kl' for branch in held_out or schedule_branches]} (smaller is better, which is set by "
                "itself)."
            )
        return
    _check_saves(args)
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    measured = {f"eval_{branch}_{kind}" for branch in held_out for kind in GREATER_IS_BETTER} | set(_of_tasks(args))
    if name not in measured:
        raise ValueError(
            f"metric_for_best_model={metric!r} is of a branch without held-out prompts: eval_dataset has "
            f"{held_out or 'none'}. Add its prompts to eval_dataset (eval_prompts in a config), or name a metric of "
            "another branch."
        )
    never = getattr(args.eval_strategy, "value", args.eval_strategy) == "no"
    late = not never and args.eval_delay > args.max_steps
    if never or late:
        why, way = "eval_strategy is 'no'", "Set eval_strategy: steps and eval_steps."
        if late:
            why, way = f"eval_delay={args.eval_delay:g} is after max_steps={args.max_steps}", "Lower eval_delay."
        if stops or late or getattr(args.save_strategy, "value", args.save_strategy) == "best":
            waits = "EarlyStoppingCallback" if stops else "metric_for_best_model" if late else "save_strategy=best"
            raise ValueError(f"{waits} waits for evaluations, and {why}. {way}")
        logger.warning("metric_for_best_model=%r is never looked at: %s. %s", metric, why, way)


def keep_patience(callbacks: Iterable[Any], checkpoint: Path) -> None:
    """Give early stopping what it had counted at a checkpoint: else its patience would begin anew with each resume. How
    patient it is stays as the user has it now."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    saved = state.get("stateful_callbacks") or {}
    # Of several of a class there is a list.
    left = {name: list(each) if isinstance(each, list) else [each] for name, each in saved.items()}
    for callback in callbacks:
        if isinstance(callback, EarlyStoppingCallback) and left.get(type(callback).__name__):
            attributes = left[type(callback).__name__].pop(0).get("attributes") or {}
            callback.early_stopping_patience_counter = attributes.get("early_stopping_patience_counter", 0)


@contextmanager
def quiet_early_stopping() -> Iterator[None]:
    """Inside, early stopping does not say that it is disabled at each evaluation of another branch than its metric's: there
    is one per branch, and `check_metric` has seen that the metric is measured."""

    def is_true(record: logging.LogRecord) -> bool:
        return "so early stopping is disabled" not in record.getMessage()

    log = logging.getLogger(EarlyStoppingCallback.__module__)
    log.addFilter(is_true)
    try:
        yield
    finally:
        log.removeFilter(is_true)


def _check_saves(args: Any) -> None:
    """Raise `ValueError` where the best of the evaluated models need not be among the saved ones.

    transformers then loads an older one, or none, and does not say so.
    """
    evaluated, saved = (getattr(kind, "value", kind) for kind in (args.eval_strategy, args.save_strategy))
    if args.load_best_model_at_end and evaluated == saved == "steps" and args.eval_steps != args.save_steps:
        raise ValueError(
            f"load_best_model_at_end=True with eval_steps={args.eval_steps:g} and save_steps={args.save_steps:g}: the "
            "model of an evaluation that is not saved cannot be loaded at the end, were it the best one. Set save_steps to "
            f"{args.eval_steps:g}, or save_strategy to 'best'."
        )
    if saved == "steps" and args.save_total_limit == 1 and not args.load_best_model_at_end:
        raise ValueError(
            "save_total_limit=1 with metric_for_best_model leaves the best checkpoint alone at the end, and no last one to "
            "go on from. Set save_total_limit to 2, or load_best_model_at_end."
        )


def _needs_metric(args: Any) -> list[str]:
    """Settings that transformers would let look at `eval_loss`, which a run with branches does not have."""
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    return [
        *(["load_best_model_at_end=True"] if args.load_best_model_at_end else []),
        *(["save_strategy='best'"] if getattr(args.save_strategy, "value", args.save_strategy) == "best" else []),
        *([f"lr_scheduler_type={schedule!r}"] if schedule in ("reduce_lr_on_plateau", "greedy") else []),
    ]


def history_of_model(history: list[dict[str, Any]], best_step: int | None, loaded_at: int) -> list[dict[str, Any]]:
    """The entries of a log that are of the model in hand: after the best checkpoint has been loaded, none of later steps.

    Args:
        history: the trainer state's `log_history`.
        best_step: step of the checkpoint that was loaded at the end; `None` if none was.
        loaded_at: how many entries there were then. Those after it are of that checkpoint again.
    """
    if best_step is None:
        return history
    return [entry for place, entry in enumerate(history) if place >= loaded_at or entry.get("step", 0) <= best_step]
