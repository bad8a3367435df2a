"""The models of an evaluation: those of a run by their parts in it, and any others by a path or URL."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import CaMOPDError
from ..hub import is_hub_id
from ..manifest import CHECKPOINT, MANIFEST, saved_at, step_of
from ..run import read_settings, set_env
from ..teachers.address import (
    OWN_TEACHERS,
    as_mapping,
    did_you_mean,
    has_adapter,
    is_here,
    is_server,
    names_missing_model,
    public_url,
    same_model,
    student_revision,
    without_secrets,
)
from .asking import Line, Unanswered, key_of
from .compare import GENERAL, RESULT, START
from .verdicts import after_thinking


logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_RUN_RECORD = "camopd.json"
_WEIGHTS = {  # by the config that they go with
    "config.json": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
    "adapter_config.json": ("adapter_model.safetensors", "adapter_model.bin"),
}
LOOK_SECONDS = 30.0  # until a server must have said what it serves


@dataclass(frozen=True)
class Model:
    """A model under the name that its column has."""

    name: str
    where: str  # path, id of the Hub, or URL
    served: str | None = None  # what a URL must serve; `None` is its only model
    note: str = field(default="", compare=False)  # what is to be said of the choice

    @property
    def is_url(self) -> bool:
        return is_server(self.where)


def parse(text: str, option: str = "--models") -> Model:
    """`NAME=PATH`, `NAME=URL` or `NAME=URL#MODEL`, the model that the URL must serve.

    Raises `ValueError` for another form, and for a path that is not there.
    """
    name, equals, where = text.partition("=")
    if not equals or not _NAME.fullmatch(name) or not where:
        raise ValueError(
            f"{option} takes NAME=PATH_OR_URL, got {without_secrets(text)!r}. A name has letters, digits, '.', '_' and '-'."
        )
    served = None
    if is_server(where):
        where, _, served = where.partition("#")
        where = where.rstrip("/").removesuffix("/v1")
        if public_url(where) != where:  # it would be in eval.json and on the page
            raise ValueError(
                f"the model {name!r} is at {public_url(where)}, and its URL has a user, a password or a query, which would "
                "be in files. Give its key in the environment (docs/evaluation.md)."
            )
    elif names_missing_model(where):
        raise ValueError(
            f"the model {name!r} is named as {where!r}, but there is no such path.{did_you_mean(where)} Give the folder of "
            "a model, its id on the Hub, or a URL."
        )
    return Model(name, where, served or None)


def prepare_environment(run: str) -> None:
    """Put the `env` of a run's config into this process. Before any model is looked for: the Hub's client reads it once."""
    if not Path(run).is_dir():
        set_env(read_settings(run, []))


def of_run(run: str, given: Mapping[str, Model] | None = None) -> list[Model]:
    """The start, the general teacher and the result of a run, from its config (a YAML file) or its output_dir.

    One that is `given` is not looked for. Raises `ValueError` where another cannot be told.
    """
    given, path = given or {}, Path(run)
    wanted = [name for name in (START, GENERAL, RESULT) if name not in given]
    if path.is_dir():
        folder, found = path, _recorded(path, wanted)
    else:
        settings = read_settings(run, [])
        folder = Path(str(settings.get("output_dir") or "trainer_output"))
        teachers = settings.get("teachers")
        general = teachers.get("general") if isinstance(teachers, dict) else None
        if isinstance(general, dict) and is_server(general):
            general = f"{_first(general['urls'])}#{general['model']}"
        if isinstance(general, list) and is_server(general):
            general = _first(general)
        found = {START: settings.get("model_name_or_path"), GENERAL: general}
    result, note = _result_in(folder)
    own = str(found.get(GENERAL)).partition(":")[0]
    if own in OWN_TEACHERS and GENERAL in wanted:
        raise ValueError(
            f"the general teacher of {run!r} is {found[GENERAL]!r}, {OWN_TEACHERS[own]}, which is not a model of its own "
            f"on disk. Name it with --models {GENERAL}=PATH_OR_URL."
        )
    if not path.is_dir():
        _need_main(run, settings, {name: found[name] for name in wanted if name != RESULT})
    found[RESULT] = result
    missing = [name for name in wanted if not isinstance(found.get(name), str) or not found[name]]
    if missing:
        raise ValueError(
            f"{run!r} does not say where the {' and the '.join(missing)} model is, or it is not there. Name it with "
            f"--models {missing[0]}=PATH_OR_URL."
        )
    if path.is_dir():
        _need_places(run, {name: found[name] for name in wanted if name != RESULT})
    named = {name: given.get(name) or parse(f"{name}={found[name]}") for name in (START, GENERAL, RESULT)}
    if RESULT in wanted:
        named[RESULT] = replace(named[RESULT], note=note)
    return list(named.values())


def _need_main(run: str, settings: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a model of the Hub of which the run has another revision than the one that a name means.

    Warns of what else a run has told its models and an evaluation does not.
    """
    teachers = as_mapping(settings.get("teacher_model_init_kwargs"))
    revisions = {START: student_revision(settings), GENERAL: teachers.get("revision")}
    for name, where in found.items():
        revision = revisions[name]
        if revision in (None, "main") or not isinstance(where, str) or is_here(where) or is_server(where):
            continue
        raise ValueError(
            f"the {name} model of {run!r} is revision {revision!r} of {where!r}, and would be evaluated as its main one. "
            f"hf download {where} --revision {revision} --local-dir DIR; then --models {name}=DIR."
        )
    if settings.get("chat_template_kwargs"):
        logger.warning(
            "chat_template_kwargs=%r of %r is not passed on: models are asked with what their chat templates do without. "
            "A template that does the same by itself asks as the run did",
            settings["chat_template_kwargs"], run,
        )  # fmt: skip


