"""What the name of a model or teacher stands for: URLs and keys of servers, folders, models of the Hub.

Imports nothing heavy: `camopd serve` needs no torch.
"""

from __future__ import annotations

import contextlib
import difflib
import glob
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import yaml


# Teachers that the student is itself.
OWN_TEACHERS = {
    "adapter_off": "the student without its adapter",
    "adapter_start": "the student with its adapter as it was before training",
    "self": "the student itself, after its teacher_prompt",
}
NEAR = 0.8  # similarity, of 1, from which a name is taken for a misspelt one
SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD)(_|$)")  # in names of environment variables
PATIENCE = 5.0  # seconds for the Hub to answer a question before the imports


def is_server(spec: Any) -> bool:
    """Whether a teacher was given as a URL, a list of URLs, or `{"urls": one of these, "model": what they serve}`."""
    if isinstance(spec, dict):
        return set(spec) == {"urls", "model"} and is_server(spec["urls"])
    if isinstance(spec, (list, tuple)):
        return bool(spec) and all(isinstance(url, str) and is_server(url) for url in spec)
    return isinstance(spec, str) and spec.lower().startswith(("http://", "https://"))


def public_url(url: str) -> str:
    """Scheme, host, port, path of a URL: what stands before the host, or behind `?` or `#`, may be a key or a password."""
    scheme, slashes, rest = url.partition("://")
    place, *more = re.split("[?#]", rest, maxsplit=1)
    host, slash, path = place.partition("/")
    if "@" in path + "".join(more):  # a password with one of these signs, perhaps
        return f"{scheme}{slashes}..."
    return scheme + slashes + host.rpartition("@")[2] + slash + path


def name_to_show(name: str) -> str:
    """A model id or path as an error may show it: it may be a URL without scheme, `user:password@host:8001/?key=...`."""
    shown, *more = re.split("[?#]", name, maxsplit=1)
    if "@" in "".join(more):  # a password with one of these signs, perhaps
        return "..."
    return re.sub(r"^[^@]*:[^@]*@(.*@)?", "", shown)


def refuse_secrets(branch: str, name: str) -> None:
    """Raise `ValueError` for the name of a teacher that may hold a password or key, before a library shows it."""
    if name_to_show(name) != name and not is_here(name):
        raise ValueError(
            f"the teacher of branch {branch!r} is {name_to_show(name)!r} with a '?', '#' or '@', which neither the id of a "
            f"model nor the URL of a server may have. A server is written http://host:port, and its key is set in "
            f"{' or '.join(key_variables(str(branch)))}."
        )


def without_secrets(text: str) -> str:
    """A text with each of its URLs as [`public_url`] has it."""
    return re.sub(r"(?i)https?://[^\s'\"]*", lambda found: public_url(found[0]), text)


def urls_and_model(spec: Any) -> tuple[list[str], str | None]:
    """URLs of a teacher on servers, each once, and the model they must serve where that was said."""
    urls, model = (spec["urls"], spec["model"]) if isinstance(spec, dict) else (spec, None)
    return list(dict.fromkeys([urls] if isinstance(urls, str) else urls)), model


def same_model(one: str, other: str) -> bool:
    """Whether two names are those of one model: the same id, or paths to the same folder."""
    return one == other or (
        os.path.exists(one) and os.path.exists(other) and os.path.realpath(one) == os.path.realpath(other)
    )


def is_here(name: str) -> bool:
    """Whether a name is that of a path on this machine."""
    return os.path.exists(os.path.expanduser(name))  # `Path` raises where a name is too long or its ~user is nobody


def names_missing_folder(name: str) -> bool:
    """Whether a name is a path and leads nowhere: by its form, or because it begins with a folder that is there. It is none
    where the cache of the Hub has a model of that name, as beside a folder in which others of its owner are."""
    parts = Path(name).parts
    begins_here = len(parts) > 1 and os.path.isdir(parts[0]) and not was_fetched(name)
    return (name.startswith(("/", "./", "../", "~")) or begins_here) and not is_here(name)


