"""`camopd eval`: benchmarks of the models of a run, or of any others, and whether what changed is more than chance."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .. import atomic
from ..eval import arena, cage, code, compare, gaps, gca, jobs, judge, livebench, models, rows, scores, verdicts
from ..eval import livebench_scripts as scripts
from ..eval import options as effects
from ..eval.asking import key_of
from ..eval.judge import Judge
from ..eval.livebench_judge import judge as judge_livebench
from ..eval.livebench_scripts import Checkout
from ..eval.models import Model
from ..eval.paper import TABLES
from ..eval.tasks import NOTES, TASKS, Task, named
from ..exit_codes import INTERRUPTED
from ..results import EVAL_OUTPUT
from ..run import read_settings
from ..teachers.address import public_url
from ..teachers.vllm.plan import VLLM
from . import processes


console = Console(highlight=False)


def eval(argv: list[str]) -> None:
    """The command line. Raises `ValueError` and `CaMOPDError`, where possible before anything is generated."""
    options = parse(argv)
    names = options.tasks.split(",")
    measured = gaps.of_run(_folder(options.run)) if gaps.NAME in names else []
    tasks = named([name for name in names if name != gaps.NAME])
    wanted = _wanted(options) if tasks else {}
    judged = effects.files_of(options.data).get(livebench.NAME)
    tasks = livebench.settle(tasks, judged, wanted)
    found = _read(tasks, judged, wanted)
    asked = [task for task in tasks if task.answer != "read"]
    asked_of = {name: [task for task in asked if task.name not in found[name]] for name in wanted}
    for line in effects.check(
        options, tasks, {name: wanted[name] for name in wanted if effects.served(asked_of[name])}
    ):
        console.print(line, markup=False)
    if not tasks:
        from ..eval import page

        return _say(page.write([], (), {"run": options.run}, Path(options.out), gaps=measured), Path(options.out))
    python = jobs.python_of_evalscope() if any(task.benchmark for task in tasks) else ""
    if any(task.answer == "code" for task in tasks):
        cage.find()
    checkout = scripts.opened(judged) if any(task.answer == "scripted" for task in tasks) else None
    for line in scripts.warnings(checkout):
        console.print(line, markup=False, soft_wrap=True)
    judges = _judges(tasks, options)
    from ..eval import page  # with what draws it

    out = Path(options.out)
    for task in asked:
        if task.answer == "weighed":
            models.need_folders(wanted.values(), task.name)
    vllm = _vllm(options, [(model, asked_of[name]) for name, model in wanted.items()])
    task_rows = _rows(asked, options, checkout)
    with contextlib.ExitStack() as held:
        locks: dict[Path, int] = {}
        for name, model in wanted.items():  # what is refused is refused before anything is generated
            locks |= _prepare(model, asked_of[name], task_rows, judges, out, options, checkout, held)
        signals = held.enter_context(processes.noted_signals())
        for name, model in wanted.items():
            _introduce(model, asked_of[name], out)
            _ask(model, asked_of[name], task_rows, judges, options, (python, vllm), locks, signals)
            for task in asked_of[name]:
                _stop(signals)
                found[name][task.name] = _items(
                    task, model, out / name / task.name, judges.get(task.name), options.concurrency, signals
                )
    about = {"models": {name: model.where for name, model in wanted.items()}, "limit": options.limit,
             "max_tokens": options.max_tokens,
             "judges": {name: f"{public_url(one.url)}#{one.model}" for name, one in judges.items()}}  # fmt: skip
    _say(page.write(compare.compare(tasks, found), _notes(tasks, found), about, out, options.paper, measured), out)


def _read(tasks: Sequence[Task], judged: Path | None, wanted: Mapping[str, Model]) -> dict[str, dict[str, Any]]:
    """The items, by model and task, of what was asked and judged before by others: of LiveBench, in its checkout."""
    found: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for task in tasks:
        for name in wanted if task.name == livebench.NAME else ():
            if before := scripts.judged_before(judged, name, others=task.answer != "read"):
                found[name][task.name] = livebench.items(before)
    return found


def _notes(tasks: Sequence[Task], found: dict[str, dict[str, Any]]) -> list[str]:
    """What is to be known of the scores."""
    names = {task.name for task in tasks}
    own = {name: items[livebench.NAME] for name, items in found.items() if livebench.NAME in items}
    of_tasks = [text for of, text in NOTES.items() if names & set(of.split())]
    return of_tasks + compare.asked_otherwise(tasks, found) + livebench.notes(own)


def _wanted(options: argparse.Namespace) -> dict[str, Model]:
    """The models, by name: those of the run, and those that are named beside it or in their place."""
    if options.run:
        models.prepare_environment(options.run)
    given = effects.models_of(options.models)
    of_run = models.of_run(options.run, given) if options.run else []
    wanted = {model.name: model for model in of_run} | given
    if not wanted:
        raise ValueError("there is no model to evaluate. Name a run, its config, or --models NAME=PATH_OR_URL.")
    models.need_whole(wanted.values())
    return wanted


def _introduce(model: Model, tasks: Sequence[Task], out: Path) -> None:
    """Say which model is next, and what is not known of its answers that are there."""
    console.print(f"{model.name}: {model.where}{model.note and f' ({model.note})'}", markup=False)
    kept = [task.name for task in tasks if jobs.has_answers(out / model.name / task.name)]
    if kept and jobs.weights_of(Path(model.where).expanduser()) is None:  # of a folder that is compared
        console.print(
            f"  {', '.join(kept)}: with answers of an earlier call. Whether {model.where} still has those weights cannot "
            f"be seen; where it has others, give another --out or remove {out / model.name}.",
            markup=False, soft_wrap=True,
        )  # fmt: skip


def _ask(
    model: Model,
    tasks: Sequence[Task],
    task_rows: dict[str, list[dict[str, Any]]],
    judges: dict[str, Judge],
    options: argparse.Namespace,
    programs: tuple[str, VLLM | None],
    locks: Mapping[Path, int],
    signals: Sequence[int],
) -> None:
    """Do what is left to do with a model: first what needs the model itself, and then what a server of it answers."""
    python, vllm = programs
    folder = Path(options.out) / model.name
    left = [task for task in tasks if not jobs.finished(folder / task.name)]
    served = effects.served(left)
    for task in left:
        if task not in served and not signals:
            words, of_job = jobs.words_of_options(folder / task.name), folder / task.name
            _run(words, of_job, task, len(task_rows[task.name]), locks[of_job], signals)
    if not served:
        return
    with _served(model, effects.served(tasks), options, vllm, folder, signals) as url:
        for task in served:
            if url is not None and not signals:
                jobs.set_url(folder / task.name, url)
                if task.answer == "played":
                    _play(folder / task.name, task, task_rows[task.name], judges[task.name], options, signals)
                elif task.answer == "scripted":
                    _have_asked(folder / task.name, task, task_rows[task.name], locks[folder / task.name], signals)
                else:
                    total = len(task_rows[task.name]) * task.repeats
                    words, of_job = jobs.words(python, folder / task.name), folder / task.name
                    _run(words, of_job, task, total, locks[of_job], signals)


def _stop(signals: Sequence[int]) -> None:
    if signals:
        console.print("Stopped. Finished answers are kept: run the same command again.")
        raise SystemExit(INTERRUPTED)


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


def parse(argv: list[str]) -> argparse.Namespace:
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
    add("--out", default=EVAL_OUTPUT, help="folder of the answers and the table (default: %(default)s)")
    add("--data", nargs="+", default=[], metavar="DIR or TASK=FILE", help="where rows lie (default: eval-data)")
    add(
        "--judge",
        nargs="+",
        default=[],
        metavar="URL or TASK=URL",
        help=f"servers of the models that judge, as URL#MODEL; their key is {judge.KEY}",
    )
    add("--limit", type=int, help="rows of each task, drawn from all of it, the same for all models (default: all)")
    add("--max-tokens", type=int, help="of an answer (default: the paper's, 16384 or 32768)")
    add(
        "--context",
        type=int,
        help=f"of a server that is started here (default: an answer and {effects.ROOM} tokens of prompt)",
    )
    add("--paper", choices=tuple(TABLES), help="put the numbers beside those of the paper's Table 2 or 1")
    add(
        "--concurrency",
        type=int,
        default=16,
        help="requests at a time, or options in a forward (default: %(default)s)",
    )
    add("--vllm-python", help="python that has vLLM (default: CAMOPD_VLLM_PYTHON, or where it is found)")
    options = parser.parse_args(argv)
    for name in ("limit", "max_tokens", "context", "concurrency"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return options


def _rows(
    tasks: Sequence[Task], options: argparse.Namespace, checkout: Checkout | None
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each task. All are read before any model is asked."""
    folder, given = effects.folder_of(options.data), effects.files_of(options.data)
    return {
        task.name: scripts.questions(checkout)
        if task.answer == "scripted" and checkout
        else rows.read(task, rows.find(task, folder, given), options.limit)
        for task in tasks
    }


