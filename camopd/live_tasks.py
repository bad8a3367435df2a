"""`eval_tasks`: tasks of lm-eval on the model in training, measured with the held-out prompts.

Looks only: training draws the same random numbers and makes the same updates without it.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from .best import task_name
from .errors import CaMOPDError, on_all_ranks
from .files import json_lines
from .generation import neutral_generation
from .output_dir import EVAL_TASKS
from .rollouts import rng_state, set_rng_state
from .run_folder import append, best_step, make_room, named_if_unwritten
from .watchdog import phase


FEWSHOT_SEED = 1234  # lm-eval's own
Loaded = tuple[dict[str, Any], dict[str, list[int]]]  # tasks of lm-eval by name, and the rows of each that are asked


def load(args: Any, held_out: Any) -> Loaded | None:
    """The tasks of `args.eval_tasks` with their data, and `eval_tasks_items` rows of each, drawn once; `None` without any.

    Raises `ValueError` without held-out prompts, with which they are measured, and without lm-eval; and for a task that
    lm-eval does not have, a group of tasks, one that runs code of the model, one without a metric of which a greater value
    is better, and one whose data cannot be had.
    """
    tasks, items = args.eval_tasks, args.eval_tasks_items
    if not tasks:
        return None
    if not held_out:
        raise ValueError(
            f"eval_tasks={tasks} are measured with the held-out prompts, and there are none. Add them as eval_dataset "
            "(eval_prompts in a config); a few are enough."
        )
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"eval_tasks={tasks} are measured by lm-eval, which is not here ({error}). Install it with `pip install "
            "-e '.[eval]'` in a clone of camopd, or leave eval_tasks out."
        ) from None
    manager = TaskManager()
    known = manager.all_subtasks
    found: dict[str, Any] = {}
    for task in tasks:
        if task not in known and task == task_name(task):
            near = difflib.get_close_matches(task, known, 1)
            what = "is a group of tasks" if task in manager.all_tasks else "is not a task"
            raise ValueError(
                f"eval_tasks: {task!r} {what} of lm-eval.{f' Did you mean {near[0]!r}?' if near else ''} They are "
                "listed by `lm-eval ls tasks`; the path of a YAML file is a task of one's own."
            )
        try:
            found |= manager.load([task])["tasks"]
        except Exception as error:  # of the hub's client, the network, or the reader of files: any
            raise ValueError(f"eval_tasks: {task!r} cannot be loaded ({type(error).__name__}: {error}).") from error
    if list(found) != [task_name(task) for task in tasks]:
        raise ValueError(f"eval_tasks={tasks} hold the tasks {list(found)}. A YAML file is to have its task's name.")
    for name, each in found.items():
        if getattr(each, "UNSAFE_CODE", False):
            raise ValueError(f"eval_tasks: {name!r} runs code of the model here. `camopd eval` runs it in a cage.")
        if metric_of(each) is None:
            raise ValueError(
                f"eval_tasks: {name!r} has no metric of which a greater value is better, as score and broken are read. "
                "Leave it out, or give a YAML file of your own with such a metric."
            )
    drawn = {
        name: sorted(random.Random(0).sample(range(len(docs)), min(items, len(docs))))
        for name, docs in ((name, each.eval_docs) for name, each in found.items())
    }
    return found, drawn


class LiveTasks(TrainerCallback):
    """Asks the model the drawn rows of each task, and says how it does and what it no longer gets right."""

    def __init__(
        self, loaded: Loaded, args: Any, model: Any, tokenizer: Any, autocast: Callable[[], Any],
        gather: Callable[[list[Any]], list[Any]],
    ):  # fmt: skip
        """
        Args:
            loaded: by `load`.
            args: of the run.
            model: the student outside wrappers.
            autocast: context of the model's forwards.
            gather: of a list over all ranks.
        """
        self._tasks, self._drawn = loaded
        self._args, self._model, self._tokenizer = args, model, copy.deepcopy(tokenizer)  # lm-eval sets its padding
        self._autocast, self._gather = autocast, gather
        self._first: dict[str, list[float]] = {}  # scores of a task's rows in the run's first evaluation
        self._path: Path | None = None  # of the first process, since training has begun
        self._loaded: int | None = None  # step of the best model, once it was loaded at the end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make room for the run's lines; a run that is gone on with keeps its first evaluation."""
        path = Path(args.output_dir) / EVAL_TASKS
        self._path, self._loaded = path if state.is_world_process_zero else None, None
        firsts: list[dict[str, list[float]]] = [{}]
        with on_all_ranks(self._gather), named_if_unwritten(path):
            if self._path is not None:
                make_room(path, state.global_step)
                firsts = [_firsts_of(path, self._drawn)]
        self._first = self._gather(firsts)[0]  # elsewhere the file may not be seen

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is measured after the best model was loaded is of its step."""
        self._loaded = best_step(args, state)

    def add_to(self, found: dict[str, float], trainer: Any) -> dict[str, float]:
        """The metrics of an evaluation and those of the tasks, which the trainer logs."""
        if trainer.args.metric_for_best_model is None:  # else an evaluation decides something, and is finished
            trainer.stop_if_asked()
        with phase(f"evaluation: {', '.join(self._tasks)}"):
            measured = self.measure(trainer.state.global_step if self._loaded is None else self._loaded)
        trainer.log(measured)
        metrics = {**found, **measured}
        watched = f"eval_{str(trainer.args.metric_for_best_model).removeprefix('eval_')}"
        for callback in trainer.callback_handler.callbacks if watched in measured else ():
            if isinstance(callback, EarlyStoppingCallback):  # transformers has told it of each branch alone
                callback.on_evaluate(trainer.args, trainer.state, trainer.control, metrics=metrics)
        return metrics

    def measure(self, step: int) -> dict[str, float]:
        """`eval_<task>/score` and `eval_<task>/broken`, shares of the rows; a line for each task goes to the run's file.

        The score is `metric_of` the task. Every rank asks all rows, and takes what the first one found.
        """
        found: list[dict[str, list[float]]] = [{}]
        with on_all_ranks(self._gather), _as_before(self._model):
            found = [self._ask()]
        measured, lines = {}, ""
        for name, scores in self._gather(found)[0].items():
            first = self._first.setdefault(name, scores)
            measured[f"eval_{name}/score"] = sum(scores) / len(scores)
            measured[f"eval_{name}/broken"] = sum(a > b for a, b in zip(first, scores, strict=True)) / len(scores)
            lines += json.dumps({"step": step, "task": name, "rows": self._drawn[name], "scores": scores}) + "\n"
        with on_all_ranks(self._gather):
            if self._path is not None:
                with named_if_unwritten(self._path):
                    append(self._path, lines, flush=True)
        return measured

    def _ask(self) -> dict[str, list[float]]:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            pretrained=self._model, tokenizer=self._tokenizer, batch_size=self._args.per_device_eval_batch_size,
            chat_template_args=dict(self._args.chat_template_kwargs or {}),  # as the run's prompts have it
        )  # fmt: skip
        with contextlib.suppress(ImportError):  # which IF-Eval asks; unseeded it says by turns this and that of a text
            import langdetect

            langdetect.DetectorFactory.seed = 0
        for task in self._tasks.values():  # with the same examples each time; alone, they would be drawn anew
            task.set_fewshot_seed(FEWSHOT_SEED)
        with self._autocast(), torch.no_grad(), neutral_generation(self._model):
            found = evaluate(
                lm=model, task_dict={"tasks": self._tasks, "groups": {}, "group_map": {}}, samples=self._drawn,
                bootstrap_iters=0, apply_chat_template=bool(self._tokenizer.chat_template),
            )["samples"]  # fmt: skip
        return {name: _scores(name, task, found[name], self._drawn[name]) for name, task in self._tasks.items()}


def _firsts_of(path: Path, drawn: dict[str, list[int]]) -> dict[str, list[float]]:
    """The scores of the first evaluation of each task in a run's file, of those that asked the drawn rows. A line that is
    none, as one that was written by hand, is passed over: the next evaluation is the first one then."""
    found: dict[str, list[float]] = {}
    for text in json_lines(path.read_text(encoding="utf-8")) if path.exists() else ():
        line = json.loads(text)
        name, scores = line.get("task"), line.get("scores")
        if not isinstance(name, str) or line.get("rows") != drawn.get(name) or not isinstance(scores, list):
            continue
        if len(scores) == len(drawn[name]) and all(type(score) in (int, float) for score in scores):
            found.setdefault(name, scores)
    return found


def metric_of(task: Any) -> str | None:
    """The first of a task's metrics of which a greater value is better; `None` where there is none."""
    better = task.higher_is_better()
    listed = [each["metric"] for each in task.config.metric_list or [{"metric": "acc"}]]
    names = [getattr(each, "__name__", each) for each in listed]  # of a function, as lm-eval names its metric
    return next((name for name in names if better.get(name) is not False), None)