def names_missing_model(name: str) -> bool:
    """Whether a model's name is a path that leads nowhere, or a single word that is surely a misspelt folder.

    A single word may be a model of the Hub (`gpt2`). It is misspelt where a model's folder has a name like it, this machine
    has fetched no such model before, and the Hub does not know it or cannot be asked (one request, of `PATIENCE`). A folder
    that is longer or shorter by an ending is no sign: `gpt2-sft` is how one names a model that was made of `gpt2`.
    """
    if names_missing_folder(name):
        return True
    near = near_model(name) if len(Path(name).parts) == 1 else None
    if near is None:
        return False
    word, folder = Path(name).name, Path(near).name
    by_an_ending = folder.startswith(word) or word.startswith(folder)
    return not by_an_ending and not was_fetched(name) and not _may_be_on_hub(name)


def _may_be_on_hub(word: str) -> bool:
    """Whether the Hub knows a model, or has been reached and does not say."""
    constants = hub_constants()
    if constants.HF_HUB_OFFLINE:
        return False
    need_endpoint()
    from huggingface_hub import get_session
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import build_hf_headers

    url = f"{constants.ENDPOINT}/api/models/{quote(word, safe='')}"
    try:
        status = get_session().get(url, headers=build_hf_headers(), timeout=PATIENCE).status_code
    except (HTTPError, OSError) as error:
        return not no_connection(error)
    except Exception:  # of a proxy that the client cannot use; it says more when it has to
        return True
    return status not in (401, 404)  # 401: what the Hub says to one without a token of a model that it does not have


def hub_constants() -> Any:
    """The settings of the Hub's client. Raises `ValueError` for a variable that it cannot be imported with."""
    try:
        from huggingface_hub import constants, get_session  # noqa: F401
    except ValueError as error:
        need_endpoint()
        raise ValueError(
            f"huggingface_hub cannot be imported: {error}. It reads the variables that begin with HF_: correct the one "
            "that has this value, or unset it."
        ) from error
    return constants


def need_endpoint() -> None:
    """Raise `ValueError` for an HF_ENDPOINT that is no URL of a server. It matters where the Hub is asked."""
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint is None:
        return
    with contextlib.suppress(ValueError):  # as `port` raises it
        parts = urlsplit(endpoint)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return
    shown = name_to_show(endpoint).rpartition("@")[2]
    raise ValueError(
        f"HF_ENDPOINT={shown!r} is no address of a Hub, which has the form https://host or https://host:port. Correct it, "
        "or unset it for that of Hugging Face."
    ) from None


def no_connection(error: BaseException) -> bool:
    """Whether an error of the Hub's client says that no connection can be made: a wrong host, or no network.

    By its name: the client has httpx or httpx2, by version.
    """
    return type(error).__name__ in ("ConnectError", "ConnectTimeout")


def near_model(name: str) -> str | None:
    """The folder of a model or an adapter whose path is near to a name that leads nowhere, or `None`."""
    path = Path(os.path.expanduser(name))
    if not path.parts or is_here(name):
        return None
    found = Path()
    for place, part in enumerate(path.parts):
        last = place == len(path.parts) - 1
        if not last and os.path.isdir(found / part):
            found /= part
            continue
        try:
            names = [each.name for each in found.iterdir()]
        except OSError:
            return None
        near = difflib.get_close_matches(part, names, cutoff=NEAR)
        fits = [found / each for each in near if (_is_model(found / each) if last else os.path.isdir(found / each))]
        if not fits:
            return None
        found = fits[0]
    return str(found)


def did_you_mean(name: str) -> str:
    """A sentence that names the folder that a name which leads nowhere may have been meant to be, or nothing."""
    near = near_model(name)
    return f" Did you mean {near!r}?" if near else ""


def _is_model(folder: Path) -> bool:
    # `Path.is_file` raises in a folder that only others may read.
    return any(os.path.isfile(folder / name) for name in ("config.json", "adapter_config.json"))