def _judges(tasks: Sequence[Task], options: argparse.Namespace) -> dict[str, Judge]:
    """The judge of each task that needs one, found to be there and to serve its model."""
    given = effects.judges_of(options.judge)
    found = {}
    for task in [task for task in tasks if task.judged]:
        if task.name not in given and "" not in given:
            raise ValueError(
                f"the answers of {task.name} are judged by a model, in the paper by {task.judge}, and none is named. Serve "
                "one and add --judge URL#MODEL."
            )
        model = models.parse(f"{task.name}={given.get(task.name, given.get(''))}", "--judge")
        if not model.is_url:
            raise ValueError(f"--judge takes the URL of a server, got {model.where!r}.")
        served, _ = models.look(model, model.where, judge.KEY, "--judge")
        found[task.name] = Judge(model.where, served, key_of(judge.KEY))
    return found


def _items(
    task: Task, model: Model, folder: Path, asked: Judge | None, concurrency: int, signals: Sequence[int]
) -> list[scores.Item]:
    """The items of a finished job, with the verdict of a cage on answers that are code, or of a judge."""
    found = scores.read_answers(folder / jobs.ANSWERS, partial(models.opens_reasoning, model))
    if task.answer not in ("code", "scripted") and asked is None:
        return scores.items_of(task, found)
    with _ticking(
        f"{task.name}: {'running the code' if task.answer == 'code' else 'judging'}", len(found), signals
    ) as tick:
        if task.answer == "scripted":
            opens = partial(models.opens_reasoning, model)
            return livebench.items(judge_livebench(scripts.checkout_of(folder), folder, found, tick, opens))
        if asked is None:
            given = code.judge(folder, found, tick)
        else:
            ask = {"verified": judge.verify, "compared": arena.compare, "played": gca.judge}[task.answer]
            given = verdicts.collect(folder, found, asked.model, partial(ask, asked), concurrency, tick, asked.end)
    return scores.items_of(task, [row | {"verdict": verdict} for row, verdict in zip(found, given, strict=True)])