def _recorded(folder: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """The names that a run's newest checkpoint has of the models it began with."""
    newest = _newest_in(folder)
    if newest is None and set(wanted) & {START, GENERAL}:
        raise ValueError(
            f"{str(folder)!r} has no checkpoint that says what run it is. Give the run's config, or the models one by one: "
            f"--models {START}=PATH {GENERAL}=PATH {RESULT}=PATH."
        )
    if newest is None:
        return {}
    from .. import record

    found = record.read(newest)
    student, teachers = found.get("student"), found.get("teachers")
    return {
        START: student.get("name") if isinstance(student, dict) else None,
        GENERAL: teachers.get("general") if isinstance(teachers, dict) else None,
    }


def _need_places(run: str, found: Mapping[str, str]) -> None:
    """Raise `ValueError` for a name that says of no model where it lies: of a path a record has the last part alone."""
    for name, where in found.items():
        if not is_hub_id(where) and not (os.path.isabs(where) and os.path.exists(where)):
            raise ValueError(
                f"the checkpoints of {run!r} have of the {name} model {where!r} alone, the last part of a path, or "
                f"a name that a server gave it. Give the run's config, or --models {name}=PATH_OR_URL."
            )


def need_whole(models: Iterable[Model]) -> None:
    """Raise `ValueError` for a folder that has an adapter alone, or no model: what is served is a whole one."""
    for model in models:
        folder = Path(model.where).expanduser()
        if model.is_url or not folder.is_dir() or (folder / "config.json").is_file():
            continue
        if has_adapter(model.where):
            raise ValueError(
                f"the model {model.name!r}, {model.where!r}, is an adapter, and what is evaluated is a whole model. Merge "
                f"it into its base (docs/guide.md, Merge the adapter), and name that: --models {model.name}=FOLDER."
            )
        raise ValueError(
            f"the model {model.name!r}, {model.where!r}, is a folder without a config.json, so there is no model in it. "
            f"Name one that has it, as a checkpoint, an id of the Hub, or a URL: --models {model.name}=PATH_OR_URL."
        )


@cache
def opens_reasoning(model: Model) -> bool:
    """Whether a model's chat template opens reasoning before an answer, which then has the end of it alone. False where it
    cannot be told, as of a URL."""
    if model.is_url:
        return False
    from transformers import AutoTokenizer

    with contextlib.suppress(Exception):  # whatever a tokenizer or its template raises: the answers are there
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(model.where))
        asked = [{"role": "user", "content": "x"}]
        return after_thinking(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)) is None
    return False


