"""`camopd eval`: benchmarks of the models of a run, or of any others, and whether what changed is more than chance."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..eval import cage, code, compare, gaps, jobs, models, rows, scores
from ..eval.models import Model
from ..eval.paper import TABLES
from ..eval.tasks import TASKS, Task, named
from ..run import read_settings
from ..teachers.vllm.plan import VLLM
from . import processes
from .ctrl_c import EXIT_CODE


ROOM = 4096  # tokens of a prompt, in the context of a server that is started here

console = Console(highlight=False)


def eval(argv: list[str]) -> None:
    """The command line. Raises `ValueError` and `CaMOPDError`, where possible before anything is generated."""
    options = _parse(argv)
    names = options.tasks.split(",")
    measured = gaps.of_run(_folder(options.run)) if gaps.NAME in names else []
    tasks = named([name for name in names if name != gaps.NAME])
    if not tasks:
        from ..eval import page

        return _say(page.write([], (), {"run": options.run}, Path(options.out), gaps=measured), Path(options.out))
    wanted = {model.name: model for model in models.of_run(options.run)} if options.run else {}
    wanted |= {model.name: model for model in map(models.parse, options.models)}
    if not wanted:
        raise ValueError("there is no model to evaluate. Name a run, its config, or --models NAME=PATH_OR_URL.")
    python = jobs.python_of_evalscope()
    if any(task.answer == "code" for task in tasks):
        cage.find()
    from ..eval import page  # with what draws it

    vllm = _vllm(options, wanted.values())
    task_rows = _rows(tasks, options)
    out = Path(options.out)
    for model in wanted.values():  # what is refused is refused before anything is generated
        _prepare(model, tasks, task_rows, out, options)
    found: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    with processes.noted_signals() as signals:
        for model in wanted.values():
            console.print(f"{model.name}: {model.where}", markup=False)
            left = [task for task in tasks if not (out / model.name / task.name / jobs.ANSWERS).is_file()]
            if left:
                with _served(model, tasks, options, vllm, out / model.name, signals) as url:
                    for task in left:
                        if url is not None and not signals:
                            folder = out / model.name / task.name
                            jobs.set_url(folder, url)
                            _run(python, folder, task, len(task_rows[task.name]) * task.repeats, signals)
            if signals:
                console.print("Stopped. Finished answers are kept: run the same command again.")
                raise SystemExit(EXIT_CODE)
            for task in tasks:
                found[model.name][task.name] = scores.items_of(task, _answers(task, out / model.name / task.name))
    about = {"models": {name: model.where for name, model in wanted.items()}, "limit": options.limit,
             "max_tokens": options.max_tokens}  # fmt: skip
    compared = compare.compare(tasks, found)
    _say(page.write(compared, NOTES, about, out, options.paper, measured), out)


def _say(blocks: Sequence[str], out: Path) -> None:
    for block in blocks:
        console.print(block, markup=False, soft_wrap=True)
        console.print()
    console.print(f"{out / 'eval.html'}, the same in eval.md; every number and item in eval.json", markup=False)


def _folder(run: str | None) -> Path:
    """The output_dir of a run that is named by it or by its config."""
    if run is None:
        raise ValueError(f"the task {gaps.NAME!r} is of a run: name its output_dir or its config.")
    return Path(run) if Path(run).is_dir() else Path(str(read_settings(run, []).get("output_dir") or "trainer_output"))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="camopd eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Tasks: {', '.join(TASKS)}, and of a run gaps, which needs no labels. Models named start, general and "
        "result are compared with each other.",
    )  # fmt: skip
    add = parser.add_argument
    add(
        "run",
        nargs="?",
        metavar="RUN_OR_CONFIG",
        help="output_dir or YAML file of a run: its start, general teacher, result",
    )
    add("--tasks", required=True, help="names with commas between them")
    add(
        "--models",
        nargs="+",
        default=[],
        metavar="NAME=PATH_OR_URL",
        help="other models, or others under a run's names",
    )
    add("--out", default="eval-output", help="folder of the answers and the table (default: %(default)s)")
    add("--data", nargs="+", default=[], metavar="DIR or TASK=FILE", help="where rows lie (default: eval-data)")
    add("--limit", type=int, help="rows of each task, drawn from all of it, the same for all models (default: all)")
    add("--max-tokens", type=int, help="of an answer (default: the paper's, 16384 or 32768)")
    add(
        "--context",
        type=int,
        help=f"of a server that is started here (default: an answer and {ROOM} tokens of prompt)",
    )
    add("--paper", choices=tuple(TABLES), help="put the numbers beside those of the paper's Table 2 or 1")
    add("--concurrency", type=int, default=16, help="requests at a time (default: %(default)s)")
    add("--vllm-python", help="python that has vLLM (default: CAMOPD_VLLM_PYTHON, or where it is found)")
    options = parser.parse_args(argv)
    for name in ("limit", "max_tokens", "context", "concurrency"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return options


def _rows(tasks: Sequence[Task], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The rows of each task. All are read before any model is asked."""
    given = {name: Path(path) for name, _, path in (text.partition("=") for text in options.data if "=" in text)}
    folders = [text for text in options.data if "=" not in text]
    if len(folders) > 1:
        raise ValueError(f"--data takes one folder, got {', '.join(folders)}. A file is named TASK=FILE.")
    named(list(given))
    folder = Path(folders[0] if folders else "eval-data")
    return {task.name: rows.read(task, rows.find(task, folder, given), options.limit) for task in tasks}


