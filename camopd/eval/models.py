"""The models of an evaluation: those of a run by their parts in it, and any others by a path or URL."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ..errors import CaMOPDError
from ..manifest import CHECKPOINT, step_of
from ..run import read_settings
from ..teachers.address import (
    OWN_TEACHERS,
    has_adapter,
    is_server,
    names_missing_folder,
    public_url,
    same_model,
    without_secrets,
)
from .compare import GENERAL, RESULT, START


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_RUN_RECORD = "camopd.json"


@dataclass(frozen=True)
class Model:
    """A model under the name that its column has."""

    name: str
    where: str  # path, id of the Hub, or URL
    served: str | None = None  # what a URL must serve; `None` is its only model

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
    elif names_missing_folder(where):
        raise ValueError(f"the model {name!r} is named as {where!r}, but there is no such path.")
    return Model(name, where, served or None)


def of_run(run: str) -> list[Model]:
    """The start, the general teacher and the result of a run, from its config (a YAML file) or its output_dir.

    Raises `ValueError` where they cannot be told.
    """
    path = Path(run)
    if path.is_dir():
        return _of_folder(path)
    settings = read_settings(run, [])
    folder = Path(str(settings.get("output_dir") or "trainer_output"))
    teachers = settings.get("teachers")
    general = teachers.get("general") if isinstance(teachers, dict) else None
    if isinstance(general, dict) and is_server(general):
        general = f"{_first(general['urls'])}#{general['model']}"
    if isinstance(general, list) and is_server(general):
        general = _first(general)
    return _named(run, settings.get("model_name_or_path"), general, _result_in(folder))


def _of_folder(folder: Path) -> list[Model]:
    newest = _newest_in(folder)
    if newest is None:
        raise ValueError(
            f"{str(folder)!r} has no checkpoint that says what run it is. Give the run's config, or the models one by one: "
            f"--models {START}=PATH {GENERAL}=PATH {RESULT}=PATH."
        )
    from .. import record

    found = record.read(newest)
    student, teachers = found.get("student"), found.get("teachers")
    start = student.get("name") if isinstance(student, dict) else None
    general = teachers.get("general") if isinstance(teachers, dict) else None
    return _named(str(folder), start, general, _result_in(folder))


def need_whole(models: Iterable[Model]) -> None:
    """Raise `ValueError` for a folder that has an adapter alone: what is served is a whole model."""
    for model in models:
        if not model.is_url and has_adapter(model.where) and not (Path(model.where) / "config.json").is_file():
            raise ValueError(
                f"the model {model.name!r}, {model.where!r}, is an adapter, and what is evaluated is a whole model. Merge "
                f"it into its base (docs/guide.md, Merge the adapter), and name that: --models {model.name}=FOLDER."
            )


def _newest_in(folder: Path) -> Path | None:
    """The checkpoint with most steps that says what run it is of."""
    found = [
        path.parent for path in folder.glob(f"checkpoint-*/{_RUN_RECORD}") if CHECKPOINT.fullmatch(path.parent.name)
    ]
    return max(found, key=step_of, default=None)


def _result_in(folder: Path) -> str | None:
    """Where a run has left its model: its folder, or its newest checkpoint."""
    saved = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    result = folder if saved else _newest_in(folder)
    return None if result is None else str(result)


def _first(urls: Any) -> str:
    return str(urls if isinstance(urls, str) else urls[0])


def _named(run: str, start: Any, general: Any, result: Any) -> list[Model]:
    if general in OWN_TEACHERS:
        raise ValueError(
            f"the general teacher of {run!r} is {general!r}, {OWN_TEACHERS[general]}, which is no model of its own on "
            f"disk. Name it with --models {GENERAL}=PATH_OR_URL, and {START}= and {RESULT}= as well, without the run."
        )
    found = {START: start, GENERAL: general, RESULT: result}
    missing = [name for name, where in found.items() if not isinstance(where, str) or not where]
    if missing:
        raise ValueError(
            f"{run!r} does not say where the {' and the '.join(missing)} model is, or it is not there. Name it with "
            f"--models {missing[0]}=PATH_OR_URL."
        )
    return [parse(f"{name}={where}") for name, where in found.items()]


def look(model: Model, url: str, key_name: str, option: str = "--models") -> tuple[str, int | None]:
    """Ask a server what it serves: the name for requests, and its context in tokens, where it says.

    The environment has its key under `key_name`; `option` is the one that has named it.

    Raises `CaMOPDError` for a server that does not answer, has several models and none was named, or another one.
    """
    shown = public_url(url)
    key = os.environ.get(key_name)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(timeout=30, trust_env=False, headers=headers) as client:
            reply = client.get(f"{url}/v1/models")
            reply.raise_for_status()
            cards = reply.json()["data"]
            served = {str(card["id"]): card for card in cards}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        hint = f" Its key is read from {key_name}." if "401" in str(error) else ""
        raise CaMOPDError(
            f"the model {model.name!r} has the address {shown}, which does not answer {shown}/v1/models with a list of "
            f"models ({type(error).__name__}: {without_secrets(str(error))[:200]}). Start it, or fix the address.{hint}"
        ) from None
    if model.served is None and len(served) == 1:
        name = next(iter(served))
    else:
        roots = {name: str(card.get("root") or name) for name, card in served.items()}
        wanted = model.served or ""
        matching = [name for name, root in roots.items() if same_model(wanted, name) or same_model(wanted, root)]
        if not matching:
            asked = f"not {wanted!r}" if wanted else "and none was named"
            raise CaMOPDError(
                f"the server of {model.name!r}, {shown}, serves {', '.join(sorted(served)) or 'nothing'}, {asked}. "
                f"Write {option} {model.name}={shown}#ONE_OF_THEM."
            )
        name = matching[0]
    context = served[name].get("max_model_len")
    return name, context if isinstance(context, int) else None