def was_fetched(model: str) -> bool:
    """Whether the cache of the Hub has files of a model, of any revision; of an adapter, too, which has no config.json."""
    folder = Path(hub_constants().HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "snapshots"
    with contextlib.suppress(ValueError):  # of a name that no path can have
        return bool(glob.glob(f"{glob.escape(str(folder))}/*/*"))
    return False


def in_cache(model: str, revision: str | None = None) -> str | None:
    """The config.json of a model of the Hub that has been fetched before, or `None`."""
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # of a name that no model can have
        found = try_to_load_from_cache(model, "config.json", revision=revision)
        return found if isinstance(found, str) else None
    return None


def has_adapter(model: str) -> bool:
    """Whether a path is that of a saved PEFT adapter, which names its base model itself."""
    return os.path.isfile(os.path.join(os.path.expanduser(model), "adapter_config.json"))


def refuse_other_model(branch: str, teacher: str, settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a named teacher that would not be the model it seems to be: an adapter, or the student's own
    name where the student has a revision."""
    if has_adapter(teacher) and not os.path.isfile(os.path.join(os.path.expanduser(teacher), "config.json")):
        raise ValueError(
            f"the teacher of branch {branch!r}, {teacher!r}, is a LoRA adapter, and a teacher is a whole model. Merge it "
            "into its base and name that folder; or train it on as model_name_or_path with 'adapter_start' as this teacher."
        )
    revision, kwargs = student_revision(settings), settings.get("teacher_model_init_kwargs")
    if revision is None or is_here(teacher) or teacher != settings.get("model_name_or_path"):
        return
    if not isinstance(kwargs, Mapping) or "revision" not in kwargs:
        raise ValueError(
            f"the teacher of branch {branch!r} has the student's name, {teacher!r}, but revision {revision!r} is of "
            f"the student alone: the teacher would be the model's main revision. Where that is meant, set "
            "teacher_model_init_kwargs: {revision: main}. For the student itself: hf download "
            f"{teacher} --revision {revision} --local-dir DIR; then name DIR for both."
        )


def student_revision(settings: Mapping[str, Any]) -> str | None:
    """The revision of the student on the Hub, where it is not the main one: `model_revision` or that of
    `model_init_kwargs`."""
    found = settings.get("model_revision")
    if found in (None, "main"):
        found = as_mapping(settings.get("model_init_kwargs")).get("revision")
    return None if found in (None, "main") else str(found)


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A setting that may be a mapping, or the text of one, as TRL takes it; {} for what is none, of which the run says
    more."""
    with contextlib.suppress(yaml.YAMLError):
        value = yaml.safe_load(value) if isinstance(value, str) else value
    return value if isinstance(value, Mapping) else {}


def base_of(model: str) -> str:
    """The model under a saved adapter, or the model itself. A path as it is on this machine.

    Raises `ValueError` for an adapter_config.json that cannot be read, or names no model.
    """
    if not has_adapter(model):
        return os.path.expanduser(model)
    file = os.path.join(os.path.expanduser(model), "adapter_config.json")
    try:
        text = Path(file).read_text(encoding="utf-8")
        if text.startswith("version https://git-lfs"):
            raise ValueError(
                "it is a pointer of git-lfs, in place of the file that `git lfs pull` in its folder fetches"
            )
        config = json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file!r} cannot be read: {error}. Fetch or save the adapter again.") from None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not base or not isinstance(base, str):
        raise ValueError(
            f"{file!r} does not say what model the adapter is for: its base_model_name_or_path is {base!r}. Write there "
            "the folder or the id of that model."
        )
    return os.path.expanduser(base)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from its own machine only."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def key_variables(branch: str) -> tuple[str, str]:
    """Environment variables that may hold the API key of a branch's servers, its own one first."""
    return f"CAMOPD_TEACHER_API_KEY_{re.sub(r'[^A-Za-z0-9]', '_', branch).upper()}", "CAMOPD_TEACHER_API_KEY"
