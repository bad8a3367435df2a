"""A teacher on one or more vLLM servers, asked over HTTP for the log-probs of the student's tokens.

Several URLs are replicas of one teacher. All requests run on an event loop in a thread of their own, so that `submit`
returns at once and the trainer goes on with the student while the servers score.

Two transports give the same numbers, chosen for each server by a probe at start:

- compact: `/inference/v1/generate` with the ids to score, answered by their float32 log-probs in base64 (vLLM >= 0.32
  with `--enable-scale-out`, on its V2 model runner); some 5 bytes per token.
- JSON: `/v1/completions` with `prompt_logprobs`, which any vLLM has; 70 to 85 bytes per token. Also where the teacher's
  own top k are asked for, which the compact request cannot.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import logging
import math
import os
import random
import threading
import time
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx
import numpy as np
import orjson
import torch
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential_jitter,
)

from ..errors import TeacherError
from .address import is_server, key_variables, same_model, urls_and_model
from .base import TokenScores


logger = logging.getLogger(__name__)
T = TypeVar("T")

REQUESTS_PER_REPLICA = 16  # in flight at once from this process; vLLM batches what arrives together
TOKENS_PER_REQUEST = 8192  # short sequences share a JSON request up to this; a longer one goes alone
ATTEMPTS = 6  # for one request, over all replicas
CONNECT_SECONDS = 4.0
ANSWER_SECONDS = 5.0  # for the small questions: which model, is it well, tokenize this
# A scoring request may take this long, plus what the tokens need that this process has in flight on the replica. 500
# tokens/s allows for thirty-two processes that ask one server of 16000.
SCORE_SECONDS = 300.0
SECONDS_PER_TOKEN = 1 / 500
HEALTH_SECONDS = 1.0  # between two looks at a replica that is out
REMINDER_SECONDS = 60.0
BYTES_PER_LOGPROB = (
    1024  # more than any answer needs (a token's text is spelt out in JSON); what is longer is no answer
)
VLLM_MINUS_INF = -9999.0  # how vLLM's JSON says -inf
# Sent with every request, so that a model's own generation_config.json never bends the distribution that is scored.
PLAIN_SAMPLING = {
    "max_tokens": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


class _Fault(Exception):
    """What may pass: a broken connection, a time-out, 429, 5xx, a cut answer. The text is for the user."""

    def __init__(self, message: str, takes_out: bool = True):
        super().__init__(message)
        self.takes_out = takes_out  # whether the replica must show that it is well before it gets another request


@dataclass
class _Replica:
    """One server. It is chosen by `tokens_in_flight`, the tokens this process waits for there."""

    url: str
    compact: bool = False
    alive: bool = True
    requests_in_flight: int = 0
    tokens_in_flight: int = 0


@dataclass(frozen=True)
class _Row:
    index: int
    token_ids: list[int]
    prompt_len: int


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
        self._model = model
        self.urls = [url.strip().rstrip("/").removesuffix("/v1") for url in urls]
        for url in self.urls:
            _check_url(url, branch)
        self._key = _api_key(branch)
        self._replicas = [_Replica(url) for url in self.urls]
        # Where replicas are equally busy any of them will do; ranks that all took the first would flood it.
        self._dice = random.Random()
        self._changed = asyncio.Condition()  # a place has become free, a replica has come or gone
        self._tasks: set[asyncio.Task[None]] = set()
        self._outage: asyncio.Task[None] | None = None  # counts the time without any replica
        self._outage_over = ""  # why nobody waits any longer
        self._last_fault = ""
        self._client = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {self._key}"} if self._key else {})},
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # `_exchange` watches the whole of a request
            # `_lease` counts the connections. vLLM drops idle ones after 5 seconds; before that, they are not used again.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name=f"teacher-{branch}", daemon=True)
        self._thread.start()
        try:
            self._wait(self._connect())
        except BaseException:
            self.close()
            raise

    async def _connect(self) -> None:
        served = dict(zip(self.urls, await self._all(self._served_model(url) for url in self.urls), strict=True))
        if len({model["id"] for model in served.values()}) > 1:
            listing = ", ".join(f"{url} serves {model['id']!r}" for url, model in served.items())
            raise TeacherError(
                f"the replicas of teacher {self.branch!r} serve different models: {listing}. A branch has one teacher; "
                "start every replica with the same model and --served-model-name."
            )
        self.name = served[self.urls[0]]["id"]
        self.model_path = str(served[self.urls[0]].get("root") or self.name)
        if self._model is not None and not any(same_model(self._model, name) for name in (self.name, self.model_path)):
            raise TeacherError(
                f"teacher {self.branch!r} at {', '.join(self.urls)} serves {self._without_key(self.name)!r}, and the "
                f"config wants {self._model!r}. Start the right model there, or mend the URL or the config."
            )
        self.max_model_len = min(model.get("max_model_len") or math.inf for model in served.values())
        await self._all(self._choose_transport(replica) for replica in self._replicas)
        for replica in self._replicas:
            transport = "compact (/inference/v1/generate)" if replica.compact else "JSON (/v1/completions)"
            logger.info("teacher %r: %s serves %r, transport %s", self.branch, replica.url, self.name, transport)

    def close(self) -> None:
        """Drop all connections and end the thread. What is still being scored fails."""
        if self._loop.is_closed():
            return

        async def shut() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # their futures end with them
            await self._client.aclose()

        self._wait(shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run_loop(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    @property
    def has_key(self) -> bool:
        """Whether requests carry an API key."""
        return bool(self._key)

    @property
    def transports(self) -> dict[str, str]:
        """`"compact"` or `"JSON"` for each URL."""
        return {replica.url: "compact" if replica.compact else "JSON" for replica in self._replicas}

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST one small question to every replica: the answer of each URL. Raises `TeacherError`."""
        answers = self._wait(
            self._all(self._question("POST", url, path, {"model": self.name, **body}) for url in self.urls)
        )
        return dict(zip(self.urls, answers, strict=True))

    def check_context(self, max_tokens: int) -> None:
        """Raise `TeacherError` unless a sequence of `max_tokens` tokens, plus the one vLLM generates, fits."""
        if self.max_model_len < max_tokens + 1:
            raise TeacherError(
                f"teacher {self.branch!r} at {', '.join(self.urls)} takes sequences of {self.max_model_len} tokens, but "
                f"max_prompt_length + max_completion_length + 1 is {max_tokens + 1}. Start it with --max-model-len "
                f"{max_tokens + 1} (`camopd serve` with the lengths of the run), or lower max_completion_length."
            )

    def score(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int = 0) -> list[TokenScores]:
        """See [`Teacher.score`]. Raises `TeacherError` with the row numbers when log-probs are missing or not finite."""
        return self.submit(token_ids, prompt_lens, top_k).result()

    def submit(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int = 0) -> Future[list[TokenScores]]:
        """Begin to score and return at once; the result, or what `score` raises, comes with the future."""
        return asyncio.run_coroutine_threadsafe(self._score(token_ids, prompt_lens, top_k), self._loop)

    # ------------------------------------------------------------------------------------------------------ scoring

    async def _score(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int) -> list[TokenScores]:
        if self._outage_over:  # a new batch, a new wait
            self._begin_outage()
        rows = [
            _Row(index, ids, prompt_len)
            for index, (ids, prompt_len) in enumerate(zip(token_ids, prompt_lens, strict=True))
        ]
        scores: list[Any] = [None] * len(rows)
        for row in rows:
            if len(row.token_ids) == row.prompt_len:  # an empty completion: nothing to ask
                scores[row.index] = _to_scores(np.zeros((0, 1 + top_k)), np.zeros((0, top_k), int) if top_k else None)
        requests = self._to_requests([row for row in rows if scores[row.index] is None], top_k)
        for found in await self._all(self._score_request(request, top_k) for request in requests):
            for row, row_scores in found:
                scores[row.index] = row_scores
        self._check_finite(scores)
        return scores

    def _to_requests(self, rows: list[_Row], top_k: int) -> list[list[_Row]]:
        """Rows for each request, longest first: a long one that starts last would keep everybody waiting."""
        rows = sorted(rows, key=lambda row: -len(row.token_ids))
        if not top_k and any(replica.compact for replica in self._replicas):  # which takes one sequence
            return [[row] for row in rows]
        # No bigger than gives every replica its full number of requests.
        places = REQUESTS_PER_REPLICA * len(self._replicas)
        budget = min(TOKENS_PER_REQUEST, math.ceil(sum(len(row.token_ids) for row in rows) / places))
        requests: list[list[_Row]] = []
        size = 0
        for row in rows:
            if not requests or size + len(row.token_ids) > budget:
                requests.append([])
                size = 0
            requests[-1].append(row)
            size += len(row.token_ids)
        return requests

    async def _score_request(self, rows: list[_Row], top_k: int) -> list[tuple[_Row, TokenScores]]:
        """Score some rows together, on another replica after each fault."""
        tokens = sum(len(row.token_ids) for row in rows)
        tried: _Replica | None = None
        first_fault, faults = math.inf, 0

        def give_up(state: RetryCallState) -> bool:
            """After so many faults, or when they have lasted for `patience`. One that is busy (429) is only waited for."""
            nonlocal first_fault, faults
            assert state.outcome is not None
            fault = state.outcome.exception()
            assert isinstance(fault, _Fault)
            first_fault = min(first_fault, time.monotonic())
            faults += fault.takes_out
            return faults >= ATTEMPTS or time.monotonic() - first_fault > self.patience

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Fault),
            stop=give_up,
            wait=wait_exponential_jitter(0.2, 10),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    replica = tried = await self._lease(tokens, avoid=tried)
                    try:
                        if replica.compact and not top_k and len(rows) == 1:
                            return [(rows[0], await self._score_compact(replica, rows[0]))]
                        return await self._score_json(replica, rows, top_k)
                    except _Fault as fault:
                        if fault.takes_out:
                            self._take_out(replica, str(fault))
                        raise
                    finally:
                        await self._give_back(replica, tokens)
        except _Fault as fault:
            raise TeacherError(
                f"teacher {self.branch!r} could not score {len(rows)} sequences of {tokens} tokens in "
                f"{retrying.statistics['attempt_number']} attempts; the last: {fault}. Look at that server's log."
            ) from None
        except (TeacherError, asyncio.CancelledError):
            raise
        except Exception as error:  # whatever a stranger may answer must reach the trainer as one kind of error
            where = tried.url if tried is not None else ", ".join(self.urls)
            raise TeacherError(
                f"teacher {self.branch!r} at {where} answered what cannot be read "
                f"({self._without_key(f'{type(error).__name__}: {error}'[:500])}). Is this a vLLM server?"
            ) from None
        raise AssertionError("unreachable")

    async def _score_compact(self, replica: _Replica, row: _Row) -> TokenScores:
        """Row i of `prompt_logprob_token_ids` is scored as prompt token `prompt_logprob_start` + i + 1."""
        scored = np.array(row.token_ids[row.prompt_len :], dtype=np.int64)
        request_id = uuid.uuid4().hex
        sampling = {
            **PLAIN_SAMPLING,
            "prompt_logprob_token_ids": scored[:, None],  # an array is written faster than 32768 small lists
            "prompt_logprob_start": row.prompt_len - 1,
        }
        body = {"model": self.name, "request_id": request_id, "token_ids": row.token_ids, "sampling_params": sampling}
        answer = await self._scoring_answer(replica, "/inference/v1/generate", body, len(scored))
        if not str(answer.get("request_id")).endswith(request_id):
            raise self._unusable(replica, f"answered request {answer.get('request_id')!r} when asked {request_id!r}")
        logps = _from_base64_npy(answer.get("prompt_token_id_logprobs"))
        if logps is None or len(logps) != len(scored):
            found = "no array of them" if logps is None else f"{len(logps)} log-probs"
            raise self._unusable(replica, f"scored {len(scored)} completion tokens with {found}")
        return _to_scores(logps[:, None], None)

    async def _score_json(self, replica: _Replica, rows: list[_Row], top_k: int) -> list[tuple[_Row, TokenScores]]:
        body = {
            "model": self.name,
            "prompt": [row.token_ids for row in rows],
            "prompt_logprobs": top_k,
            **PLAIN_SAMPLING,
        }
        tokens = sum(len(row.token_ids) for row in rows)
        answer = await self._scoring_answer(replica, "/v1/completions", body, tokens * (1 + top_k))
        choices = sorted(answer.get("choices") or [], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(len(rows))):
            raise self._unusable(replica, f"answered {len(choices)} of {len(rows)} sequences")
        scores = []
        for row, choice in zip(rows, choices, strict=True):
            entries = choice.get("prompt_logprobs") or []
            if len(entries) != len(row.token_ids):
                raise self._unusable(
                    replica,
                    f"scored {len(entries)} of {len(row.token_ids)} tokens. Is this a vLLM server? Others ignore "
                    "prompt_logprobs",
                )
            try:
                with _no_garbage_collection():
                    scores.append(
                        (row, _from_entries(row.token_ids[row.prompt_len :], entries[row.prompt_len :], top_k))
                    )
            except (KeyError, TypeError, AttributeError) as error:
                raise self._unusable(
                    replica,
                    f"gave no log-prob for a token it was asked to score ({type(error).__name__}: {error}). Something "
                    "between here and there mixes answers up, or it is no vLLM server",
                ) from None
        return scores

    async def _scoring_answer(
        self, replica: _Replica, path: str, body: dict[str, Any], numbers: int
    ) -> dict[str, Any]:
        seconds = SCORE_SECONDS + replica.tokens_in_flight * SECONDS_PER_TOKEN
        answer = await self._exchange(
            "POST", replica.url, path, body, seconds, max_bytes=65536 + BYTES_PER_LOGPROB * numbers
        )
        if not isinstance(answer, dict) or (answer.get("model") or self.name) != self.name:
            theirs = answer.get("model") if isinstance(answer, dict) else answer
            raise self._unusable(replica, f"answered as {theirs!r} and not as {self.name!r}")
        return answer

    def _unusable(self, replica: _Replica, what: str) -> TeacherError:
        return TeacherError(self._without_key(f"teacher {self.branch!r} at {replica.url} {what}."))

    def _check_finite(self, scores: list[TokenScores]) -> None:
        not_finite = [
            sum(
                int((~torch.isfinite(part) | (part == VLLM_MINUS_INF)).sum())
                for part in (score.logps, score.top_logps)
                if part is not None
            )
            for score in scores
        ]
        if any(not_finite):
            rows = [row for row, count in enumerate(not_finite) if count]
            raise TeacherError(
                f"teacher {self.branch!r} ({self.name}) answered {sum(not_finite)} missing or non-finite log-probs in "
                f"rows {rows[:8]} of {len(scores)}. Look at the server's log; a server that lost its weights or "
                "overflows in its dtype answers like this."
            )

    # ----------------------------------------------------------------------------------------------------- replicas

    async def _lease(self, tokens: int, avoid: _Replica | None) -> _Replica:
        """A living replica with a free place, the one with the fewest tokens in flight; waits until there is one."""
        async with self._changed:
            while True:
                alive = [replica for replica in self._replicas if replica.alive]
                # Wait for a busy one that works rather than go back to an idle one that does not.
                others = [replica for replica in alive if replica is not avoid] or alive
                free = [replica for replica in others if replica.requests_in_flight < REQUESTS_PER_REPLICA]
                if free:
                    replica = min(free, key=lambda replica: (replica.tokens_in_flight, self._dice.random()))
                    replica.requests_in_flight += 1
                    replica.tokens_in_flight += tokens
                    return replica
                if self._outage_over:
                    raise TeacherError(self._outage_over)
                await self._changed.wait()

    async def _give_back(self, replica: _Replica, tokens: int) -> None:
        async with self._changed:
            replica.requests_in_flight -= 1
            replica.tokens_in_flight -= tokens
            self._changed.notify()

    def _take_out(self, replica: _Replica, why: str) -> None:
        self._last_fault = why
        if not replica.alive:
            return
        logger.warning("teacher %r: replica %s is out: %s", self.branch, replica.url, why)
        replica.alive = False
        self._spawn(self._let_in_when_well(replica))
        if not any(replica.alive for replica in self._replicas):
            self._begin_outage()

    def _begin_outage(self) -> None:
        self._outage_over = ""
        self._outage = self._spawn(self._wait_for_any())

    async def _let_in_when_well(self, replica: _Replica) -> None:
        """Let a replica in again when it is healthy and still serves this teacher's model."""
        started = time.monotonic()
        while True:
            try:
                await self._exchange("GET", replica.url, "/health", None, ANSWER_SECONDS, parse=False)
                model = await self._served_model(replica.url, attempts=1)
                if model["id"] == self.name:
                    break
                self._last_fault = f"{replica.url} serves {self._without_key(model['id'])!r} now"
            except (_Fault, TeacherError):
                pass
            await asyncio.sleep(HEALTH_SECONDS)
        await self._choose_transport(replica)  # it may have been started again with other flags
        async with self._changed:
            replica.alive = True
            self._outage_over = ""
            if self._outage is not None:
                self._outage.cancel()
            self._changed.notify_all()
        seconds = time.monotonic() - started
        logger.warning("teacher %r: replica %s is back after %.0f s", self.branch, replica.url, seconds)

    async def _wait_for_any(self) -> None:
        """Say that every replica is gone, and end the wait of all requests when `patience` is over."""
        started = time.monotonic()
        where = ", ".join(self.urls)
        said = 0
        while (waited := time.monotonic() - started) < self.patience:
            if waited > HEALTH_SECONDS + said * REMINDER_SECONDS:  # the first second is quiet: most are a hiccup
                said += 1
                logger.warning(
                    "teacher %r: no replica answers (%s). Waiting for one, %.0f of %.0f seconds so far; the last fault: %s",
                    self.branch, where, waited, self.patience, self._last_fault,
                )  # fmt: skip
            await asyncio.sleep(min(HEALTH_SECONDS, self.patience - waited))
        async with self._changed:
            self._outage_over = (
                f"teacher {self.branch!r} has no replica left: {where} did not come back in teacher_patience="
                f"{self.patience:g} seconds; the last fault: {self._last_fault}. Start the server again, then resume."
            )
            self._changed.notify_all()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the loop itself holds only a weak reference
        task.add_done_callback(self._tasks.discard)
        return task

    # --------------------------------------------------------------------------------------------------------- HTTP

    async def _choose_transport(self, replica: _Replica) -> None:
        """Score one token the compact way; whoever cannot do that gets JSON."""
        sampling = {**PLAIN_SAMPLING, "prompt_logprob_token_ids": [[1]], "prompt_logprob_start": 0}
        body = {"model": self.name, "token_ids": [0, 1], "sampling_params": sampling}
        try:
            answer = await self._exchange("POST", replica.url, "/inference/v1/generate", body, 30.0)
            logps = _from_base64_npy(answer.get("prompt_token_id_logprobs"))
            replica.compact = logps is not None and len(logps) == 1
        except (_Fault, TeacherError, AttributeError):  # 403 without the flag, 404 in old versions, 400 on runner V1
            replica.compact = False

    async def _served_model(self, url: str, attempts: int = 3) -> dict[str, Any]:
        answer = await self._question("GET", url, "/v1/models", None, attempts)
        try:
            model = answer["data"][0]
            return {"id": str(model["id"]), "max_model_len": model.get("max_model_len"), "root": model.get("root")}
        except (KeyError, IndexError, TypeError, AttributeError):
            raise TeacherError(
                f"teacher {self.branch!r} at {url} does not say which model it serves: "
                f"{self._without_key(str(answer))[:200]}. Is the URL that of a vLLM server, without a path?"
            ) from None

    async def _question(
        self, method: str, url: str, path: str, body: dict[str, Any] | None, attempts: int = 3
    ) -> dict[str, Any]:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Fault),
            stop=stop_after_attempt(attempts) | stop_after_delay(3.0),
            wait=wait_exponential_jitter(0.2, 1.0),
            reraise=True,
        )
        try:
            return await retrying(self._exchange, method, url, path, body, ANSWER_SECONDS)
        except _Fault as fault:
            raise TeacherError(
                f"teacher {self.branch!r} at {fault}. Is `vllm serve` up on that host and port, reachable from this "
                f"machine, and does it speak {url.partition(':')[0]}?{_proxy_hint()}"
            ) from None

    async def _exchange(
        self,
        method: str,
        url: str,
        path: str,
        body: dict[str, Any] | None,
        seconds: float,
        max_bytes: int = 4 << 20,
        parse: bool = True,
    ) -> Any:
        """One request and its JSON. Raises `_Fault` for what may pass and `TeacherError` for what is final."""
        content = bytearray()
        try:
            async with (
                asyncio.timeout(seconds),
                self._client.stream(
                    method,
                    url + path,
                    content=None if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY),
                    headers={} if body is None else {"Content-Type": "application/json"},
                ) as response,
            ):
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > max_bytes:
                        raise TeacherError(
                            f"teacher {self.branch!r} at {url} answered more than {max_bytes} bytes, which no answer to "
                            f"{path} needs. Is the URL that of a vLLM server?"
                        )
        except TimeoutError:
            raise _Fault(f"{url} did not answer {path} in {seconds:.0f} seconds") from None
        except (httpx.TransportError, httpx.InvalidURL, httpx.DecodingError) as error:
            raise _Fault(f"{url} does not answer ({type(error).__name__}: {self._without_key(str(error))})") from None
        text = self._without_key(bytes(content[:5000]).decode(errors="replace"))[:500]
        status = response.status_code
        if status == 429 or status >= 500:
            raise _Fault(f"{url} answered {status}: {text}", takes_out=status != 429)
        if status != 200:
            raise TeacherError(
                f"teacher {self.branch!r} at {url} answered {status}: {text}{self._hint(status, url, text)}"
            )
        if not parse:
            return None
        try:
            with _no_garbage_collection():
                return orjson.loads(content)
        except orjson.JSONDecodeError:
            raise _Fault(
                f"{url} did not answer {path} in JSON: {text[:200]!r}. Is the URL that of a vLLM server, without a path?",
            ) from None

    def _hint(self, status: int, url: str, text: str) -> str:
        if status in (401, 403):
            names = " or ".join(key_variables(self.branch))
            return f" Set {names} to the server's --api-key{' (the one that is set is not it)' if self._key else ''}."
        if status == 400 and url.startswith("http://") and "https" in text.lower():
            return f" Write https://{url.removeprefix('http://')}."
        if 300 <= status < 400:
            return " Give the URL it redirects to."
        if status == 404:
            return " Is the URL that of a vLLM server, without a path?"
        return ""

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    # ------------------------------------------------------------------------------------------------------- asyncio

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @staticmethod
    async def _all(work: Any) -> list[Any]:
        """Results in order; the first that fails ends the others."""
        tasks = [asyncio.ensure_future(item) for item in work]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise


