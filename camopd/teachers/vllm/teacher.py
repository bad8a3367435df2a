"""A teacher on one or more vLLM servers, asked over HTTP for the log-probs of the student's tokens.

Several URLs are replicas of one teacher. All requests run on an event loop in a thread of their own, so that `submit`
returns at once and the trainer goes on with the student while the servers score.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from ...errors import TeacherError
from .. import limits
from ..address import is_server, urls_and_model
from ..base import TokenScores
from .http import Client, Fault, base_url, pause, together
from .replicas import Replica, Replicas
from .transports import (
    Row,
    UnusableAnswer,
    compact_request,
    count_missing,
    first_missing,
    group_rows,
    json_request,
    no_scores,
)


T = TypeVar("T")


class ServerTeacher:
    """One teacher model behind one or more vLLM URLs."""

    def __init__(self, urls: Sequence[str], branch: str, patience: float = 900.0, model: str | None = None):
        """Reach every replica, learn what it serves, and see which transport it speaks.

        An API key is read from the environment variable `CAMOPD_TEACHER_API_KEY_<BRANCH>`, or `CAMOPD_TEACHER_API_KEY`.

        Args:
            urls: `http(s)://host:port` of each replica.
            branch: for messages, and for the name of the key.
            patience: seconds to wait for a replica when all of them are gone.
            model: what they must serve, where that is known.

        Raises `TeacherError` when a replica does not answer, or serves another model than it should or than the others.
        """
        self.branch = branch
        self.patience = patience
        self.urls = [base_url(url, branch) for url in urls]
        self._client = Client(branch)
        self._replicas = Replicas(self.urls, self._client, patience)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name=f"teacher-{branch}", daemon=True)
        self._thread.start()
        try:
            self._wait(self._replicas.connect(model))
        except BaseException:
            self.close()
            raise
        self.name, self.model_path, _ = self._replicas.model
        self.max_model_len = self._replicas.max_model_len

    def close(self) -> None:
        """Drop all connections and end the thread. What is still being scored fails."""
        if self._loop.is_closed():
            return

        async def shut() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # their futures end with them
            await self._client.close()

        with suppress(TimeoutError):  # the thread is a daemon, and what it does not end ends with the process
            self._wait(shut(), limits.ANSWER_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(limits.ANSWER_SECONDS)

    def _run_loop(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        """What a piece of work on the loop gives. Requests have time limits of their own."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    @property
    def has_key(self) -> bool:
        """Whether requests carry an API key."""
        return bool(self._client.key)

    @property
    def transports(self) -> dict[str, str]:
        """`"compact"` or `"JSON"` for each URL."""
        return {replica.url: replica.transport for replica in self._replicas.all}

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST one small question to every replica: the answer of each URL. Raises `TeacherError`."""
        body = {"model": self.name, **body}
        answers = self._wait(together(self._client.ask(url, path, body) for url in self.urls))
        return dict(zip(self.urls, answers, strict=True))

    def check_context(self, max_tokens: int) -> None:
        """Raise `TeacherError` unless a sequence of `max_tokens` tokens, plus the one vLLM generates, fits."""
        if self.max_model_len < max_tokens + 1:
            raise TeacherError(
                f"teacher {self.branch!r} at {self._replicas.where} takes sequences of {self.max_model_len} tokens, but "
                f"max_prompt_length + max_completion_length + 1 is {max_tokens + 1}. Start it with --max-model-len "
                f"{max_tokens + 1} (`camopd serve` with the lengths of the run), or lower max_completion_length."
            )

    def score(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int = 0) -> list[TokenScores]:
        """See [`Teacher.score`]. Raises `TeacherError` with the row numbers when log-probs are missing or not finite."""
        return self.submit(token_ids, prompt_lens, top_k).result()

    def submit(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int = 0) -> Future[list[TokenScores]]:
        """Begin to score and return at once; the result, or what `score` raises, comes with the future."""
        return asyncio.run_coroutine_threadsafe(self._score(token_ids, prompt_lens, top_k), self._loop)

    async def _score(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int) -> list[TokenScores]:
        self._replicas.wait_anew()
        rows = [Row(index, *sequence) for index, sequence in enumerate(zip(token_ids, prompt_lens, strict=True))]
        scores = [no_scores(top_k)] * len(rows)  # of an empty completion: nothing to ask
        compact = not top_k and any(replica.compact for replica in self._replicas.all)
        asked = [row for row in rows if len(row.token_ids) > row.prompt_len]
        requests = group_rows(asked, len(self.urls), one_each=compact)
        answers = await together(self._score_rows(request, top_k) for request in requests)
        urls = {}
        for request, (url, answer) in zip(requests, answers, strict=True):
            for row, found in zip(request, answer, strict=True):
                scores[row.index], urls[row.index] = found, url
        missing = {row: count for row, count in enumerate(map(count_missing, scores)) if count}
        if missing:
            first = next(iter(missing))
            place, value = first_missing(scores[first])
            raise TeacherError(
                f"teacher {self.branch!r} ({self.name}) answered {sum(missing.values())} missing or non-finite log-probs "
                f"in rows {list(missing)[:8]} of {len(scores)}, the first {value} for token {place} of the completion in "
                f"row {first} from {urls[first]}. Look at that server's log; one that lost its weights or overflows in its "
                "dtype answers like this."
            )
        return scores

    async def _score_rows(self, rows: list[Row], top_k: int) -> tuple[str, list[TokenScores]]:
        """The scores of a request's rows and the URL they are from; on another replica after each fault."""
        tokens = sum(len(row.token_ids) for row in rows)
        tried: Replica | None = None
        first_fault, faults = math.inf, 0
        for attempt in itertools.count(1):
            try:
                async with self._replicas.lease(tokens, avoid=tried) as tried:
                    return tried.url, await self._ask_replica(tried, rows, top_k)
            except Fault as fault:
                first_fault = min(first_fault, time.monotonic())
                faults += fault.takes_out  # one that is busy (429) is only waited for
                if faults >= limits.ATTEMPTS or time.monotonic() - first_fault > self.patience:
                    raise TeacherError(
                        f"teacher {self.branch!r} could not score {len(rows)} sequences of {tokens} tokens in {attempt} "
                        f"attempts; the last: {fault}. Look at that server's log."
                    ) from None
            except (TeacherError, asyncio.CancelledError):
                raise
            except Exception as error:  # whatever a stranger may answer must reach the trainer as one kind of error
                where, what = tried.url if tried else self._replicas.where, f"{type(error).__name__}: {error}"[:500]
                raise TeacherError(
                    f"teacher {self.branch!r} at {where} answered what cannot be read "
                    f"({self._client.without_key(what)}). Is this a vLLM server?"
                ) from None
            await pause(attempt, limits.SCORE_PAUSE)
        raise AssertionError("unreachable")

    async def _ask_replica(self, replica: Replica, rows: list[Row], top_k: int) -> list[TokenScores]:
        if replica.compact and not top_k and len(rows) == 1:
            request = compact_request(self.name, rows[0])
        else:
            request = json_request(self.name, rows, top_k)
        seconds = limits.request_seconds(replica.tokens_in_flight)
        answer = await self._client.request(replica.url, request.path, request.body, seconds, request.max_bytes)
        try:
            name = answer.get("model") or self.name if isinstance(answer, dict) else answer
            if name != self.name:
                raise UnusableAnswer(f"answered as {name!r} and not as {self.name!r}")
            return request.read(answer)
        except UnusableAnswer as error:
            text = f"teacher {self.branch!r} at {replica.url} {str(error)[:500]}."
            raise TeacherError(self._client.without_key(text)) from None


def connect_servers(
    teachers: dict[str, Any],
    max_tokens: int = 0,
    patience: float = 900.0,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, Any]:
    """The same teachers, with a `ServerTeacher` in place of each URL: what is wrong with a server shows before any model
    or dataset is loaded. Branches that name the same server and model share one.

    Raises `TeacherError` for a server that cannot be used or whose context is shorter than `max_tokens`; or hands branch
    and error to `failed`, and goes on.
    """
    made: dict[str, ServerTeacher] = {}
    connected = dict(teachers)
    for branch, spec in teachers.items():
        if not is_server(spec):
            continue
        urls, model = urls_and_model(spec)
        try:
            teacher = made.get(repr((urls, model))) or ServerTeacher(urls, branch, patience, model)
            teacher.check_context(max_tokens)
            made[repr((urls, model))] = connected[branch] = teacher
        except (TeacherError, ValueError) as error:
            if failed is None:
                raise
            failed(branch, error)
    return connected