def need_folders(models: Iterable[Model], task: str) -> None:
    """Raise `ValueError` for a URL where a task needs the model itself."""
    for model in models:
        if model.is_url:
            raise ValueError(
                f"the model {model.name!r} is at {public_url(model.where)}, and the task {task} needs the likelihood of "
                f"each option, which a server of chats does not tell. Name its folder, --models {model.name}=PATH, or "
                "leave the task out."
            )


def _newest_in(folder: Path) -> Path | None:
    """The checkpoint that was saved last, of those that say what run they are of; by its own words, which a copy keeps."""
    found = [
        path.parent for path in folder.glob(f"checkpoint-*/{_RUN_RECORD}") if CHECKPOINT.fullmatch(path.parent.name)
    ]
    return max(found, key=lambda path: (saved_at(path), step_of(path)), default=None)


def _result_in(folder: Path) -> tuple[str | None, str]:
    """Where a run has left its model, its folder or its newest checkpoint, and what is to be said of that."""
    newest = _newest_in(folder)
    if not any((folder / name).is_file() for name in _WEIGHTS):
        return (None if newest is None else str(newest)), ""
    if newest is not None and _is_older(folder, newest):
        return str(newest), (
            f"saved after the model in {folder} itself, which is what was there before the run began anew or went on"
        )
    return str(folder), ""


def _is_older(folder: Path, checkpoint: Path) -> bool:
    """Whether the model files of a folder are from before one of its whole checkpoints was saved.

    By two clocks, that of the run and that of the disk: those of two machines differ, and a copy may have no times.
    """

    def time_of(name: str) -> float:
        path = folder / name
        return path.stat().st_mtime if path.is_file() else -math.inf

    config = max(_WEIGHTS, key=time_of)  # what is of the other one, or in other files, is of a model before
    weights = max(map(time_of, _WEIGHTS[config]))
    written = (
        min(time_of(config), weights) if math.isfinite(weights) else time_of(config)
    )  # a save may have been killed
    try:
        kept = (checkpoint / MANIFEST).stat().st_mtime  # written last, so that the checkpoint is whole
    except FileNotFoundError:
        return False
    saved = saved_at(checkpoint)
    return math.isfinite(saved) and written < min(saved, kept)


def _first(urls: Any) -> str:
    return str(urls if isinstance(urls, str) else urls[0])


def look(model: Model, url: str, key_name: str, option: str = "--models") -> tuple[str, int | None]:
    """Ask a server what it serves: the name for requests, and its context in tokens, where it says.

    The environment has its key under `key_name`; `option` is the one that has named it.

    Raises `CaMOPDError` for a server that does not answer, has several models and none was named, or another one.
    """
    shown = public_url(url)
    line = Line(key_of(key_name), LOOK_SECONDS)
    try:
        served = {str(card["id"]): card for card in line.get(f"{url}/v1/models")["data"]}
    except (Unanswered, KeyError, TypeError) as error:
        why = str(error) if isinstance(error, Unanswered) else f"{type(error).__name__}: {line.shown(str(error))}"
        hint = f" Its key is read from {key_name}." if "HTTP 401" in why else ""
        raise CaMOPDError(
            f"the model {model.name!r} has the address {shown}, which does not answer {shown}/v1/models with a list of "
            f"models ({why}). Start it, or fix the address.{hint}"
        ) from None
    if model.served is None and len(served) == 1:
        name = next(iter(served))
    else:
        roots = {name: str(card.get("root") or name) for name, card in served.items()}
        wanted = model.served or ""
        matching = [name for name, root in roots.items() if same_model(wanted, name) or same_model(wanted, root)]
        if not matching:
            asked = f"not {wanted!r}" if wanted else "and none was named"
            names = line.without_key(", ".join(sorted(served)))
            raise CaMOPDError(
                f"the server of {model.name!r}, {shown}, serves {names or 'nothing'}, {asked}. "
                f"Write {option} {model.name}={shown}#ONE_OF_THEM."
            )
        name = matching[0]
    context = served[name].get("max_model_len")
    return name, context if isinstance(context, int) else None