def _play(
    folder: Path,
    task: Task,
    scenes: Sequence[dict[str, Any]],
    world: Judge,
    options: argparse.Namespace,
    signals: Sequence[int],
) -> None:
    """Have the model of a folder's job play its scenes, with the judge's model as everything but the characters."""
    job = json.loads((folder / jobs.JOB).read_text(encoding="utf-8"))
    url = job["url"].removesuffix("/v1")
    actor = Judge(url, job["model"], key_of(jobs.KEY), what="model that plays",
                  more={"max_tokens": job["generation"]["max_tokens"]})  # fmt: skip
    with _ticking(f"{task.name}: scenes", len(scenes), signals) as tick:
        found = gca.play_all(actor, world, folder / "work", scenes, options.concurrency, tick)
    atomic.write(folder / jobs.ANSWERS, "".join(json.dumps(row) + "\n" for row in found))


def _have_asked(folder: Path, task: Task, asked: Sequence[dict[str, Any]], lock: int, signals: Sequence[int]) -> None:
    """Have LiveBench's script ask the model of a folder's job what is not answered yet."""
    checkout = scripts.checkout_of(folder)
    job = json.loads((folder / jobs.JOB).read_text(encoding="utf-8"))
    scripts.lay_out(checkout, folder, asked)
    words, environment = scripts.words_to_ask(checkout, job, asked), scripts.environment(checkout)
    _run(words, folder, task, len(asked), lock, signals, env=environment, cwd=folder / "work")
    if not signals:
        with _stopping(signals) as look:
            scripts.gather(folder, asked, look)


