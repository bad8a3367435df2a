"""`camopd train`: a run as its YAML file says."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TeacherError
from ..output_dir import need_checkpoint, need_unused
from ..run import (
    longest_sequence,
    need_prompts,
    parse,
    read_settings,
    teachers_of,
    warn_of_unused,
    where_from,
)
from ..teachers.address import OWN_TEACHERS
from ..words import command
from .ctrl_c import ends_at_once


if TYPE_CHECKING:
    from ..files import ToPrompt


def train(config: str, overrides: list[str], to_prompt: Mapping[str, ToPrompt] | None = None) -> None:
    """Train as a YAML file says, with `--name value` overrides; goes on from `--resume_from_checkpoint`, or `--resume`.

    `to_prompt` makes a prompt of a row of a branch, as in [`camopd.files.load_prompts`]. Raises `ValueError` for settings
    that cannot be, `TeacherError` for a server that does not answer.
    """
    with ends_at_once(requeue=True):  # before training nothing has begun, and what comes after it is made again
        trainer = make_trainer(config, overrides, to_prompt)
        args = trainer.args
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(args.output_dir)
        trainer.save_state()  # with the held-out gaps, for `camopd sweep`
        trainer.create_model_card()
        if args.push_to_hub:
            trainer.push_to_hub()
        trainer.accelerator.end_training()
    if args.process_index == 0:
        report = f"{command()} report {shlex.quote(args.output_dir)}"
        print(f"The model is in {args.output_dir}; `{report}` draws the run.", flush=True)


def make_trainer(
    config: str,
    overrides: list[str],
    to_prompt: Mapping[str, ToPrompt] | None = None,
    measure: str | None = None,
    folder: str = "",
) -> Any:
    """The trainer of a run. With `measure`, a model in place of the run's student, it is there to be evaluated: the model
    gets no adapter, nothing is reported, and the output_dir is `folder`.

    Raises what `train` does.
    """
    # The servers first: what is wrong with one shows before seconds of imports, and before prompts and models are fetched.
    settings = read_settings(config, overrides)
    if not settings.get("verbose"):  # also those of the libraries' imports, and of the settings that are read
        warnings.filterwarnings("ignore", category=FutureWarning)
    teachers = _connect(settings)

    _reach_rollout_servers(settings)

    from trl import get_peft_config, get_quantization_config

    from ..files import load_all
    from ..late_settings import note
    from ..trainer import CaMOPDTrainer

    prompts, model, args = parse(config, overrides)
    quiet(args.verbose)
    if measure is not None:
        model.model_name_or_path, model.use_peft = measure, False
        args.output_dir, args.report_to, args.push_to_hub, args.resume_from_checkpoint = folder, [], False, None
        args.divergence, args.baseline = "sampled", "none"  # what is measured; any teacher can give it
        note(args)
        if not prompts.eval_prompts:
            raise ValueError(
                f"{config!r} has no eval_prompts to measure {measure!r} on. Add them, in the form of `prompts`, or give "
                "--eval_prompts."
            )
    # Both would be said by the trainer, too, after models are loaded.
    need_checkpoint(args.resume_from_checkpoint)
    if not args.resume_from_checkpoint:
        need_unused(Path(args.output_dir), args.overwrite_output_dir)
    need_prompts(prompts, args)
    if measure is None:
        warn_of_unused(prompts, args)
        _say_what_is_loaded(teachers, args)
    return CaMOPDTrainer(
        model=model.model_name_or_path,
        teachers=teachers,
        args=args,
        train_dataset=load_all(prompts.prompts, to_prompt),
        eval_dataset=load_all(prompts.eval_prompts, to_prompt) if prompts.eval_prompts else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def _connect(settings: dict[str, Any]) -> dict[str, Any]:
    """The teachers of a run, with its servers connected."""
    from ..teachers.vllm.teacher import connect_servers

    timeout = settings.get("teacher_timeout", settings.get("teacher_patience", 900.0))
    try:
        return connect_servers(
            teachers_of(settings), longest_sequence(settings), timeout if type(timeout) in (int, float) else 900.0
        )
    except TeacherError as error:
        notes = {where_from(settings, branch, error) for branch in settings["teachers"] if repr(branch) in str(error)}
        raise TeacherError(f"{error}{''.join(notes)}") from None


def _say_what_is_loaded(teachers: Mapping[str, Any], args: Any) -> None:
    for branch, teacher in teachers.items():
        if isinstance(teacher, str) and teacher not in OWN_TEACHERS and args.process_index == 0:
            print(f"teacher {branch!r}: {teacher} is loaded into this process", flush=True)


def quiet(verbose: bool) -> None:
    """The screen is for the run: bars of files that libraries read and write are left out, and what will change in them."""
    import datasets
    from transformers.utils import logging

    if verbose:
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _reach_rollout_servers(settings: Mapping[str, Any]) -> None:
    """Raise `RolloutError` for one that cannot be reached."""
    from ..method_rules import urls_of
    from ..vllm.sampler import Sampler

    urls = urls_of(settings.get("rollout_servers"), settings.get("use_vllm") is True)
    if urls:
        Sampler(urls).close()