def _answers(task: Task, folder: Path) -> list[dict[str, Any]]:
    """The answers of a finished job, with what became of those that are code."""
    found = scores.read_answers(folder / jobs.ANSWERS)
    if task.answer == "code":
        with _bar(f"{task.name}: running the code", len(found)) as (progress, bar):
            verdicts = code.judge(folder, found, lambda: progress.advance(bar))
        found = [row | {"scores": {"passed": passed}} for row, (passed, _) in zip(found, verdicts, strict=True)]
    return found


@contextlib.contextmanager
def _bar(name: str, total: int) -> Iterator[tuple[Progress, TaskID]]:
    with Progress(
        TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        yield progress, progress.add_task(name, total=total)


def _prepare(
    model: Model,
    tasks: Sequence[Task],
    task_rows: dict[str, list[dict[str, Any]]],
    out: Path,
    options: argparse.Namespace,
) -> None:
    """Write the folders of a model, one per task."""
    if model.is_url:
        name, context = models.look(model, model.where, os.environ.get(jobs.KEY))
    else:
        name, context = os.path.expanduser(model.where), _context(tasks, options)
    weights = jobs.weights_of(Path(model.where).expanduser())
    for task in tasks:
        folder = out / model.name / task.name
        job = jobs.job_of(task, folder, name, context, options.max_tokens, options.concurrency)
        jobs.prepare(task, job, weights, task_rows[task.name], folder)


def _context(tasks: Sequence[Task], options: argparse.Namespace) -> int:
    """Of a server that is started here, tokens."""
    longest = options.max_tokens or max(task.generation["max_tokens"] for task in tasks)
    return int(options.context or longest + ROOM)


def _vllm(options: argparse.Namespace, wanted: Any) -> VLLM | None:
    from .serve import find_vllm

    return find_vllm(options.vllm_python) if any(not model.is_url for model in wanted) else None


@contextlib.contextmanager
def _served(
    model: Model,
    tasks: Sequence[Task],
    options: argparse.Namespace,
    vllm: VLLM | None,
    folder: Path,
    signals: Sequence[int],
) -> Iterator[str | None]:
    """Where a model answers: its own address, or that of a server that is started for it."""
    if model.is_url:
        yield model.where
        return
    from .eval_server import served

    assert vllm is not None
    with served(model, _context(tasks, options), vllm, folder / "server.txt", signals) as url:
        yield url


def _run(python: str, folder: Path, task: Task, total: int, signals: Sequence[int]) -> None:
    """Run the job of a folder, with a bar. Raises `CaMOPDError` where it fails."""
    with _bar(task.name, total) as (progress, bar):
        with open(folder / jobs.LOG, "ab") as log:
            child = processes.start(jobs.words(python, folder), stdout=log, env=jobs.environment())
        try:
            while child.poll() is None and not signals:
                time.sleep(0.2)
                progress.update(bar, completed=jobs.answered(folder))
        finally:
            processes.end([child], signals, grace=10)
    if not signals and child.returncode:
        raise jobs.failed(folder, total)


NOTES = (
    "Tasks of letters (mmlu, qasc, medqa, medxpertqa): no examples; a letter counts where the answer names it as its final "
    "one, or is nothing else. An answer without one, or whose reasoning never ends, is wrong, and is counted as no answer.",
    "humaneval: one answer, run in a cage; passed is coming to the end of its tests within 10 seconds.",
    "distraction: in the manner of DistractionIF, on rows made here; its numbers are not those of that paper's data.",
    "ifeval and ifbench: strict, all instructions of a prompt. gsm8k: no examples, the number in the box or at the end.",
)