def connect_servers(teachers: dict[str, Any], max_tokens: int, patience: float) -> dict[str, Any]:
    """The same teachers, with a `ServerTeacher` in place of each URL: what is wrong with a server shows before any model
    or dataset is loaded. Branches that name the same server share one.

    Raises `TeacherError` for a server that cannot be used or whose context is shorter than `max_tokens`.
    """
    made: dict[str, ServerTeacher] = {}
    connected = dict(teachers)
    for branch, spec in teachers.items():
        if is_server(spec):
            urls, model = urls_and_model(spec)
            if repr(urls) not in made:
                made[repr(urls)] = ServerTeacher(urls, branch, patience, model)
                made[repr(urls)].check_context(max_tokens)
            connected[branch] = made[repr(urls)]
    return connected


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Parsing makes hundreds of thousands of small objects; collections among them would double its cost."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _api_key(branch: str) -> str:
    """The key of a branch's servers, from the environment."""
    for variable in key_variables(branch):
        key = os.environ.get(variable, "").strip()  # env files and mounted secrets end in a newline
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{variable} holds characters that no HTTP header can carry. See where it is set.")
        if key:
            return key
    return ""


def _from_base64_npy(text: Any) -> np.ndarray | None:
    """The float32 array of shape (T, 1) in an answer, as (T,); `None` if it is none. Nothing is unpickled, and no more
    memory is taken than the text has."""
    if not isinstance(text, str):
        return None
    try:
        data = base64.b64decode(text, validate=True)
        stream = io.BytesIO(data)
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        values = np.frombuffer(
            data, dtype="<f4", offset=stream.tell()
        ).copy()  # the text's own bytes cannot be written
    except (ValueError, TypeError, SyntaxError, EOFError):
        return None
    return values if dtype == np.dtype("<f4") and shape == (len(values), 1) else None