@contextlib.contextmanager
def _ticking(name: str, total: int, signals: Sequence[int]) -> Iterator[Callable[..., None]]:
    """A bar that goes on with each call of what is yielded; there a signal ends the command, with what is done kept."""
    with _bar(name, total) as (progress, bar), _stopping(signals) as look:

        def tick(steps: int = 1) -> None:
            look()
            progress.advance(bar, steps)

        yield tick


@contextlib.contextmanager
def _stopping(signals: Sequence[int]) -> Iterator[Callable[[], None]]:
    """What is yielded raises, in any thread, when a signal has come; in this one that ends the command."""

    def look() -> None:
        if signals:
            raise KeyboardInterrupt

    try:
        yield look
    except KeyboardInterrupt:
        _stop(signals)
        raise


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
    judges: dict[str, Judge],
    out: Path,
    options: argparse.Namespace,
    checkout: Checkout | None,
    held: contextlib.ExitStack,
) -> dict[Path, int]:
    """Write the folders of a model, one per task. Gives the locks of those where there is something to do, which `held`
    holds."""
    locks: dict[Path, int] = {}
    if not tasks:
        return locks
    if model.is_url:
        name, context = models.look(model, model.where, jobs.KEY)
    else:
        served = effects.served(tasks)
        name, context = os.path.expanduser(model.where), effects.server_context(served, options) if served else None
    weights = jobs.weights_of(Path(model.where).expanduser())
    for task in tasks:
        folder = out / model.name / task.name
        job = jobs.job_of(task, folder, name, context, options.max_tokens, options.concurrency)
        if task.answer == "played":  # the other half of what was played
            job["world"] = judges[task.name].model
        if task.answer == "scripted" and checkout:
            scripts.need_unknown(checkout, name)
            job["checkout"] = asdict(checkout)
        if not jobs.finished(folder) or task.judged or task.answer in ("code", "scripted"):
            locks[folder] = held.enter_context(jobs.alone(folder))
        jobs.prepare(task, job, weights, task_rows[task.name], folder)
    return locks


def _vllm(options: argparse.Namespace, asked: Sequence[tuple[Model, Sequence[Task]]]) -> VLLM | None:
    """What serves the models that are no URLs and have answers left to give. Raises `ValueError` where one is too short."""
    from .serve import find_vllm

    left = False
    for model, tasks in asked:
        served = effects.served(tasks)
        if not model.is_url and not all(jobs.finished(Path(options.out, model.name, task.name)) for task in served):
            effects.need_context([model], served, options)
            left = True
    return find_vllm(options.vllm_python) if left else None


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
    with served(model, effects.server_context(tasks, options), vllm, folder / "server.txt", signals) as url:
        yield url


def _run(
    words: Sequence[str], folder: Path, task: Task, total: int, lock: int, signals: Sequence[int], **process: Any
) -> None:
    """Run the job of a folder, whose `lock` it inherits, with a bar; `process` is how, where not as all. Raises
    `CaMOPDError` where it fails."""
    with _bar(task.name, total) as (progress, bar):
        with open(folder / jobs.LOG, "ab") as log:
            environment = jobs.environment(*(() if task.benchmark else jobs.HUB_TOKENS))
            child = processes.start(words, stdout=log, pass_fds=[lock], **{"env": environment, **process})
            jobs.note(lock, child.pid)
        try:
            while child.poll() is None and not signals:
                time.sleep(0.2)
                progress.update(bar, completed=jobs.answered(folder))
        finally:
            processes.end([child], signals, grace=10)
            jobs.note(lock, os.getpid())
            jobs.hide_key(folder)
    if not signals and child.returncode:
        raise jobs.failed(folder, total)
