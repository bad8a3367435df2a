"""Requests to vLLM servers: the key, retries, and answers that are not those of a vLLM server."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import time
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx
import orjson

from ..errors import CaMOPDError, TeacherError
from ..teachers.address import key_variables, public_url, same_model
from . import limits


T = TypeVar("T")
dice = random.SystemRandom()  # not the generator whose state a run keeps, and another on every rank


class Fault(Exception):
    """What may pass: a broken connection, a time-out, 429, 5xx, a cut answer. The text is for the user."""

    def __init__(self, message: str, takes_out: bool = True):
        super().__init__(message)
        self.takes_out = takes_out  # whether the replica must show that it is well before it gets another request


class NotThere(Exception):
    """404. The text is the server's."""


async def pause(attempt: int, longest: float) -> None:
    """Before another attempt: longer each time, and not as long as everybody else."""
    await asyncio.sleep(min(longest, 0.2 * 2 ** min(attempt, 10) + dice.random()))


class Role(NamedTuple):
    """What servers are to a run: in messages, and where the key for them is."""

    name: str  # as in "teacher 'general'"
    keys: tuple[str, ...]  # environment variables that may hold it, the first that does counts
    error: type[CaMOPDError]


def teacher_role(branch: str) -> Role:
    """That of the servers of a branch."""
    return Role(f"teacher {branch!r}", key_variables(branch), TeacherError)


class ServedModel(NamedTuple):
    """What a server says of its model: the name requests use, where it was loaded from, and its context in tokens; and what
    else it serves."""

    name: str
    path: str
    max_model_len: int | None
    others: tuple[str, ...] = ()


@cache
def _tls(_file: str | None, _folder: str | None) -> Any:
    """Made once for what the environment names: each reads the certificates of all authorities, a tenth of a second."""
    return httpx.create_ssl_context()