def _check_url(url: str, branch: str) -> None:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is none
        known = False
    if not known:
        raise TeacherError(f"teacher {branch!r} at {url!r}: that is no URL of a server. Write http://host:port.")
    if parts.username or parts.password:
        raise TeacherError(
            f"teacher {branch!r} at {parts.hostname}: a URL shows its user and password to every log. Set "
            f"{' or '.join(key_variables(branch))} instead."
        )


def _proxy_hint() -> str:
    proxies = getproxies()
    return (
        f" Requests go through the proxy of {'/'.join(sorted(proxies))}_proxy unless no_proxy names the host."
        if proxies
        else ""
    )


def _from_entries(token_ids: list[int], entries: list[Any], top_k: int) -> TokenScores:
    """Log-probs out of vLLM's JSON: per token `{"<id>": {"logprob": float, "rank": int, ...}, ...}`."""
    if not top_k:  # the one entry is that of the token; anything else is the answer to another question
        logps = [entry[str(token)]["logprob"] for token, entry in zip(token_ids, entries, strict=True)]
        return _to_scores(np.array(logps, dtype=np.float32)[:, None], None)
    rows, ids = [], []
    for token, entry in zip(token_ids, entries, strict=True):
        best = sorted(entry.items(), key=lambda item: item[1]["rank"])[:top_k]
        rows.append([entry[str(token)]["logprob"], *(value["logprob"] for _, value in best)])
        ids.append([int(candidate) for candidate, _ in best])
    return _to_scores(np.array(rows, dtype=np.float32), np.array(ids))


def _to_scores(logps: np.ndarray, top_ids: np.ndarray | None) -> TokenScores:
    """First column: the token itself; the others, its rivals."""
    values = torch.from_numpy(np.ascontiguousarray(logps, dtype=np.float32))
    if top_ids is None:
        return TokenScores(values[:, 0])
    return TokenScores(values[:, 0], torch.from_numpy(np.ascontiguousarray(top_ids, dtype=np.int64)), values[:, 1:])
