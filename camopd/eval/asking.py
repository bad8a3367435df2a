"""A request to a server of an evaluation: one deadline, nothing compressed, a bounded size, and no key in what is shown."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from functools import cache
from typing import Any, NamedTuple

import httpx

from ..teachers.address import without_secrets


MOST = 8 << 20  # bytes of a reply: 16,000 tokens, and all that a model has thought before them
SHOWN = 200  # characters of a server's words in an error
WORD = 6  # characters: a shorter key, as EMPTY or 0, is not a secret, and may be a word of any text


class Unanswered(Exception):
    """The server was not there, broke off, or took too long. The text is for the user."""


class Ended(Exception):
    """The line was ended, by `Line.end`."""


class Reply(NamedTuple):
    """What came back. `unread` says why there is no text."""

    status: int
    text: str
    unread: str = ""


class Line:
    """To servers that have one key, which no text of theirs may show. Threads may share it."""

    def __init__(self, key: str | None, seconds: float, most: int = MOST):
        """`seconds` is for the whole of a request, and `most` the bytes of a reply."""
        self.key, self.seconds, self.most = key, seconds, most
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._under_way: set[asyncio.Task[Any]] = set()

    def end(self) -> None:
        """End what is sent or waited for, in whatever thread: it raises `Ended`, and so does all that follows."""
        self._ended.set()
        with self._lock:
            for task in self._under_way:
                task.get_loop().call_soon_threadsafe(task.cancel)

    def wait(self, seconds: float) -> None:
        """Before another attempt. Raises `Ended`."""
        if self._ended.wait(seconds):
            raise Ended

    def without_key(self, text: str) -> str:
        """A text of a server, or about one, that may be kept."""
        return without_key(text, self.key)

    def shown(self, text: str) -> str:
        """The beginning of such a text, for an error. The key goes first: half of it is not found."""
        return without_secrets(self.without_key(text))[:SHOWN]

    def send(self, url: str, body: dict[str, Any] | None = None) -> Reply:
        """GET, or POST where there is a body. Raises `Unanswered`, and `Ended`."""
        try:
            return asyncio.run(self._noted(url, body))  # in any thread; a time limit of httpx is for each read alone
        except asyncio.CancelledError:
            raise Ended from None

    def get(self, url: str) -> Any:
        """The JSON of an answer. Raises `Unanswered` with what came in its place."""
        reply = self.send(url)
        if reply.status != 200 or reply.unread:
            raise Unanswered(f"HTTP {reply.status}: {reply.unread or self.shown(reply.text)}")
        try:
            return json.loads(reply.text)
        except (ValueError, RecursionError):
            raise Unanswered(f"not JSON: {self.shown(reply.text)!r}") from None

    async def _noted(self, url: str, body: dict[str, Any] | None) -> Reply:
        task = asyncio.current_task()
        assert task is not None
        with self._lock:
            if self._ended.is_set():
                raise Ended
            self._under_way.add(task)
        try:
            return await self._send(url, body)
        finally:  # before its loop is closed, which `end` is not to call
            with self._lock:
                self._under_way.discard(task)

    async def _send(self, url: str, body: dict[str, Any] | None) -> Reply:
        headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        content = bytearray()
        try:
            async with (
                asyncio.timeout(self.seconds),
                httpx.AsyncClient(headers=headers, timeout=None, trust_env=False, verify=_tls()) as client,
                client.stream("GET" if body is None else "POST", url, json=body) as reply,
            ):
                status = reply.status_code
                encoding = reply.headers.get("Content-Encoding", "identity").strip().lower()
                if encoding != "identity":  # unpacked, it may have any size
                    encoding = self.without_key(encoding)[:40]
                    return Reply(status, "", f"in Content-Encoding {encoding!r}, and asked for none")
                async for chunk in reply.aiter_raw():
                    content += chunk
                    if len(content) > self.most:
                        return Reply(status, "", f"longer than {self.most} bytes, which no answer needs")
        except TimeoutError:
            raise Unanswered(f"no answer in {self.seconds:.0f} seconds") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unanswered(f"{type(error).__name__}: {self.shown(str(error))}") from None
        return Reply(status, content.decode(errors="replace"))


def without_key(text: str, key: str | None) -> str:
    """A text without the key of its server, if that is long enough to be a secret."""
    return text.replace(key, "***") if key and len(key) >= WORD else text


def key_of(variable: str) -> str | None:
    """The key in an environment variable. Raises `ValueError` for one that no header can carry."""
    key = os.environ.get(variable, "").strip()  # env files and mounted secrets end in a newline
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{variable} holds characters that no HTTP header can carry. See where it is set.")
    return key or None


@cache
def _tls() -> Any:
    """Made once: each reads the certificates of all authorities."""
    return httpx.create_ssl_context(trust_env=False)
