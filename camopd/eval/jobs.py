"""One model on one task is one folder and one process in the environment of evalscope, which goes on where it stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .. import atomic
from ..errors import CaMOPDError
from ..folder_lock import NO_FLOCK
from ..teachers.address import SECRET
from . import rows
from .asking import key_of, without_key
from .runner import cut_torn_line
from .tasks import Task
from .verdicts import VERDICTS


PYTHON = ".venv-eval/bin/python"
ANSWERS = "answers.jsonl"
KEY = "CAMOPD_EVAL_API_KEY"
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # for a model that is loaded by camopd itself
JOB = "job.json"
LOG = "log.txt"
LOCK = "lock"
_PLACES = ("url", "context", "work", "concurrency", "checkout")  # of a job: where and how fast, not what
_UNPARSED = ("zebralogicbench",)  # of evalscope: its checker raises at an answer in another form, which is a wrong one


def python_of_evalscope() -> str:
    """The Python that has evalscope. Raises `CaMOPDError` where there is none."""
    asked = os.environ.get("CAMOPD_EVAL_PYTHON")
    found = shutil.which(os.path.expanduser(asked or PYTHON))
    if found is None:
        raise CaMOPDError(
            f"there is no {asked or PYTHON}, the environment that has evalscope. `make .venv-eval/installed` in a clone of "
            "camopd makes it; CAMOPD_EVAL_PYTHON names one elsewhere."
        )
    return os.path.abspath(found)  # not resolved: under its own name it is the environment's


def job_of(
    task: Task, folder: Path, served: str, context: int | None, max_tokens: int | None, concurrency: int
) -> dict[str, Any]:
    """The job of one model and one task, as runner.py reads it."""
    written = {} if max_tokens is None or task.answer == "weighed" else {"max_tokens": max_tokens}
    generation = task.generation | written
    args = {
        "local_path": str(folder / "rows"),
        "subset_list": ["default"],  # another needs a README.md that names its files
        "few_shot_num": 0,  # GSM8K's default is 4, MMLU's 5
        "filters": {"remove_until": "</think>"},
        **task.dataset_args,
    }
    return {
        "benchmark": task.benchmark, "dataset_args": args, "work": str(folder / "work"), "url": None, "model": served,
        "generation": generation | {"timeout": 3600, "retries": 3, "retry_interval": 5}, "repeats": task.repeats,
        "concurrency": concurrency, "seed": 0, "context": context, "metric": task.metric,
        "unscored_is_wrong": task.benchmark in _UNPARSED,
    }  # fmt: skip


def weights_of(path: Path) -> str | None:
    """Changes when the files of a model's folder do; `None` where there is no such folder."""
    if not path.is_dir():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors", ".bin", ".jinja"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Hold the folder of a job; gives a descriptor that its process is to inherit, and that `note` takes.

    The lock is the kernel's and ends with the last process that has the descriptor: a job's own lives on where its command
    was killed, and would write beside another's. Raises `CaMOPDError` while there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            process, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").partition(" ")
            raise CaMOPDError(
                f"process {process} on {host} is at work in {str(folder)!r}: another command, or what one that was killed "
                f"has left running. Wait for its end, end it there (`kill {process}`), or give another --out."
            ) from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
        note(descriptor, os.getpid())
        yield descriptor
    finally:
        os.close(descriptor)


