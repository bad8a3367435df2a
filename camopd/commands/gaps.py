"""`camopd gaps`: how far a finished model is from the teachers of a run, on its held-out prompts."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from .. import atomic
from ..early import TRUE, check_early
from ..errors import CaMOPDError
from ..folder_lock import LOCK_FILE, FolderLock, need_free
from ..measured import HELD_OUT, lines_of, of_lines
from ..run import named_teachers, teachers_of
from ..settings import default_of
from ..surroundings import check_hub, check_machine
from ..teachers.address import (
    OWN_TEACHERS,
    as_mapping,
    base_of,
    did_you_mean,
    has_adapter,
    is_here,
    names_missing_model,
    same_model,
    student_revision,
    without_secrets,
)
from ..verdict import Measured, Verdict, interval, short, verdicts_of
from .train import make_trainer


# The first words of what names servers that get the student's weights: what they have, and the ways round them.
_SERVERS = {
    "rollout_servers": ("rollout_servers have", "other servers by --rollout_servers",
                        "--rollout_servers '[]' --rollout_lag 0"),
    "vllm_server": ("vLLM server has", "another one by --vllm_server_base_url", "--use_vllm false"),
}  # fmt: skip


def gaps(argv: list[str]) -> None:
    """The command line. Raises `ValueError` for a model or config that is not there, and what a run would raise."""
    parser = argparse.ArgumentParser(
        prog="camopd gaps",
        usage="%(prog)s MODEL --config RUN.yaml [--json FILE] [--name value ...]",
        description="Measure a model's held-out gaps to the teachers of a run. Nothing is trained. Where the run has "
        "measured the same prompts before its first step, the change since then is shown, too.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a model, or folder of a saved adapter")
    parser.add_argument("--config", required=True, metavar="RUN.yaml", help="YAML file of the run")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there, those of single prompts included")
    options, overrides = parser.parse_known_args(argv)
    settings = check_early(options.config, overrides)
    check_machine(settings)
    _check(options.model, settings, overrides)
    if options.json:  # before the work that it is to keep
        _make_place(Path(options.json))
    check_hub({**settings, "model_name_or_path": options.model, "teachers": teachers_of(settings)})
    overrides += _without_adapter(options.model, settings)
    run = Path(str(settings.get("output_dir") or "trainer_output"))
    with _place(settings, run, options.model, overrides) as folder:
        trainer = make_trainer(options.config, overrides, measure=options.model, folder=folder)
        if not trainer.args.process_index:
            parts = [f"{len(rows):,} of {branch}" for branch, rows in trainer.eval_dataset.items()]
            print(f"evaluating {' and '.join(parts)} held-out prompts ...", file=sys.stderr, flush=True)
        records = measure(trainer)
        trainer.accelerator.end_training()
    if trainer.args.process_index:
        return
    found = of_lines({"step": 1, **record} for record in records.values())  # any after the start: which is not known
    before = of_lines(lines_of(run / HELD_OUT))
    verdicts = since_start(found, before)
    print(f"{options.model}: held-out KL to the teacher, nats per token, ± is 95 %")
    for line in table({branch: measured for branch, (measured,) in found.items()}):
        print(line)
    for verdict in verdicts:
        print(verdict.text)
    otherwise = measured_otherwise(found, before)
    for line in otherwise.values():
        print(line)
    if not verdicts and not otherwise:
        print(f"No change is shown: {str(run / HELD_OUT)!r} has no evaluation of these prompts before the first step.")
    if options.json:
        said = {verdict.branch: verdict.text for verdict in verdicts} | otherwise
        result = {"model": options.model, "unit": "nats per token", "branches": records, "verdicts": said}
        atomic.write(Path(options.json), json.dumps(result, indent=2) + "\n")


def _make_place(file: Path) -> None:
    """Make the folder of a file that is to be written. Raises `ValueError` where it cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir() or not os.access(file.parent, os.W_OK):
            raise OSError("it is a folder" if file.is_dir() else "its folder cannot be written to")
    except OSError as error:
        raise ValueError(f"--json {str(file)!r} cannot be written: {error}. Name another file.") from None


