"""One run, one folder: `output_dir` has the files of a single run, which has an id, and only one trains in it; and how the
files that it adds lines to are written."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import gather_object

from . import atomic, manifest, record, rejected
from .best import keep_patience, quiet_early_stopping
from .errors import CaMOPDError, ResumeError, on_all_ranks
from .folder_lock import FolderLock
from .measured import HELD_OUT, STATE, lines_of
from .output_dir import EVAL_TASKS, METRICS, RUN_FILE, checkpoints_in, need_unused, run_id_of
from .teachers.address import base_of


T = TypeVar("T")
LINES = (METRICS, HELD_OUT, EVAL_TASKS)  # files of lines in output_dir, of what a run measures
logger = logging.getLogger(__name__)


class RunFolder:
    """The folder that a run writes to. All methods are called by all ranks; the main one works, and an error is on all."""

    def __init__(self, output_dir: str | Path, is_main: bool = True):
        self.path, self._is_main = Path(output_dir), is_main
        self._lock = FolderLock(self.path)
        self._begun: str | None = None  # id of the run that this object has begun

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other run trains in the folder inside. Raises `CaMOPDError` when one does, or the folder cannot be written."""
        try:
            self._together(self._lock.take)
            yield
        finally:
            self._lock.release()

    @contextmanager
    def entered(self, trainer: Any, given: str | bool | None) -> Iterator[str | None]:
        """The folder is `locked` inside and that of the trainer's run. Yields the checkpoint that it goes on from."""
        with self.locked():
            checkpoint = trainer.checkpoints.find(given, trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
            trainer.checkpoints.record[record.RUN_ID] = self.begin(
                checkpoint, given, trainer.args.overwrite_output_dir, *_used_by(trainer.run)
            )
            if checkpoint is not None:
                keep_patience(trainer.callback_handler.callbacks, Path(checkpoint))
            with self._evaluated_before(trainer.args, checkpoint), quiet_early_stopping():
                yield checkpoint

    @contextmanager
    def _evaluated_before(self, args: Any, checkpoint: str | None) -> Iterator[None]:
        """Inside, `eval_on_start` is off for a run that goes on and was evaluated before: its start was another one."""
        kept = args.eval_on_start
        if kept and checkpoint is not None:
            step = manifest.read(Path(checkpoint)).get("step", -1)  # the Hub's is not called checkpoint-STEP
            # At step 0 the lines are set aside, as all are of the start or of an earlier run.
            args.eval_on_start = step <= 0 or not self._together(
                lambda: any(line["step"] <= step for line in lines_of(self.path / HELD_OUT))
            )
        try:
            yield
        finally:
            args.eval_on_start = kept

    def begin(self, checkpoint: str | Path | None, given: str | bool | None, overwrite: bool, *used: str) -> str:
        """Make the folder that of a run, and return its id: that of the run it goes on with, or a new one.

        Args:
            checkpoint: that it goes on from, here or elsewhere.
            given: what the user asked for as `resume_from_checkpoint`.
            overwrite: `overwrite_output_dir`, which removes what another run has left.
            used: paths of models that must not be removed so.

        Raises `CaMOPDError` where another run has left files, and `ResumeError` where those of the run to continue
        are to be overwritten, before anything is changed.
        """
        from_here = checkpoint is not None and Path(checkpoint).resolve().parent == self.path.resolve()
        if overwrite and (given is True or given == "auto" or from_here):
            raise ResumeError(
                f"resume_from_checkpoint={given!r} goes on with the run in {str(self.path)!r}, and "
                "overwrite_output_dir=True removes it. Leave one of them out."
            )
        source = Path(checkpoint) if checkpoint is not None else None
        self._begun = self._together(lambda: self._begin(source, from_here, given == "auto", overwrite, used))
        return self._begun

    def _begin(
        self, checkpoint: Path | None, from_here: bool, auto: bool, overwrite: bool, used: Sequence[str]
    ) -> str:
        known = run_id_of(self.path)
        if checkpoint is None:
            run_id = uuid.uuid4().hex
            own = known is not None and known == self._begun  # of an earlier `train` of the same trainer
            if auto:  # a run that was killed before its first checkpoint
                own = all(map(is_own, checkpoints_in(self.path)))
        else:
            named = record.read(checkpoint).get(record.RUN_ID)
            own = from_here or (named is not None and named == known)
            run_id = str(named or (known if from_here else None) or uuid.uuid4().hex)
        if not own:
            need_unused(self.path, overwrite)
        # First the new id: what is not removed in time is no longer this run's.
        leftover = [*checkpoints_in(self.path), self.path / rejected.FOLDER] if overwrite else []
        # A run's model that is there and one of another kind, with an adapter or without, would be loaded as one.
        models = manifest.models_in(self.path) if overwrite and (known or (self.path / METRICS).exists()) else []
        for model in map(Path, used):
            inside = any(model.resolve().is_relative_to(path.resolve()) for path in leftover)
            if inside or (models and model.resolve() == self.path.resolve()):
                raise CaMOPDError(
                    f"overwrite_output_dir=True would remove {str(model)!r}, which the run itself needs. Give another "
                    "output_dir."
                )
        leftover += models
        atomic.write(self.path / RUN_FILE, json.dumps({record.RUN_ID: run_id}) + "\n")
        for path in leftover:
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            else:
                shutil.rmtree(path)
        # What an earlier run has measured is not for the reports of this one.
        if overwrite or checkpoint is None or not own:
            set_aside(*(self.path / name for name in (*LINES, STATE)))
        # The Hub's, which has another name, may lie here, too.
        if checkpoint is not None and not (from_here and manifest.step_of(checkpoint) >= 0):
            copy_lines(checkpoint, self.path)
        return run_id

    def _together(self, work: Callable[[], T]) -> T:
        """What `work` gives on the main rank, on all of them; where it raises, all raise."""
        result: Any = None
        with on_all_ranks(gather_object):
            if self._is_main:
                try:
                    result = work()
                except OSError as error:
                    raise CaMOPDError(
                        f"the output_dir {str(self.path)!r} cannot be used: {error}. Give another one."
                    ) from error
        return gather_object([result])[0]


def _used_by(run: Any) -> list[str]:
    """The student, the model under its adapter, and the teachers, where they are named."""
    named = [run.student_name, *(teacher for teacher in run.teachers.values() if isinstance(teacher, str))]
    return [path for name in named if name for path in dict.fromkeys((os.path.expanduser(name), base_of(name)))]


def is_own(checkpoint: Path) -> bool:
    """Whether a checkpoint is of the run whose folder it lies in; also one that cannot say of which it is."""
    try:
        own = record.read(checkpoint).get(record.RUN_ID)
    except ResumeError:  # not whole, or of something else
        return True
    known = run_id_of(checkpoint.parent)
    return own is None or known is None or own == known


def copy_lines(source: Path, target: Path) -> None:
    """Copy the files of lines of one folder to another: a checkpoint has all that its run has measured up to its step."""
    for name in LINES:
        if (source / name).is_file():
            atomic.write(target / name, (source / name).read_bytes())


def set_aside(*paths: Path) -> None:
    """Rename those files `name.ending` of one folder that are there to `name-1.ending`, or the first number that is free
    for all of them: a number is a run."""
    number = 1
    while any(_numbered(path, number).exists() for path in paths):
        number += 1
    for path in paths:
        if path.exists():
            path.rename(_numbered(path, number))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def best_step(args: Any, state: Any) -> int | None:
    """The step of the model in hand at the end of training, where it is the best one, loaded from its checkpoint."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:  # which another rank may not see
        return None
    return int(state.best_global_step)


# ------------------------------------------------------------------------------------------------------ files of lines


@contextmanager
def named_if_unwritten(path: Path) -> Iterator[None]:
    """An `OSError` inside is a `CaMOPDError` that names the file and the way out."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way = f"The disk or quota of {str(path.parent)!r} is full: free some" if full else "Repair it"
        raise CaMOPDError(
            f"{str(path)!r} cannot be written: {error.strerror or error}. {way}, and go on from the last checkpoint by "
            "`--resume auto` (resume_from_checkpoint='auto'). What was written before is as it was."
        ) from error


def make_room(path: Path, step: int) -> None:
    """Make a file of lines ready for a run that is at this step: those of later steps go, and those that are none; of step
    0 all are of an earlier run. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    if step == 0:
        set_aside(path)
        return
    kept, strange = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        found = _step_of(line)
        if found is None and line.strip() and number < len(lines):  # the last one was cut short; its step comes again
            strange.append(f"line {number} ({line[:60]!r})")
        elif found is not None and found <= step:
            kept.append(line + b"\n")
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        logger.warning(
            "%s: %s%s, not a JSON object with a number `step`, left out", path, ", ".join(strange[:3]), more
        )
    atomic.write(path, b"".join(kept))


def _step_of(line: bytes) -> float | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: also of UTF-8
        return None
    if isinstance(found, dict) and found.keys() == {"step", "loaded"}:
        return math.inf  # which holds no more: training goes on from the last step, and not from that model
    step = found.get("step") if isinstance(found, dict) else None
    if not isinstance(step, (int, float)) or isinstance(step, bool) or step != step or abs(step) == math.inf:
        return None
    return step


def append(path: Path, lines: str, flush: bool = False) -> None:
    """Add whole lines, or nothing: half of one would be read as a step; `flush` waits for the disk. Raises `OSError`."""
    with open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        left = lines.encode()
        try:
            while left:  # of a full disk the first write may take a part, and the second says why
                left = left[file.write(left) :]
            if flush:
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise
