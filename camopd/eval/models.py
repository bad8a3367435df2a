"""The models of an evaluation: those of a run by their parts in it, and any others by a path or URL."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ..errors import CaMOPDError
from ..run import read_settings
from ..teachers.address import is_server, names_missing_folder, public_url, same_model, without_secrets
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
    return _named(run, settings.get("model_name_or_path"), general, _weights_in(folder))


def _of_folder(folder: Path) -> list[Model]:
    checkpoints = sorted(folder.glob(f"checkpoint-*/{_RUN_RECORD}"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise ValueError(
            f"{str(folder)!r} has no checkpoint that says what run it is. Give the run's config, or the models one by one: "
            f"--models {START}=PATH {GENERAL}=PATH {RESULT}=PATH."
        )
    from .. import record

    found = record.read(checkpoints[-1].parent)
    student, teachers = found.get("student"), found.get("teachers")
    start = student.get("name") if isinstance(student, dict) else None
    general = teachers.get("general") if isinstance(teachers, dict) else None
    return _named(str(folder), start, general, _weights_in(folder) or str(checkpoints[-1].parent))


def _weights_in(folder: Path) -> str | None:
    return str(folder) if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file() else None


def _first(urls: Any) -> str:
    return str(urls if isinstance(urls, str) else urls[0])


def _named(run: str, start: Any, general: Any, result: Any) -> list[Model]:
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
