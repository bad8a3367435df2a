"""What to say when the Hub cannot be reached or refuses: which repository, which setting, and no token."""

from __future__ import annotations

import os
import re
from pathlib import Path


_TOKEN = re.compile(r"hf_\w+")
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name is `owner/name` of the Hub, and nothing on this machine."""
    return _ID.fullmatch(name) is not None and not os.path.exists(name)


def public_name(name: str) -> str:
    """What others may see of a model's name: all of an id of the Hub, the last part of a path."""
    which, colon, of = name.rpartition(":")
    return f"{which}{colon}{of if is_hub_id(of) else Path(of).name}"


def why_not(error: BaseException, repo: str, kind: str = "dataset") -> str:
    """What stands between this machine and a repository of the Hub, and the setting to change. Prints no token.

    `kind` is "dataset" or "model".
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub

    chain: list[BaseException] = []  # datasets wraps what the Hub's client raises
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    token = "the token of this machine has no access" if get_token() else "this machine has no token"
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    login = "set HF_TOKEN or run `hf auth login`"
    unreachable = among(ConnectionError, hub.LocalEntryNotFoundError)
    if among(hub.OfflineModeIsEnabled) or (constants.HF_HUB_OFFLINE and unreachable):
        return "HF_HUB_OFFLINE is set; unset it where there is a network"
    if among(hub.GatedRepoError):
        return f"it is gated, and {token}; accept its terms at {page}, then {login}"
    if among(hub.LocalTokenNotFoundError):
        return f"it wants a token, and {token}; {login}"
    if among(hub.RepositoryNotFoundError, DatasetNotFoundError):
        return f"the Hub knows no such {kind}, or it is private, and {token}; check the name, or {login}"
    statuses = [link.response.status_code for link in chain if isinstance(link, hub.HfHubHTTPError)]
    if statuses and statuses[0] in (401, 403):
        return f"the Hub answers with status {statuses[0]}, and {token}; {login}"
    if statuses:
        return f"the Hub answers with status {statuses[0]}; try again later"
    if unreachable or among(*hub_errors()[1:]):  # without a status: no answer
        return "the Hub cannot be reached; check network, proxy and HF_ENDPOINT"
    return f"{type(error).__name__}: {without_tokens(error)}"


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises: OSErrors, and those of the HTTP library it has, httpx or httpx2 by version."""
    import httpx
    from huggingface_hub.errors import HTTPError

    return (OSError, httpx.HTTPError, HTTPError)


def without_tokens(error: BaseException) -> str:
    """The text of an error, with no token of the Hub in it."""
    return _TOKEN.sub("hf_...", str(error))[:500]
