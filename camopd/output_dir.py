"""What an output_dir has of earlier runs, and whether a checkpoint can be gone on from, as far as that can be said without
torch: `camopd train` looks before its imports, and the trainer looks again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import CaMOPDError, ResumeError
from .files import json_lines
from .hub import is_hub_id, public_name
from .manifest import CHECKPOINT, MANIFEST, saved_at
from .schedule import by_step, number_of, short
from .teachers.address import OWN_TEACHERS, is_server, names_missing_folder
from .words import counted


METRICS = "metrics.jsonl"
EVAL_TASKS = "eval_tasks.jsonl"  # what live_tasks.py has measured, row by row
RUN_FILE = "_run.json"  # what begins with _ is never sent to the Hub
RUN_RECORD = "camopd.json"  # in every checkpoint, see record.py
RUN_ID = "run_id"  # in both; run_folder.py says when it must be the same
# Settings that a record has as they are written. A trainer compares all.
_COMPARED = (
    "schedule", "prompts_per_step", "seed", "max_prompt_length", "max_completion_length", "learning_rate", "token_rule",
    "loss_normalization", "branch_weights", "importance_sampling_mode", "loss_prefix_tokens",
)  # fmt: skip


def checkpoints_in(folder: Path) -> list[Path]:
    """What is named like a checkpoint, whole or not."""
    return [path for path in sorted(folder.glob("checkpoint-*")) if CHECKPOINT.fullmatch(path.name)]


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Where it raises inside, a folder that was not there before goes again, with those it stands in, if they are empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in new:
            with suppress(OSError):
                path.rmdir()
        raise


def run_id_of(folder: Path) -> str | None:
    """The id of the run whose files a folder has, or `None` where it does not say."""
    try:
        found = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    run_id = found.get(RUN_ID) if isinstance(found, dict) else None
    return run_id if isinstance(run_id, str) else None


def need_unused(folder: Path, overwrite: bool) -> None:
    """Raise `CaMOPDError` where a new run would find the files of another one, unless it may `overwrite` them."""
    if overwrite:
        return
    found = [path.name for path in [*checkpoints_in(folder), folder / METRICS] if path.exists()]
    if found:
        names = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise CaMOPDError(
            f"the output_dir {str(folder)!r} has the files of another run: {names}. Go on with that run by "
            "`--resume auto` (resume_from_checkpoint='auto'), give this one another output_dir, or set "
            "overwrite_output_dir=True, which removes its checkpoints and model and renames its metrics.jsonl."
            + _whose(folder)
        )


def _whose(folder: Path) -> str:
    """The run whose files a folder has, as far as they say: its student, its steps, and when it was written."""
    newest = _newest(folder)
    student = (_record(newest).get("student") if newest else None) or {}
    facts = [f"of the student {student['name']!r}"] if isinstance(student, dict) and student.get("name") else []
    try:
        lines = json_lines((folder / METRICS).read_text(encoding="utf-8", errors="replace"))
        facts += [counted(json.loads(lines[-1])["step"], "step")]
        at = time.localtime((folder / METRICS).stat().st_mtime)
        facts += [f"last written {time.strftime('%Y-%m-%d %H:%M', at)}"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    return f" That run: {', '.join(facts)}." if facts else ""


def _newest(folder: Path) -> Path | None:
    """The checkpoint that was saved last, of those that seem to be whole."""
    whole = [
        path for path in checkpoints_in(folder) if all((path / name).is_file() for name in (RUN_RECORD, MANIFEST))
    ]
    return max(whole, key=lambda path: (saved_at(path), int(path.name.rpartition("-")[2])), default=None)


def _record(checkpoint: Path) -> dict[str, Any]:
    try:
        found = json.loads((checkpoint / RUN_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def no_checkpoint(folder: Path) -> ResumeError:
    """The error for `resume_from_checkpoint: true` where there is nothing to go on from."""
    return ResumeError(
        f"there is no checkpoint in {str(folder)!r} to go on from. Start without resume_from_checkpoint, or give "
        "the checkpoint's own folder."
    )


def need_same_run_as(given: Any, folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise `ResumeError` where a run with these settings surely cannot go on from the checkpoint that
    `resume_from_checkpoint` means in this output_dir."""
    need_checkpoint(given)
    if str(given).lower() not in ("auto", "true"):
        need_same_run(Path(str(given)), settings)
    elif checkpoints_in(folder):
        newest, known = _newest(folder), run_id_of(folder)
        if newest and (known is None or _record(newest).get(RUN_ID) in (None, known)):
            need_same_run(newest, settings)
    elif str(given).lower() == "true":
        raise no_checkpoint(folder)


def need_checkpoint(given: Any) -> None:
    """Raise `ResumeError` where `resume_from_checkpoint` names neither a checkpoint nor a model of the Hub."""
    if not isinstance(given, str) or given.lower() in ("auto", "true", "false"):
        return
    path = Path(given)
    if path.is_dir():
        newest = None if (path / RUN_RECORD).exists() else _newest(path)
        if newest is not None:
            raise ResumeError(
                f"resume_from_checkpoint={given!r} is the folder of a run, not a checkpoint in it. The newest one is "
                f"{str(newest)!r}; with output_dir={given!r}, `--resume auto` takes it."
            )
        return
    if CHECKPOINT.fullmatch(path.name) or names_missing_folder(given):  # and so no model of the Hub
        newest = _newest(path.parent)
        there = f" The newest one beside it is {str(newest)!r}." if newest else ""
        raise ResumeError(
            f"resume_from_checkpoint={given!r} is not a folder on this machine.{there} Give the folder of a checkpoint, or "
            "`--resume auto` for the newest one in output_dir, or a start."
        )
    if not is_hub_id(given):
        raise ResumeError(
            f"resume_from_checkpoint={given!r} is neither a folder here nor owner/name on the Hub. Give the folder of a "
            "checkpoint, 'true' for the newest one in output_dir, or 'auto' for that or a start."
        )


def need_same_run(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Raise `ResumeError` where the settings that a user has written are surely not those of a checkpoint's run."""
    then = _record(checkpoint)
    now = {name: _plain(name, settings[name]) for name in _COMPARED if name in settings}
    found = [
        f"  {name}: {short(then[name])} then, {short(value)} now"
        for name, value in now.items()
        if value is not None and type(then.get(name)) in (int, float, str) and then[name] != value
    ]
    teachers = settings.get("teachers")
    for branch, teacher in teachers.items() if isinstance(teachers, dict) else ():
        before = then["teachers"].get(branch) if isinstance(then.get("teachers"), dict) else None
        named = isinstance(teacher, str) and teacher not in OWN_TEACHERS and not is_server(teacher)
        if named and isinstance(before, str) and before != public_name(teacher):
            found.append(f"  teacher of {branch}: {short(before)} then, {public_name(teacher)!r} now")
    if found:
        raise ResumeError(
            f"{str(checkpoint)!r} belongs to another run:\n"
            + "\n".join(found)
            + "\nRestore these settings to go on, or "
            "pass the checkpoint as `model` to start a new run from its weights."
        )


def _plain(name: str, value: Any) -> Any:
    """A value as a record has it, or `None` where that takes more than this."""
    try:
        if name == "max_completion_length":
            return max(by_step(name, value).values())
        if name == "learning_rate":
            return number_of(value) if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None
    return value if type(value) in (int, str) else None
