"""One run, one folder: `output_dir` has the files of a single run, which has an id, and only one trains in it."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import gather_object

from . import atomic, record, rejected
from .errors import CaMOPDError, ResumeError, on_all_ranks
from .folder_lock import FolderLock
from .measured import HELD_OUT
from .output_dir import EVAL_TASKS, METRICS, RUN_FILE, checkpoints_in, need_unused, run_id_of


T = TypeVar("T")


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
                checkpoint, given, trainer.args.overwrite_output_dir, trainer.run.student_name
            )
            yield checkpoint

    def begin(
        self, checkpoint: str | Path | None, given: str | bool | None, overwrite: bool, student: str = ""
    ) -> str:
        """Make the folder that of a run, and return its id: that of the run it goes on with, or a new one.

        Args:
            checkpoint: that it goes on from, here or elsewhere.
            given: what the user asked for as `resume_from_checkpoint`.
            overwrite: `overwrite_output_dir`, which removes what another run has left.
            student: a path that must not be removed so.

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
        self._begun = self._together(lambda: self._begin(source, from_here, given == "auto", overwrite, student))
        return self._begun

    def _begin(self, checkpoint: Path | None, from_here: bool, auto: bool, overwrite: bool, student: str) -> str:
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
        if student and any(Path(student).resolve().is_relative_to(path.resolve()) for path in leftover):
            raise CaMOPDError(
                f"overwrite_output_dir=True would remove the student itself, {student!r}. Give another output_dir."
            )
        atomic.write(self.path / RUN_FILE, json.dumps({record.RUN_ID: run_id}) + "\n")
        for path in leftover:
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            else:
                shutil.rmtree(path)
        for path in (self.path / METRICS, self.path / HELD_OUT, self.path / EVAL_TASKS):
            if overwrite and checkpoint is not None and path.exists():
                set_aside(path)  # a run that begins at step 0 does so itself
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


def is_own(checkpoint: Path) -> bool:
    """Whether a checkpoint is of the run whose folder it lies in; also one that cannot say of which it is."""
    try:
        own = record.read(checkpoint).get(record.RUN_ID)
    except ResumeError:  # not whole, or of something else
        return True
    known = run_id_of(checkpoint.parent)
    return own is None or known is None or own == known


def set_aside(path: Path) -> None:
    """Rename a file `name.ending` to the first of `name-1.ending`, `name-2.ending`, ... that is free."""
    number = 1
    while path.with_name(f"{path.stem}-{number}{path.suffix}").exists():
        number += 1
    path.rename(path.with_name(f"{path.stem}-{number}{path.suffix}"))
