"""Checkpoints: how they are saved whole, which one a run goes on from, and a step kept when the run must stop in it."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import atomic, manifest, record
from .config import CaMOPDConfig
from .errors import CaMOPDError, OtherRankError, ResumeError, RolloutError, TeacherError, on_all_ranks
from .hub import check_trusted, explain_hub_error, hub_errors, is_hub_id
from .learning_rate import of_deepspeed
from .machines import Machine, raise_of_any
from .manifest import SAVING, clean_up, put_in_place, rotate, saved_at, step_of
from .optimizer import local
from .output_dir import METRICS, RUN_RECORD, need_checkpoint, no_checkpoint
from .rollouts import load_rollouts, save_rollouts, set_rng_state
from .run_folder import copy_lines, is_own
from .samples import Sample
from .signals import StopAsked, interrupted
from .step import Step


logger = logging.getLogger(__name__)

FAILURES = (OSError, SafetensorError, RuntimeError, CheckpointException)  # of writing; the last is FSDP2's
OF_TORCH_SAVE = ("inline_container", "iostream error", "PytorchStreamWriter")  # its RuntimeErrors of a full disk
CARD = "README.md"
HUB_CHECKPOINT = "last-checkpoint"  # transformers' name for it
Saved = tuple[Sequence[Sample] | None, int] | None  # rollouts of a step, and how many of their prompts were cut


class RunCheckpoints:
    """The checkpoints of a run. `latest` is the last one that was written, or that the run goes on from.

    `staging` is the folder in which one is being made, see `manifest`.
    """

    def __init__(self, args: CaMOPDConfig, own: dict[str, Any]):
        """`own` is the run's record, as `record_of` makes it."""
        self.args, self.record = args, own
        self._machine = Machine()
        self.latest: Path | None = None
        self.staging: Path | None = None
        self._under_way: Saved = None  # of a step that the next save is to keep
        self._resumed_from: Path | None = None  # the one whose rollouts may be used

    # -------------------------------------------------------------------------------------------------------- finding

    def find(self, given: str | bool | None, unpickles: bool) -> str | None:
        """The checkpoint that `resume_from_checkpoint` means, or `None`; also of a model of the Hub. Called by all ranks.

        `True` is the newest whole one in `output_dir`, and "auto" is that or, where there is none yet, a start.
        `unpickles` says that loading it unpickles it. Raises `ResumeError` when there is none, it is not whole, or it
        belongs to a run with other settings, student, teachers or prompts, before anything is loaded.
        """
        self._machine.in_turn(partial(clean_up, Path(self.args.output_dir)))
        self._resumed_from = None  # of a call of `train` that failed before its first step
        if given in (None, False):
            return None
        if given is True or given == "auto":
            checkpoint = self._newest(required=given is True)
        else:
            checkpoint = Path(str(given))
            if all(gather_object([is_hub_id(str(given))])):
                need_checkpoint(str(given))  # what looks like a path is not a model
                # Of all machines: where one has such a folder and another lacks it, the other would wait in the fetch.
                checkpoint = Path(self._fetch(str(given), unpickles))
            self.need_whole(checkpoint, to_go_on=True)
        if checkpoint is None:
            return None
        check_trusted(checkpoint, self.args.output_dir, unpickles, self.args.trust_checkpoint)
        raise_of_any(partial(record.check, checkpoint, self.record))
        self._compare_processes(checkpoint)
        self.latest = self._resumed_from = checkpoint
        return str(checkpoint)

    def _newest(self, required: bool) -> Path | None:
        """The newest whole checkpoint in `output_dir`, whatever a rank may lack of the newer ones."""
        folder = Path(self.args.output_dir)
        mine = {step: saved_at(path) for path in folder.glob("checkpoint-*") if (step := step_of(path)) >= 0}
        # Of the first process, and then what others have beside it. By time: a run may have gone on from an earlier one.
        known = {step: at for steps in gather_object([mine])[::-1] for step, at in steps.items()}
        left_out: list[str] = []
        for step in sorted(known, key=lambda step: (known[step], step), reverse=True):
            chosen = self.folder(str(folder), step)
            fault = self._fault(chosen)
            if fault is None and not all(gather_object([is_own(chosen)])):
                fault = "it is of another run"
            if fault is None:
                logger.info("going on from %s%s", chosen, "".join(f"; {text}" for text in left_out))
                return chosen
            left_out.append(f"{PREFIX_CHECKPOINT_DIR}-{step} is left out: {fault}")
        if left_out:
            raise ResumeError(
                f"no checkpoint in {str(folder)!r} is whole: {'; '.join(left_out)}. Take another output_dir, or "
                "overwrite_output_dir=True in place of resume_from_checkpoint, to start again."
            )
        if required:
            raise no_checkpoint(folder)
        return None

    def need_whole(self, checkpoint: Path, to_go_on: bool = False) -> None:
        """Raise `ResumeError` on all ranks unless a checkpoint can be loaded, or gone on from."""
        fault = self._fault(checkpoint, to_go_on)
        if fault is not None:
            what = "a run cannot go on from" if to_go_on else "the best model cannot be loaded from"
            raise ResumeError(
                f"{what} {str(checkpoint)!r}: {fault}. resume_from_checkpoint=True takes the newest whole checkpoint of "
                "output_dir. To start from its weights, pass it as `model`."
            )

    def _fault(self, checkpoint: Path, to_go_on: bool = True) -> str | None:
        """Why a run cannot go on from a checkpoint, or load it, as any rank finds it; those of a machine share it."""
        if not (checkpoint / RUN_RECORD).is_file():
            mine: str | None = f"it has no {RUN_RECORD}: it is not a checkpoint of CaMOPDTrainer"
        else:
            mine = manifest.fault(checkpoint, self._machine.part, self._machine.parts)
        if mine is None and to_go_on and not manifest.read(checkpoint).get("resumable"):
            mine = "it was saved with save_only_model=True and has the weights alone"
        return next((fault for fault in gather_object([mine]) if fault), None)

    def _compare_processes(self, checkpoint: Path) -> None:
        then = manifest.read(checkpoint).get("processes")
        plugin = getattr(self.args, "deepspeed_plugin", None)
        universal = (of_deepspeed(self.args, "checkpoint") or {}).get("load_universal")
        if then not in (None, self.args.world_size) and plugin is not None and plugin.zero_stage and not universal:
            raise ResumeError(
                f"{str(checkpoint)!r} was written by {then} processes and the run has {self.args.world_size}: ZeRO's parts "
                f"of the optimizer go to as many as they came from. Launch {then} processes, or start a new run from its "
                "weights by model_name_or_path (where they are in parts, zero_to_fp32.py in it makes them whole)."
            )
        if then != self.args.world_size:
            logger.warning(
                "%s was written by %s processes and the run goes on with %d: each draws other random numbers, so the "
                "rollouts are not those of a run that was not stopped",
                checkpoint, then, self.args.world_size,
            )  # fmt: skip

    def _fetch(self, repo: str, unpickles: bool) -> str:
        """Folder of the last checkpoint that a run with `hub_strategy="checkpoint"` has sent to a model of the Hub.

        Raises `ResumeError` when it cannot be had, or when loading it would unpickle what came over the network, which
        DeepSpeed and FSDP do.
        """
        args = self.args
        sends_there = args.push_to_hub and repo == args.hub_model_id
        revision = args.hub_revision if sends_there else None
        by_hand = (
            f"hf download {repo}{f' --revision {revision}' if revision else ''} --include '{HUB_CHECKPOINT}/*' "
            f"--local-dir DIR, and then resume_from_checkpoint=DIR/{HUB_CHECKPOINT}"
        )
        if unpickles:
            raise ResumeError(
                f"the checkpoint of {repo!r} is not fetched from the Hub: DeepSpeed and FSDP unpickle what they load, and "
                f"a pickle can run any code. If you trust the repository: {by_hand}."
            )
        folder, failure = "", None
        try:
            with self.args.main_process_first(desc="fetching the checkpoint"):
                folder = snapshot_download(repo, revision=revision, allow_patterns=f"{HUB_CHECKPOINT}/*")
        except hub_errors() as error:
            failure = (
                f"resume_from_checkpoint={repo!r} is not a folder here, and as a model of the Hub it cannot be fetched: "
                f"{explain_hub_error(error, repo, 'model')}. Or by hand: {by_hand}."
            )
        failures = [text for text in gather_object([failure]) if text]  # of any machine: the others would wait for it
        if failures:
            raise ResumeError(failures[0])
        if not (Path(folder) / HUB_CHECKPOINT).is_dir():
            raise ResumeError(
                f"{repo!r} on the Hub has no folder {HUB_CHECKPOINT!r}, which a run with hub_strategy='checkpoint' makes. "
                "To start from its weights, pass it as `model`."
            )
        return str(Path(folder) / HUB_CHECKPOINT)

    # --------------------------------------------------------------------------------------------------------- saving

    def folder(self, output_dir: str, step: int) -> Path:
        """That of the checkpoint after so many steps."""
        return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def save(self, trainer: Any, write: Callable[[], None]) -> None:
        """Have `write` make a checkpoint beside, and put it in place when it is whole. Called by all ranks.

        Older ones go by `save_total_limit` only then. Raises `CaMOPDError` when weights or moments are not finite, before
        anything is written, and where the disk does not take it; the checkpoints before are as they were.
        """
        args, state = self.args, trainer.state
        final = self.folder(args.output_dir, state.global_step)
        check_finite(trainer.model, trainer.optimizer, f"after step {state.global_step}", self.latest)
        folder = final.parent / SAVING / final.name
        saved = self._under_way  # or else what is begun of the next step
        if (saved is None or saved[0] is None) and not args.save_only_model:
            saved = trainer.rollouts.drain()
        try:
            self._machine.prepare(folder)
            self._write(trainer, folder, final, write, saved)
            self._commit(trainer, folder, final)
        except FAILURES as error:
            raise self._failed(f"the checkpoint of step {state.global_step}", error, folder) from error
        finally:
            self.staging = None
        self.latest = final
        try:
            trainer.pushes.add(str(final), last=self._under_way is not None)
            if self._machine.commits:
                rotate(final, args.save_total_limit, state.best_model_checkpoint)
                with suppress(OSError):  # it is not empty
                    folder.parent.rmdir()
        except OSError as error:  # the checkpoint is there
            logger.warning("after the save of %s: %s", final, error)
        trainer.accelerator.wait_for_everyone()  # a rank that ends would have its launcher end one that still sends

    def save_model(self, trainer: Any, output_dir: str | None, write: Callable[[str], None], check: bool) -> None:
        """Have `write` make the files of the model in hand: those of a checkpoint, or in `output_dir`.

        There they are made beside, so that a file that is there is replaced by a whole one. Raises `CaMOPDError` where the
        disk does not take them, and with `check` before that where weights are not finite. Unless they are in shards, each
        rank looks for itself: the main process may save them alone.
        """
        if self.staging is not None:
            write(str(output_dir))
            return
        if check:
            alone = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
            check_finite(trainer.model, None, "of the finished model", self.latest, alone=alone)
        final = Path(output_dir or self.args.output_dir)
        # Of each machine its own, where each saves; but DeepSpeed's ranks may write shards together.
        writer = self.args.process_index if self.args.should_save and not trainer.is_deepspeed_enabled else 0
        folder = final / SAVING / f"model-{writer}"
        try:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
                if (final / CARD).is_file():  # PEFT fills in the one that it finds, and else writes an empty one
                    folder.mkdir(parents=True)
                    shutil.copyfile(final / CARD, folder / CARD)
            with _whole(getattr(trainer.accelerator.state, "fsdp_plugin", None)):
                write(str(folder))
            if self.args.should_save and folder.is_dir():
                manifest.move_in(folder, final)
        except FAILURES as error:
            raise self._failed("the finished model", error, folder) from error

    def _failed(self, what: str, error: BaseException, folder: Path) -> CaMOPDError:
        """What is said where files cannot be written in a folder, which goes. An error of another kind is raised again."""
        if isinstance(error, RuntimeError) and not (
            isinstance(error, OtherRankError) or any(words in str(error) for words in OF_TORCH_SAVE)
        ):
            raise error  # of another rank that is gone, say
        place = folder.parent.parent
        free = shutil.disk_usage(place if place.is_dir() else ".").free / 2**30
        before = f"the last one, {str(self.latest)!r}, is whole" if self.latest else "there is none yet"
        manifest.leave(folder)
        return CaMOPDError(
            f"{what} cannot be written to {str(place)!r}, where {free:.2f} GiB are free: {error}. Of checkpoints, {before}."
            " Make room, and go on with resume_from_checkpoint='auto'."
        )

    def _write(self, trainer: Any, folder: Path, final: Path, write: Callable[[], None], saved: Saved) -> None:
        """What goes into a checkpoint. What fails in `write` fails on one rank alone: transformers has collectives of its
        own in there, and the launcher ends the ranks that wait in them."""
        state = trainer.state
        with on_all_ranks(gather_object):
            if self.args.should_save:
                atomic.write(folder / RUN_RECORD, json.dumps(self.record, indent=2) + "\n")
        self.staging = folder.parent  # where `write` finds its `output_dir`
        write()
        self.staging = None
        samples, prompts_cut = saved or (None, 0)
        if samples is not None:
            save_rollouts(samples, prompts_cut, self._rollouts_file(folder))
        if not self.args.save_only_model:
            trainer.notify("on_saving", folder)
        if state.best_global_step:  # which `write` has looked for in the folder beside
            best = self.folder(self.args.output_dir, state.best_global_step)
            if best == final or best.is_dir():
                state.best_model_checkpoint = str(best)
        if self.args.should_save:
            atomic.flush(final.parent / METRICS)  # so that no line before the checkpoint is lost with the power
            if not self.args.save_only_model:  # for a run that goes on from it in another folder
                copy_lines(final.parent, folder)
            state.save_to_json(str(folder / TRAINER_STATE_NAME))
        trainer.accelerator.wait_for_everyone()

    def _commit(self, trainer: Any, folder: Path, final: Path) -> None:
        """Manifest and rename. The ranks of a machine share the hashing; where machines have disks of their own, each has a
        checkpoint of what its ranks have written."""
        mine = self._machine
        names = manifest.files_in(folder)[mine.part :: mine.parts] if mine.commits or mine.part else []
        entries = raise_of_any(partial(manifest.entries, folder, names, flush=True), FAILURES)
        found = {name: entry for place, each in gather_object([(mine.name, entries)]) if place == mine.name
                 for name, entry in each.items()}  # fmt: skip

        def commit() -> None:
            if mine.commits and folder.is_dir():
                manifest.write(
                    folder, found, step=trainer.state.global_step, processes=self.args.world_size,
                    resumable=not self.args.save_only_model, saved=time.time(),
                )  # fmt: skip
                put_in_place(folder, final)

        raise_of_any(commit, FAILURES)

    # ------------------------------------------------------------------------------------- a step that is not trained yet

    def keep_step(self, trainer: Any, samples: Sequence[Sample] | None, prompts_cut: int = 0) -> Path:
        """A checkpoint of where training stands, with the `samples` of the step under way; all ranks. Gives its folder."""
        args = self.args
        folder = self.folder(args.output_dir, trainer.state.global_step)
        is_there = self.latest is not None and self.latest.resolve() == folder.resolve()
        if is_there and samples is None and not args.save_only_model:
            return folder
        only_model, args.save_only_model = args.save_only_model, False  # this one is there to go on from
        self._under_way = (samples, prompts_cut)
        try:
            trainer._save_checkpoint(trainer.model, trial=None)
        finally:
            args.save_only_model, self._under_way = only_model, None
        return folder

    def saved_rollouts(self, trainer: Any, rows: Sequence[dict[str, Any]]) -> tuple[list[Sample], int] | None:
        """The rollouts that a stopped run left for this very step, and how many of their prompts were cut; all ranks have
        theirs or none uses any."""
        if self._resumed_from is None:
            return None
        folder, self._resumed_from = self._resumed_from, None  # for the first step after resume, and no other
        path = self._rollouts_file(folder)
        listed = path.name in manifest.read(folder)["files"]  # one that is not was left by another checkpoint
        found = load_rollouts(path, rows) if listed else None
        all_found = all(gather_object([found is not None]))
        if found is None or not all_found:
            return None
        logger.info("the rollouts of this step come from %s", folder)
        prompts = [sample.token_ids[: sample.prompt_len] for sample in found[0]]
        for sample, seen in zip(found[0], trainer.teacher_prompts.ids(rows, prompts), strict=True):
            sample.teacher_prompt = seen
        trainer.notify("on_rolled_out", found[0])
        trainer._load_rng_state(str(folder))  # as when these had been drawn; step 0's loader has drawn since
        return found

    @contextmanager
    def keeping(self, trainer: Any, step: Step | None = None) -> Iterator[None]:
        """Where a teacher or rollout server is gone or a signal asks to stop inside, a checkpoint of where training stands,
        with what `step` has rolled out.

        The error is raised again with the way to go on; a signal ends in `RunInterrupted`. Called by all ranks, on which
        both are raised together.
        """
        try:
            yield
        except (TeacherError, RolloutError, StopAsked) as error:
            done, samples = trainer.state.global_step, None
            signals = [name for name in gather_object([trainer.stops.heard]) if name]
            if step is not None:
                cut = isinstance(error, StopAsked) and error.cut
                samples = step.samples if step.rng_after and not cut else None
                set_rng_state(step.rng_before if samples is None else step.rng_after)
            # FSDP2 makes moments to save by a step without gradients, which the first one would be counted after.
            if not done and (samples is None or trainer.is_fsdp_enabled):
                if not signals:
                    raise
                raise interrupted(f"{signals[0]}: stopped before the first step was made; start again.") from None
            folder = self.keep_step(trainer, samples, 0 if step is None else step.prompts_cut)
            what = f"the weights after step {done} are"
            if samples is not None:
                what = f"the weights before step {done + 1} and its rollouts are"
            if signals:
                raise interrupted(
                    f"{signals[0]}: stopped; {what} in {str(folder)!r}. Go on with `camopd train ... --resume auto` or "
                    "trainer.train(resume_from_checkpoint='auto')."
                ) from None
            kind, which = (RolloutError, "server") if isinstance(error, RolloutError) else (TeacherError, "teacher")
            raise kind(
                f"{error}\nNothing is lost: {what} in {str(folder)!r}. Fix the {which} and resume_from_checkpoint="
                f"{str(folder)!r}{'' if samples is None else '; the step goes on with scoring'}."
            ) from None

    def _rollouts_file(self, folder: Path) -> Path:
        return folder / f"rollouts-{self.args.process_index}-of-{self.args.world_size}.safetensors"