def note(descriptor: int, process: int) -> None:
    """Say which process, on this machine, works in a job's folder."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{process} {socket.gethostname()}".encode(), 0)


def prepare(
    task: Task, job: dict[str, Any], weights: str | None, found: Sequence[dict[str, Any]], folder: Path
) -> None:
    """Write the folder of a job on the rows `found`.

    Raises `CaMOPDError` where the folder has answers of another model, other rows or other sampling; where it has none, all
    of these may change.
    """
    args = {name: value for name, value in job["dataset_args"].items() if name != "local_path"}
    content = json.dumps(found, sort_keys=True).encode()
    told = {name: value for name, value in job.items() if name not in _PLACES} | {
        "dataset_args": args,
        "weights": weights,
        "rows": f"{len(found)} rows, sha256 {hashlib.sha256(content).hexdigest()}",
    }
    path = folder / JOB
    if path.exists() and has_answers(folder):
        before = json.loads(path.read_text(encoding="utf-8")).get("told", {})
        changed = [name for name in told if before.get(name) != told[name]]
        if changed:
            pair = [json.dumps(side.get(changed[0]))[:200] for side in (before, told)]
            raise CaMOPDError(
                f"{str(folder)!r} has answers that were made with another {', another '.join(changed)}: {changed[0]} was "
                f"{pair[0]} and is {pair[1]}. Give another --out, or remove the folder."
            )
    elif not has_answers(folder):  # a job that has come to nothing; evalscope would compare its settings
        shutil.rmtree(folder / "work", ignore_errors=True)
    rows.write(task, list(found), folder / "rows")
    atomic.write(path, json.dumps({"told": told, **job}, indent=1) + "\n")


def set_url(folder: Path, url: str) -> None:
    """Say where the model of a job answers."""
    path = folder / JOB
    job = json.loads(path.read_text(encoding="utf-8"))
    atomic.write(path, json.dumps(job | {"url": f"{url.rstrip('/')}/v1"}, indent=1) + "\n")


def words(python: str, folder: Path) -> list[str]:
    """The command line that does the job of a folder."""
    return [python, str(Path(__file__).with_name("runner.py")), str(folder / JOB), str(folder / ANSWERS)]


def words_of_options(folder: Path) -> list[str]:
    """The same for a task whose options are weighed, by this Python, which imports nothing from the folder it is in."""
    code = (
        f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); "
        f"from {__package__}.likelihood import main; main(*sys.argv[1:])"
    )
    return [sys.executable, "-P", "-c", code, str(folder / JOB), str(folder / ANSWERS)]


def environment(*kept: str) -> dict[str, str]:
    """That of a job: this one, without any key but that of the models' servers and those `kept`."""
    return {name: value for name, value in os.environ.items() if name in (KEY, *kept) or not SECRET.search(name)}


def hide_key(folder: Path) -> None:
    """Take the key of the models' servers out of what a job has said: a server that refuses it may have repeated it.

    That is its logs, and in its answers what is told of an error. The model's own words are what is judged, and stay.
    """
    hide = partial(without_key, key=key_of(KEY))
    for path in (folder / LOG, *(folder / "work" / "logs").rglob("*.log")):
        if path.is_file():
            _change(path, hide)
    for path in files_of_answers(folder):
        cut_torn_line(path)  # which a kill leaves, and which is no JSON
        _change(path, lambda text: "\n".join(_without_key(line, hide) for line in text.split("\n")))


def _change(path: Path, how: Callable[[str], str]) -> None:
    text = path.read_bytes().decode(errors="surrogateescape")
    changed = how(text)
    if changed != text:
        atomic.write(path, changed.encode(errors="surrogateescape"))


def _without_key(line: str, hide: Callable[[str], str]) -> str:
    """An answer as it is kept, without the key in any of its fields whose name has `error` in it, or below."""

    def shown(value: Any, of_error: bool = False) -> Any:
        if isinstance(value, dict):
            return {name: shown(each, of_error or "error" in name.lower()) for name, each in value.items()}
        if isinstance(value, list):
            return [shown(each, of_error) for each in value]
        return hide(value) if of_error and isinstance(value, str) else value

    try:
        answer = json.loads(line) if "error" in line.lower() else None
    except ValueError:  # what cannot be read is said where it is
        return line
    return line if shown(answer) == answer else json.dumps(shown(answer))


def failed(folder: Path, total: int) -> CaMOPDError:
    """What a job that has ended with an error has met."""
    return CaMOPDError(
        f"{folder} has {answered(folder)} of {total} answers, and then failed: {last_error(folder / LOG)}\nThe same "
        f"command goes on from there. All that it said is in {folder / LOG}."
    )


def answered(folder: Path) -> int:
    """Answers that the engine has written so far."""
    return sum(path.read_bytes().count(b"\n") for path in files_of_answers(folder))


def files_of_answers(folder: Path) -> list[Path]:
    """Files in which evalscope has its answers, or LiveBench."""
    work = folder / "work"
    return [*(work / "predictions").rglob("*.jsonl"), *sorted(work.glob("data/**/model_answer/*.jsonl"))]


def finished(folder: Path) -> bool:
    """Whether a job has all of its answers, and none of them is a server's failure, which has no text."""
    path = folder / ANSWERS
    return path.is_file() and b'"text": null' not in path.read_bytes()


def has_answers(folder: Path) -> bool:
    """Whether there are answers of a job, all or the first ones, or scenes that were played for it."""
    played = folder / "work" / VERDICTS
    lines = played.read_text(encoding="utf-8").split("\n") if played.is_file() else []  # the last one may be cut
    scenes = any(line.strip() and '"failed":' not in line for line in lines)
    return (folder / ANSWERS).is_file() or scenes or answered(folder) > 0


def last_error(log: Path) -> str:
    """The last line of a log that names an exception, or its last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return last_exception(text) or (lines or ["it said nothing"])[-1][:600]


def last_exception(text: str) -> str | None:
    """The last line that names an exception."""
    named = [line for line in text.split("\n") if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return named[-1][:600] if named else None