def _check(model: str, settings: dict[str, Any], words: Sequence[str]) -> None:
    if names_missing_model(model):
        raise ValueError(
            f"the model {model!r} cannot be measured: there is no such path on this machine.{did_you_mean(model)} Fix the "
            "path, or give a model id of the Hub, owner/name."
        )
    revision, said = student_revision(settings), _names(words)
    of_run = revision is not None and not {"model_revision", "model_init_kwargs"} & said and not has_adapter(model)
    if of_run and not is_here(model) and model != settings.get("model_name_or_path"):
        raise ValueError(
            f"revision {revision!r} is of the run's student, and would be looked for in {model!r}, too. Give "
            f"{_without_revision(settings)}, or the one of that model."
        )
    for branch, teacher in named_teachers(settings).items():
        if teacher in ("adapter_start", "self"):
            raise ValueError(
                f"the teacher of branch {branch!r} is {teacher!r}, {OWN_TEACHERS[teacher]}, and of {model!r} that would be "
                "its own. Name the model from which the run began: --teachers '{...}' with a folder or URL for each."
            )


def _without_revision(settings: Mapping[str, Any]) -> str:
    """The words with which a run's settings have none."""
    if settings.get("model_revision"):
        return "--model_revision main"
    kwargs = {name: value for name, value in as_mapping(settings["model_init_kwargs"]).items() if name != "revision"}
    return f"--model_init_kwargs {without_secrets(shlex.quote(json.dumps(kwargs)))}"


@contextmanager
def _place(settings: Mapping[str, Any], run: Path, model: str, words: Sequence[str]) -> Iterator[str]:
    """A folder for what the trainer writes, which is gone afterwards: with rollout servers on the disk that they read the
    weights of the run from.

    Raises `CaMOPDError` while the run in that folder is under way and has servers with its weights, those of TRL's
    `vllm_mode: server` included. Servers that `words` of the command line name are taken for others than its own.
    """
    mode = settings.get("vllm_mode", default_of("vllm_mode"))
    of_trl = str(settings.get("use_vllm")).lower() in TRUE and mode == "server"
    own = "rollout_servers" if settings.get("rollout_servers") else "vllm_server" if of_trl else ""
    ways = {own} if own == "rollout_servers" else {"vllm_server_base_url"}
    if own == "vllm_server" and not settings.get("vllm_server_base_url"):  # beside which TRL ignores them
        ways |= {"vllm_server_host", "vllm_server_port"}
    alone = nullcontext() if not own or ways & _names(words) else _not_under_way(run, model, own)
    if own != "rollout_servers":
        with alone, tempfile.TemporaryDirectory() as folder:
            yield folder
        return
    new = [path for path in (run, *run.parents) if not path.exists()]
    with alone:
        run.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=run, prefix="_gaps-") as folder:
                yield folder
        finally:
            for path in new:
                with suppress(OSError):  # something else is there by now
                    path.rmdir()


