"""Rows of a task: from a file or the Hub, drawn once for all models, in the folder and the form that evalscope reads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from .. import atomic
from ..errors import DataError
from ..files import json_lines
from .tasks import Task


def read(task: Task, path: Path, limit: int | None) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file as evalscope reads them; with `limit`, as many, drawn from the whole file.

    A file may be sorted, as MMLU's is by subject, so that its first rows say little of it. The draw depends on the file's
    length and the limit alone: all models see the same rows, in the order of the file.

    Raises `DataError` that names the line for what is not JSON, and for a missing column.
    """
    found = []
    try:
        convert = task.convert if task.opened is None else task.opened(path)
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"rows of the task {task.name}: {error}. {task.source.format(task.name)}.") from None
    text = path.read_text(encoding="utf-8-sig")
    lines = json_lines(text)
    if path.suffix == ".json":  # one list
        try:
            lines = [json.dumps(row) for row in json.loads(text)]
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{str(path)!r}, rows of the task {task.name}, is not a JSON list: {error}.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("is not a JSON object")
            converted = convert(row)
            if converted is not None:
                found.append(converted)
        except KeyError as error:
            raise DataError(f"row {number} of {str(path)!r}, rows of the task {task.name}, has no {error}.") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"line {number} of {str(path)!r}, rows of the task {task.name}: {error}.") from None
    if not found:
        raise DataError(f"{str(path)!r} has no rows for the task {task.name}.")
    if limit is not None and limit < len(found):
        found = [found[place] for place in sorted(random.Random(0).sample(range(len(found)), limit))]
    return found


def write(task: Task, rows: list[dict[str, Any]], folder: Path) -> None:
    """A folder of the job's own: evalscope removes files from the ones it reads."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic.write(folder / f"{task.split}.jsonl", lines)


def find(task: Task, data: Path, given: dict[str, Path]) -> Path:
    """The file with a task's rows: the one given, or `<task>.jsonl` in the folder `data`, fetched from the Hub if need be.

    A task that has the rows of another one has that one's file.
    Raises `DataError` where there is none and the Hub cannot be reached; it says which file to put where.
    """
    names = [name for name in (task.name, task.rows_of) if name]
    path = next((given[name] for name in names if name in given), data / f"{names[-1]}.jsonl")
    if path.is_file():
        return path
    if task.hub is None:
        raise DataError(f"there is no file {str(path)!r}. {task.source.format(task.name)}.")
    dataset, config, split = task.hub
    name = f"{dataset}{f' ({config})' if config else ''}, split {split}"
    if given.keys() & {*names}:
        raise DataError(f"there is no file {str(path)!r} for the task {task.name}. Its rows are those of {name}.")
    try:
        if task.make is not None:
            rows = task.make()
        else:
            import datasets

            rows = datasets.load_dataset(dataset, config, split=split)
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    except Exception as error:  # of the hub's client, the network, or the reader of files: any
        raise DataError(
            f"the rows of the task {task.name} are not there, and the Hub gave none ({type(error).__name__}: "
            f"{str(error)[:200]}). Put the rows of {name}, as JSON Lines into {str(path)!r}, or name a file with "
            f"--data {task.name}=FILE."
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, lines)
    return path
