"""What the options of `camopd eval` say of its tasks. One that would change nothing is refused: it was meant to."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ..surroundings import context_of
from ..teachers.address import without_secrets
from . import gaps, gca
from . import livebench_scripts as scripts
from .models import Model, parse
from .tasks import TASKS, Task, named


T = TypeVar("T")
ROOM = 4096  # tokens of a prompt, in the context of a server that is started here
OF_ROWS = ("limit", "max_tokens")  # and of answers: nothing is drawn or asked of what another program has run
BY_SCRIPTS = ("read", "scripted")  # kinds of tasks whose rows are another program's
OF_SERVERS = ("context", "vllm_python")  # that are started here
OF_MODELS = ("models", "paper", "judge", "data", *OF_ROWS, *OF_SERVERS)


def served(tasks: Sequence[Task]) -> list[Task]:
    """Those that ask a server of the model: not what another program has run, or where the model itself is needed."""
    return [task for task in tasks if task.answer not in ("read", "weighed")]


def models_of(texts: Sequence[str]) -> dict[str, Model]:
    """The models of `--models`, by name."""
    return _once("--models", ((model.name, model, model.where) for model in map(parse, texts)))


def files_of(data: Sequence[str]) -> dict[str, Path]:
    """The files of `--data TASK=FILE`, by task."""
    pairs = [text.partition("=")[::2] for text in data if "=" in text]
    found = _once("--data", ((name, Path(os.path.expanduser(path)), path) for name, path in pairs))
    named(list(found))
    return found


def folder_of(data: Sequence[str]) -> Path:
    """The folder of `--data`. Raises `ValueError` for two."""
    folders = [text for text in data if "=" not in text]
    if len(folders) > 1:
        raise ValueError(f"--data takes one folder, got {', '.join(folders)}. A file is named TASK=FILE.")
    return Path(os.path.expanduser(folders[0]) if folders else "eval-data")


def judges_of(texts: Sequence[str]) -> dict[str, str]:
    """The servers of `--judge`, by task; that of all tasks that have none of their own under ""."""
    split = [(*text.partition("=")[::2], text) for text in texts]
    pairs = [(name, url) if name in TASKS else ("", text) for name, url, text in split]  # a URL may have a "=", too
    return _once("--judge", ((name, url, url) for name, url in pairs))


def _once(option: str, found: Iterator[tuple[str, T, str]]) -> dict[str, T]:
    known: dict[str, tuple[T, str]] = {}
    for name, value, shown in found:
        if name in known:
            what = f"names {name!r} twice" if name else "is given twice"
            raise ValueError(
                f"{option} {what}, as {without_secrets(known[name][1])} and as {without_secrets(shown)}. Leave one of them "
                "out."
            )
        known[name] = value, shown
    return {name: value for name, (value, _) in known.items()}


def check(options: argparse.Namespace, tasks: Sequence[Task], models: Mapping[str, Model]) -> list[str]:
    """Lines for options that are without effect on a part of the tasks. Raises `ValueError` where that is on all."""
    idle = list(_idle(options, tasks, models))
    if idle:
        raise ValueError(f"without effect: {'; '.join(idle)}. Leave {'it' if len(idle) == 1 else 'them'} out.")
    read = [task.name for task in tasks if task.answer == "read"]
    lines = [f"{_flag(name)} is without effect on {', '.join(read)}, which is read as it was run."
             for name in OF_ROWS if read and getattr(options, name) is not None]  # fmt: skip
    scripted = [task.name for task in tasks if task.answer == "scripted"]
    if scripted and options.limit is not None:
        lines.append(f"--limit is without effect on {', '.join(scripted)}, which is asked as a whole.")
    weighed = [task.name for task in tasks if task.answer == "weighed"]
    if weighed and options.max_tokens is not None:
        lines.append(f"--max-tokens is without effect on {', '.join(weighed)}, where no model writes.")
    return lines


def _idle(options: argparse.Namespace, tasks: Sequence[Task], models: Mapping[str, Model]) -> Iterator[str]:
    """Each option that changes nothing, and why."""
    if not tasks:
        for name in OF_MODELS:
            if getattr(options, name):
                yield f"{_flag(name)}, as the task {gaps.NAME} asks no model"
        return
    asked = [task.name for task in tasks if task.answer != "read"]
    for name in OF_ROWS if not asked else ():
        if getattr(options, name) is not None:
            yield f"{_flag(name)}, as {tasks[0].name} is read as it was run"
    if options.limit is not None and all(task.answer == "scripted" for task in tasks):
        yield f"--limit, as {tasks[0].name} is asked as a whole"
    if asked and not served(tasks) and options.max_tokens is not None:
        yield f"--max-tokens, as no model writes in {', '.join(asked)}"
    for name in OF_SERVERS:
        if getattr(options, name) and (not served(tasks) or all(model.is_url for model in models.values())):
            yield f"{_flag(name)}, as no server is started here"
    names = [task.name for task in tasks]
    files = files_of(options.data)
    for name in files:
        if name not in {*names, *(task.rows_of for task in tasks if task.name not in files)}:
            yield f"--data {name}=, as that task is not asked for"
    own = [task for task in tasks if task.answer not in BY_SCRIPTS and not files.keys() & {task.name, task.rows_of}]
    if any("=" not in text for text in options.data) and not own:
        yield f"--data {folder_of(options.data)}, as no rows are read from it"
    judged = [task.name for task in tasks if task.judged]
    judges = judges_of(options.judge)
    for name in judges:
        if name and name not in judged:
            yield f"--judge {name}=, as that task is {'not judged by a model' if name in names else 'not asked for'}"
    if "" in judges and all(name in judges for name in judged):
        why = "each task that is judged has its own" if judged else f"none of {', '.join(names)} is judged by a model"
        yield f"--judge {without_secrets(judges[''])}, as {why}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def server_context(tasks: Sequence[Task], options: argparse.Namespace) -> int:
    """Of a server that is started here, tokens."""
    longest = (_heard(task) + (options.max_tokens or task.generation["max_tokens"]) for task in tasks)
    return int(options.context or max(longest))


def _heard(task: Task) -> int:
    """Tokens that a server started here has for a prompt of a task."""
    return {"played": gca.HEARD, "scripted": scripts.HEARD}.get(task.answer, ROOM)


def need_context(wanted: Iterable[Model], tasks: Sequence[Task], options: argparse.Namespace) -> None:
    """Raise `ValueError` for a model to serve here whose positions are fewer than the context: vLLM would refuse it."""
    if os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "").strip().lower() in ("1", "true"):
        return
    context = server_context(tasks, options)
    for model in wanted:
        limit = math.inf if model.is_url else context_of(model.where)
        if context > limit:
            heard = max(map(_heard, tasks))
            how = "as --context says" if options.context else f"{context - heard} of an answer and {heard} of prompt"
            tokens = int(limit - heard if limit > heard else limit // 2)
            raise ValueError(
                f"a server of the model {model.name!r}, {model.where}, needs a context of {context} tokens, {how}, and the "
                f"model has {limit:.0f} positions (config.json). Shorten answers with --max-tokens, or prompt and answer "
                f"with --context; here --max-tokens {tokens} --context {limit:.0f} is the longest that fits."
            )