class Client:
    """HTTP to servers that have one role, with their key, which no message shows."""

    def __init__(self, role: Role):
        self.role = role
        self.key = _api_key(role)
        self._http = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {self.key}"} if self.key else {})},
            timeout=httpx.Timeout(None, connect=limits.CONNECT_SECONDS),  # `request` watches the whole of a request
            # Leases count the connections. vLLM drops idle ones after 5 seconds; before that, they are not used again.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
            verify=_tls(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")),
        )
        self.close = self._http.aclose

    def without_key(self, text: str) -> str:
        """A text of a server, or about one, that may be shown."""
        return text.replace(self.key, "***") if self.key else text

    async def served_model(self, url: str, attempts: int = 3, expected: str | None = None) -> ServedModel:
        """The `expected` model where a server has several, as adapters beside their base, else the first it names.

        Raises the error of the role when that is not to be had.
        """
        answer = await self.ask(url, "/v1/models", attempts=attempts)
        try:
            listed = []
            for model in answer["data"]:
                name, length = str(model["id"]), model.get("max_model_len")
                if (length is not None and type(length) is not int) or len(name) > 500:
                    raise TypeError(name)
                listed.append(ServedModel(name, str(model.get("root") or name), length))
            wanted = [each for each in listed if expected and any(same_model(expected, name) for name in each[:2])]
            found = (wanted or listed)[0]
            lengths = [each.max_model_len for each in listed if each.max_model_len is not None]
            if found.max_model_len is None and lengths:  # vLLM says it of the base alone, and not of its adapters
                found = found._replace(max_model_len=min(lengths))
            return found._replace(others=tuple(each.name for each in listed if each.path != found.path))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self.role.error(
                f"{self.role.name} at {url} does not say which model it serves: "
                f"{self.without_key(str(answer))[:200]}. Is the URL that of a vLLM server, without a path?"
            ) from None

    async def ask(self, url: str, path: str, body: dict[str, Any] | None = None, attempts: int = 3) -> Any:
        """A small question, which is asked again after a fault. Raises the error of the role."""
        started = time.monotonic()
        for attempt in itertools.count(1):
            try:
                return await self.request(url, path, body, limits.ANSWER_SECONDS)
            except Fault as fault:
                if attempt == attempts or time.monotonic() - started > limits.QUESTION_SECONDS:
                    raise self.role.error(
                        f"{self.role.name} at {fault}. Is `vllm serve` up on that host and port, reachable from "
                        f"this machine, and does it speak {url.partition(':')[0]}?{_proxy_hint()}"
                    ) from None
            await pause(attempt, limits.QUESTION_PAUSE)

    async def request(
        self,
        url: str,
        path: str,
        body: dict[str, Any] | None,
        seconds: float,
        max_bytes: int = 4 << 20,
        parse: bool = True,
        may_miss: bool = False,
    ) -> Any:
        """GET, or POST where there is a body: the JSON of the answer.

        Raises `Fault` for what may pass and the error of the role for what is final; where a path or model `may_miss`,
        `NotThere` for 404.
        """
        encoding, content = "", b""
        try:
            async with (
                asyncio.timeout(seconds),
                self._http.stream(
                    "GET" if body is None else "POST",
                    url + path,
                    content=None if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY),
                    headers={} if body is None else {"Content-Type": "application/json"},
                ) as response,
            ):
                encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
                if encoding == "identity":
                    content = await self._read(response, url, path, max_bytes)
        except TimeoutError:
            raise Fault(f"{url} did not answer {path} in {seconds:.0f} seconds") from None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise Fault(f"{url} does not answer ({type(error).__name__}: {self.without_key(str(error))})") from None
        text = self.without_key(content[:5000].decode(errors="replace"))[:500]
        if encoding != "identity":
            text = f"in Content-Encoding {self.without_key(encoding)[:40]!r}"
        status = response.status_code
        if status == 429 or status >= 500:
            raise Fault(f"{url} answered {status}: {text}", takes_out=status != 429)
        if status == 404 and may_miss:
            raise NotThere(text)
        if status != 200:
            hint = self._hint(status, url, text)
            raise self.role.error(f"{self.role.name} at {url} answered {status}: {text}{hint}")
        if encoding != "identity":
            raise self.role.error(
                f"{self.role.name} at {url} answered {path} {text}, asked for none: unpacked it may have any size. "
                "Switch compression off there, or in the proxy before it."
            )
        try:
            with no_garbage_collection():
                return orjson.loads(content) if parse else None
        except orjson.JSONDecodeError as error:
            near = self.without_key(error.doc[error.pos :][:5000])[:40]
            raise Fault(
                f"{url} did not answer {path} in JSON: {text[:200]!r} cannot be read from {near!r} on. Is the URL that of "
                "a vLLM server, without a path?"
            ) from None

    async def _read(self, response: httpx.Response, url: str, path: str, max_bytes: int) -> bytes:
        """The body as it arrives, never unpacked: a megabyte that is compressed twice may hold any number of gigabytes."""
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > max_bytes:
                raise self.role.error(
                    f"{self.role.name} at {url} answered more than {max_bytes} bytes, which no answer to {path} "
                    "needs. Is the URL that of a vLLM server?"
                )
        return bytes(content)

    def _hint(self, status: int, url: str, text: str) -> str:
        if status in (401, 403):
            names = " or ".join(self.role.keys)
            return f" Set {names} to the server's --api-key{' (the one that is set is not it)' if self.key else ''}."
        if status == 400 and url.startswith("http://") and "https" in text.lower():
            return f" Write https://{url.removeprefix('http://')}."
        if 300 <= status < 400:
            return " Give the URL it redirects to."
        if status == 404:
            return " Is the URL that of a vLLM server, without a path?"
        return ""


def base_url(url: str, role: Role) -> str:
    """A URL that the user wrote, without `/v1`. Raises the role's error unless it is that of a server, and nothing more."""
    url = url.strip().rstrip("/").removesuffix("/v1")
    shown = public_url(url)
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is not a number
        known = False
    if not known:
        raise role.error(f"{role.name} at {shown!r}: that is not the URL of a server. Write http://host:port.")
    if shown != url:
        raise role.error(
            f"{role.name} at {shown}: a URL shows its user and password or its query to every log. "
            f"Set {' or '.join(role.keys)} instead."
        )
    return parts.scheme + url[len(parts.scheme) :]  # in small letters


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first that fails ends the others."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Parsing makes hundreds of thousands of small objects; collections among them would double its cost."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _api_key(role: Role) -> str:
    """The key of servers, from the environment."""
    for variable in role.keys:
        key = os.environ.get(variable, "").strip()  # env files and mounted secrets end in a newline
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{variable} holds characters that no HTTP header can carry. See where it is set.")
        if key:
            return key
    return ""


def _proxy_hint() -> str:
    names = "/".join(sorted(getproxies()))
    return f" Requests go through the proxy of {names}_proxy unless no_proxy names the host." if names else ""