def _names(words: Sequence[str]) -> set[str]:
    """Of settings on a command line."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


@contextmanager
def _not_under_way(run: Path, model: str, servers: str) -> Iterator[None]:
    """No run trains in its folder inside: its servers have its weights, and would write by others unseen."""
    lock = FolderLock(run)
    try:
        if (run / LOCK_FILE).exists() and os.environ.get("RANK", "0") == "0":  # every run has left one
            try:
                lock.take()
            except OSError:  # what may only be read, as a colleague's run, can be looked at
                need_free(run)
    except CaMOPDError as error:
        have, others, without = _SERVERS[servers]
        raise CaMOPDError(
            f"{str(error).partition('. Two runs')[0]}. Its {have} its weights, and those of {model!r} would take their "
            f"place. Wait for its end, name {others}, or have this process write the completions by {without}."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _without_adapter(model: str, settings: Mapping[str, Any]) -> list[str]:
    """Words that name the teacher that is the student without its adapter, where the model has none to take off.

    Raises `ValueError` for an adapter on another model than that teacher.
    """
    teachers, base = named_teachers(dict(settings)), base_of(str(settings.get("model_name_or_path")))
    if "adapter_off" not in teachers.values() or (has_adapter(model) and same_model(base_of(model), base)):
        return []
    named = {branch: base if teacher == "adapter_off" else teacher for branch, teacher in teachers.items()}
    words, revision = ["--teachers", json.dumps(named)], student_revision(settings)
    if revision is not None and not is_here(base):
        folder = f"DIR/{Path(base).name}"  # the last part of its name is what the run has written down
        raise ValueError(
            f"the run's teacher 'adapter_off' is revision {revision!r} of {base!r}, and would be another one here. hf "
            f"download {base} --revision {revision} --local-dir {folder}; then name that: "
            f"{without_secrets(shlex.join(words))}, with {folder} in place of {base!r}."
        )
    if has_adapter(model):
        raise ValueError(
            f"the adapter {model!r} is on {base_of(model)!r}, and the run's teacher 'adapter_off' is {base!r}: without "
            f"its adapter the model is another teacher than that. Name the run's: {without_secrets(shlex.join(words))}"
        )
    return words


def measure(trainer: Any) -> dict[str, dict[str, Any]]:
    """The record of each branch's held-out prompts, see [`camopd.evaluation.HeldOutResults.record`]."""
    from transformers import PrinterCallback

    if not trainer.args.verbose:
        trainer.remove_callback(PrinterCallback)
    records = {}
    for branch in trainer.eval_dataset:
        trainer.evaluate(branch)
        records[branch] = trainer.held_out_results.record()
    return records


def since_start(found: Mapping[str, list[Measured]], run: Mapping[str, list[Measured]]) -> list[Verdict]:
    """The verdict on each branch whose prompts the run has measured before its first step."""
    both = {}
    for branch, measured in found.items():
        start = _start_of(measured[0], run.get(branch, ()))
        if start is not None and not _otherwise(start, measured[0]):
            both[branch] = [start, *measured]
    return verdicts_of(both)


def measured_otherwise(found: Mapping[str, list[Measured]], run: Mapping[str, list[Measured]]) -> dict[str, str]:
    """A line for each branch that was measured against another teacher before the run's first step, or with answers that
    were cut at another length."""
    lines = {}
    for branch, (measured, *_) in found.items():
        start = _start_of(measured, run.get(branch, ()))
        why = "" if start is None else _otherwise(start, measured)
        if why:
            lines[branch] = f"{branch}: no change is shown, {why} as the run has it."
    return lines


def _otherwise(start: Measured, measured: Measured) -> str:
    """Why two evaluations of the same prompts are not compared, and what to leave; "" where they are."""
    here, then = measured.teacher, start.teacher
    if ("/" in here) != ("/" in then):  # a model of the Hub that is a folder here
        here, then = (name.rpartition("/")[2] for name in (here, then))
    if here and then and here != then:
        return (
            f"its teacher is {measured.teacher!r} here, and was {start.teacher!r} before the run's first step. The same "
            f"model may be a folder named {start.teacher.rpartition('/')[2]!r}. Leave teachers"
        )
    if start.max_tokens is not None and start.max_tokens != measured.max_tokens:
        return (
            f"answers have {measured.max_tokens} tokens at most here, and had {start.max_tokens} before the run's first "
            "step. Leave max_completion_length"
        )
    return ""


def _start_of(measured: Measured, run: Sequence[Measured]) -> Measured | None:
    """The evaluation of the same prompts before a run's first step."""
    return next((each for each in run if each.step == 0 and each.of == measured.of), None)


def table(found: Mapping[str, Measured]) -> list[str]:
    """Lines of text: a head, and a row for each branch."""
    rows = [("branch", "KL to the teacher", "mean |gap|", "prompts")]
    for branch, each in found.items():
        rows.append((branch, interval(each.kl, each.half), short(each.gap_abs), str(each.prompts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
