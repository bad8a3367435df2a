"""What a run must still be to go on from a checkpoint, where that lies, and a step kept when its teacher is gone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from huggingface_hub import snapshot_download
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from .config import CaMOPDConfig
from .errors import ResumeError, TeacherError
from .hub import explain_hub_error, hub_errors, is_hub_id, public_name
from .prompts import fingerprint
from .rollouts import load_rollouts, save_rollouts
from .samples import Sample
from .schedule import Schedule
from .settings import OLD_NAMES
from .teachers.base import Teacher


logger = logging.getLogger(__name__)

HUB_CHECKPOINT = "last-checkpoint"  # transformers' name for it
RUN_RECORD = "camopd.json"  # in every checkpoint
_RECORDED = (
    "prompts_per_step", "seed", "data_seed", "max_prompt_length", "max_completion_length", "learning_rate",
    "importance_sampling_mode", "importance_sampling_low", "importance_sampling_high", "loss_prefix_tokens",
    "optimizer_moments", "student_logps", "token_rule", "relaxed_mixture", "relaxed_entropy_share",
    "relaxed_exploration_steps", "selectkd_reject_weight", "loss_normalization", "branch_weights",
)  # fmt: skip


def record_of(
    args: CaMOPDConfig, schedule: Schedule, teachers: dict[str, Teacher], prompts: dict[str, Any]
) -> dict[str, Any]:
    """What a run must still be when it goes on, as it is written into every checkpoint."""
    return {
        "schedule": str(schedule),
        "branches": list(schedule.branches),
        # Without folders: a checkpoint may be published, and go on where the same model lies elsewhere.
        "teachers": {branch: public_name(teacher.name) for branch, teacher in teachers.items()},
        "prompts": {branch: fingerprint(dataset) for branch, dataset in prompts.items()},
        **{name: args.per_branch(name) for name in ("mass_target", "scale", "score", "selection")},
        # learning_rate, too: the optimizer state of a checkpoint would go on at its own
        **{name: getattr(args, name) for name in _RECORDED},
        "completion_lengths": args.completion_lengths and str(args.completion_lengths),
    }


class RunCheckpoints:
    """The checkpoints of a run. `latest` is the last one that was written, or that the run goes on from."""

    def __init__(self, args: CaMOPDConfig, record: dict[str, Any]):
        """`record` as `record_of` makes it."""
        self.args, self.record = args, record
        self.latest: Path | None = None
        self._resumed_from: Path | None = None  # the one whose rollouts may be used

    def folder(self, output_dir: str, step: int) -> Path:
        """That of the checkpoint after so many steps."""
        return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def find(self, given: str | bool | None, unpickles: bool) -> Any:
        """The checkpoint that `resume_from_checkpoint` means, or `None`; also of a model of the Hub. Called by all ranks.

        `unpickles` says that loading it unpickles it. Raises `ResumeError` when there is none, or it belongs to a run with
        another schedule, other teachers, prompts, seed or settings of the method, before anything is loaded.
        """
        checkpoint: Any = given
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.args.output_dir))
            if checkpoint is None:
                raise ResumeError(
                    f"there is no checkpoint in {self.args.output_dir!r} to go on from. Start without "
                    "resume_from_checkpoint, or give the checkpoint's own folder."
                )
        elif isinstance(checkpoint, str) and all(gather_object([is_hub_id(checkpoint)])):
            # Of all machines: where one has such a folder and another lacks it, the other would wait in the fetch.
            checkpoint = self._fetch(checkpoint, unpickles)
        if checkpoint:
            self._check_record(Path(str(checkpoint)))
            self.latest = self._resumed_from = Path(str(checkpoint))
        return checkpoint

    def _fetch(self, repo: str, unpickles: bool) -> str:
        """Folder of the last checkpoint that a run with `hub_strategy="checkpoint"` has sent to a model of the Hub.

        Raises `ResumeError` when it cannot be had, or when loading it would unpickle what came over the network, which
        DeepSpeed and FSDP do.
        """
        by_hand = (
            f"hf download {repo} --include '{HUB_CHECKPOINT}/*' --local-dir DIR, and then resume_from_checkpoint="
            f"DIR/{HUB_CHECKPOINT}"
        )
        if unpickles:
            raise ResumeError(
                f"the checkpoint of {repo!r} is not fetched from the Hub: DeepSpeed and FSDP unpickle what they load, and "
                f"a pickle can run any code. If you trust the repository: {by_hand}."
            )
        folder, failure = "", None
        try:
            with self.args.main_process_first(desc="fetching the checkpoint"):
                folder = snapshot_download(repo, allow_patterns=f"{HUB_CHECKPOINT}/*")
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

    def _check_record(self, checkpoint: Path) -> None:
        path = checkpoint / RUN_RECORD
        if not path.is_file():
            raise ResumeError(
                f"{str(checkpoint)!r} has no {RUN_RECORD}: it is not a checkpoint of CaMOPDTrainer. To start from its "
                "weights, pass it as `model`."
            )
        then = {
            OLD_NAMES.get(name, name): value for name, value in json.loads(path.read_text(encoding="utf-8")).items()
        }
        differences = [
            f"  {name}: {then.get(name)!r} then, {now!r} now"
            for name, now in self.record.items()
            if then.get(name) != now
        ]
        if differences:
            raise ResumeError(
                f"{str(checkpoint)!r} belongs to another run:\n"
                + "\n".join(differences)
                + "\nRestore these settings to go "
                "on, or pass the checkpoint as `model` to start a new run from its weights."
            )

    def begin(self, folder: Path) -> None:
        """Write the record into the folder of a checkpoint, before the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN_RECORD).write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")
        for stale in folder.glob("rollouts-*"):  # of a run that wrote here before
            stale.unlink()

    def saved_rollouts(
        self, rows: Sequence[dict[str, Any]], load_rng_state: Callable[[str], None]
    ) -> tuple[list[Sample], int] | None:
        """The rollouts that a stopped run left for this very step, and how many of their prompts were cut; all ranks have
        theirs or none uses any."""
        if self._resumed_from is None:
            return None
        folder, self._resumed_from = self._resumed_from, None  # for the first step after resume, and no other
        found = load_rollouts(self._rollouts_file(folder), rows)
        all_found = all(gather_object([found is not None]))
        if found is None or not all_found:
            return None
        logger.info("the rollouts of this step come from %s", folder)
        load_rng_state(str(folder))  # as it was when these had been drawn; step 0's loader has drawn since
        return found

    @contextmanager
    def saving_if_teacher_fails(
        self, trainer: Any, samples: Sequence[Sample] | None = None, prompts_cut: int = 0
    ) -> Iterator[None]:
        """Where a teacher is gone inside, a checkpoint of where training stands, with the `samples` that it was to score.

        The error is raised again with the way to go on. Called by all ranks, on which it is raised together.
        """
        try:
            yield
        except TeacherError as error:
            step = trainer.state.global_step
            folder = self.folder(trainer._get_output_dir(trial=None), step)
            self._keep_step(trainer, folder, samples, prompts_cut)
            what, then = f"the weights after step {step} are", ""
            if samples is not None:
                what = f"the weights before step {step + 1} and its rollouts are"
                then = "; the step goes on with scoring"
            raise TeacherError(
                f"{error}\nNothing is lost: {what} in {str(folder)!r}. Fix the teacher and resume_from_checkpoint="
                f"{str(folder)!r}{then}."
            ) from None

    def _keep_step(self, trainer: Any, folder: Path, samples: Sequence[Sample] | None, prompts_cut: int) -> None:
        args = self.args
        only_model, args.save_only_model = args.save_only_model, False  # this one is there to go on from
        push, args.push_to_hub = args.push_to_hub, False  # not before it is whole
        if only_model or self.latest is None or self.latest.resolve() != folder.resolve():
            trainer._save_checkpoint(trainer.model, trial=None)
        elif samples is not None:
            trainer._save_rng_state(str(folder))  # the weights are there; what has changed is that the step was drawn
        args.save_only_model, args.push_to_hub = only_model, push
        trainer.accelerator.wait_for_everyone()
        if samples is not None:
            save_rollouts(samples, prompts_cut, self._rollouts_file(folder))
        trainer.accelerator.wait_for_everyone()
        trainer.pushes.add(str(folder), last=True)
        trainer.accelerator.wait_for_everyone()

    def _rollouts_file(self, folder: Path) -> Path:
        return folder / f"rollouts-{self.args.process_index}-of-{self.args.world_size}.safetensors"