def check_finite(model: Any, optimizer: Any, when: str, latest: Path | None, alone: bool = False) -> None:
    """Raise `CaMOPDError` on all ranks unless all weights and the optimizer's moments are finite. One pass over them.

    `alone` is for what one rank may call, which then raises there.
    """
    states = getattr(optimizer, "state", None) or {}
    # ZeRO-3 has shards in `ds_tensor`.
    weights = [getattr(weight, "ds_tensor", weight) for weight in model.parameters() if weight.requires_grad]
    states = [state for state in states.values() if isinstance(state, dict)]
    moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    broken = []
    for tensors in (weights, moments):
        parts = [part for tensor in tensors for part in _parts(local(tensor.detach()))]
        floats = [part for part in parts if part.is_floating_point()]
        broken.append((sum(int((~tensor.isfinite()).sum()) for tensor in floats), sum(map(torch.numel, floats))))
    found = [broken] if alone else gather_object([broken])
    for place, name in enumerate(("weights", "moments of the optimizer")):
        bad, total = (max(counts[place][which] for counts in found) for which in range(2))
        if bad:
            way = f"Go on from {str(latest)!r}" if latest else "Start again"
            raise CaMOPDError(
                f"{bad} of {total} {name} {when} are not finite, so nothing is saved: the model is ruined. {way} with a "
                "lower learning_rate or max_grad_norm, and look at loss and grad_norm in metrics.jsonl."
            )


def _parts(tensor: Any) -> list[torch.Tensor]:
    """A tensor, or those that one of 8 bits is made of, which says that it is float32 and knows no `isfinite`."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


@contextmanager
def _whole(plugin: Any) -> Iterator[None]:
    """Inside, FSDP gathers what is saved: a finished model in shards, as a checkpoint may be, could be loaded by nobody."""
    if plugin is None:
        yield
        return
    kind = plugin.state_dict_type
    try:
        plugin.set_state_dict_type("FULL_STATE_DICT")
        yield
    finally:
        plugin.set_state_dict_type(kind)