def _scores(name: str, task: Any, samples: Sequence[dict[str, Any]], rows: Sequence[int]) -> list[float]:
    """`metric_of` a task on each of its rows, by the first of its filters."""
    metric: Any = metric_of(task)  # there is one, see `load`
    of_first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    if of_first and not isinstance(of_first[0][metric], (int, float)):
        raise CaMOPDError(
            f"eval_tasks: {name!r} has no score of each row: its metric {metric!r} is one of all rows together. Leave it "
            "out."
        )
    by_row = {sample["doc_id"]: float(sample[metric]) for sample in of_first}
    if sorted(by_row) != list(rows):
        raise RuntimeError(f"lm-eval has answered {len(by_row)} of the {len(rows)} rows of {name}.")
    return [by_row[row] for row in rows]


@contextlib.contextmanager
def _as_before(model: Any) -> Iterator[None]:
    """What lm-eval changes of the model and of random numbers is put back."""
    states, training = (random.getstate(), np.random.get_state(), rng_state()), model.training
    pad = getattr(model.config, "pad_token_id", None)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        set_rng_state(states[2])
        model.train(training)
        model.config.pad_token_id = pad


def make(loaded: Loaded, trainer: Any, sharded: bool, gather: Callable[[list[Any]], list[Any]]) -> LiveTasks:
    """Give a trainer what measures its tasks. Raises `ValueError` where the weights are in shards."""
    if sharded:
        raise ValueError(
            f"eval_tasks={trainer.args.eval_tasks} need the whole model on each process, and FSDP and ZeRO-3 have it in "
            "shards. Leave them out, and run `camopd eval` on checkpoints."
        )
    model, tokenizer = trainer.student.model, trainer._tokenizer
    tasks = LiveTasks(loaded, trainer.args, model, tokenizer, trainer.accelerator.autocast, gather)
    trainer.add_callback(tasks)
    return tasks
