"""A teacher on one or more vLLM servers, asked over HTTP for the log-probs of the student's tokens.

Any plain `vllm serve MODEL` will do: the request is `/v1/completions` with `prompt_logprobs`, which scores the prompt it
is given. Several URLs are replicas of one teacher and share the rows.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import orjson
import torch
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter
from transformers import PreTrainedTokenizerBase

from ..errors import TeacherError
from .base import TokenScores


REQUESTS_PER_REPLICA = 16  # in flight at once; vLLM batches what arrives together
CONNECT_SECONDS = 10.0
SCORE_SECONDS = 600.0  # for one sequence: a 36k-token prefill behind fifteen others
ATTEMPTS = 5
# Texts whose token ids differ between tokenizer families: spaces, digits, code, accents, CJK, an emoji.
PROBE_TEXTS = ("The capital of  France is Paris.\n\n", "def f(x):\n    return x ** 2 + 31415", "Çéß 東京 😀")


class ServerTeacher:
    """One teacher model behind one or more vLLM URLs."""

    def __init__(self, urls: Sequence[str], branch: str):
        """Reach every replica and learn what it serves.

        An API key is read from the environment variable `CAMOPD_TEACHER_API_KEY`.

        Raises `TeacherError` when a replica does not answer or the replicas serve different models.
        """
        self.branch = branch
        self._giving_up = threading.Event()
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self._key = os.environ.get(
            "CAMOPD_TEACHER_API_KEY", ""
        ).strip()  # env files and mounted secrets end in a newline
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(
                "CAMOPD_TEACHER_API_KEY holds characters that no HTTP header can carry. See where it is set."
            )
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(SCORE_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=REQUESTS_PER_REPLICA * len(self.urls)),
        )
        served = {url: self._served_model(url) for url in self.urls}
        names = {model["id"] for model in served.values()}
        if len(names) > 1:
            listing = ", ".join(f"{url} serves {model['id']!r}" for url, model in served.items())
            raise TeacherError(
                f"the replicas of teacher {branch!r} serve different models: {listing}. A branch has one teacher; "
                "start every replica with the same model and --served-model-name."
            )
        self.name = names.pop()
        self.max_model_len = min(model["max_model_len"] for model in served.values())

    def check_context(self, max_tokens: int) -> None:
        """Raise `TeacherError` unless a sequence of `max_tokens` tokens, plus the one vLLM generates, fits."""
        if self.max_model_len < max_tokens + 1:
            raise TeacherError(
                f"teacher {self.branch!r} at {', '.join(self.urls)} takes sequences of {self.max_model_len} tokens, but "
                f"max_prompt_length + max_completion_length + 1 is {max_tokens + 1}. Start it with --max-model-len "
                f"{max_tokens + 1} or lower max_completion_length."
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `TeacherError` unless the server turns the same texts into the student's token ids."""
        for url, text in itertools.product(self.urls, PROBE_TEXTS):
            body = {"model": self.name, "prompt": text, "add_special_tokens": False}
            theirs = self._request("POST", [url], "/tokenize", body).get("tokens")
            ours = tokenizer(text, add_special_tokens=False)["input_ids"]
            if theirs != ours:
                raise TeacherError(
                    f"teacher {self.branch!r} at {url} has another tokenizer than the student: {text!r} is {theirs} "
                    f"there and {ours} here. Its log-probs would be those of other words; use a teacher of the same "
                    "family."
                )

    def score(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int = 0) -> list[TokenScores]:
        """See [`Teacher.score`]. Raises `TeacherError` with the row numbers when log-probs are missing or not finite."""
        pool = ThreadPoolExecutor(max_workers=REQUESTS_PER_REPLICA * len(self.urls))
        try:
            scores = list(
                pool.map(self._score_row, range(len(token_ids)), token_ids, prompt_lens, itertools.repeat(top_k))
            )
        finally:  # one row that fails for good must not wait for the others, nor let them try again
            self._giving_up.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self._giving_up = threading.Event()
        not_finite = [
            sum(int((~torch.isfinite(part)).sum()) for part in (score.logps, score.top_logps) if part is not None)
            for score in scores
        ]
        if any(not_finite):
            rows = [row for row, count in enumerate(not_finite) if count]
            raise TeacherError(
                f"teacher {self.branch!r} ({self.name}) answered {sum(not_finite)} missing or non-finite log-probs in "
                f"rows {rows[:8]} of {len(scores)}. Look at the server's log; a server that lost its weights or "
                "overflows in its dtype answers like this."
            )
        return scores

    def _score_row(self, row: int, ids: list[int], prompt_len: int, top_k: int) -> TokenScores:
        if len(ids) == prompt_len:  # an empty completion: nothing to ask
            empty = torch.zeros(0)
            return TokenScores(empty, *((empty.long().view(0, top_k), empty.view(0, top_k)) if top_k else ()))
        body = {"model": self.name, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top_k}
        first = row % len(self.urls)  # rows go round the replicas; a retry goes to the next one
        answer = self._request("POST", self.urls[first:] + self.urls[:first], "/v1/completions", body)
        entries = answer["choices"][0].get("prompt_logprobs") or [] if answer.get("choices") else []
        if len(entries) != len(ids):
            raise TeacherError(
                f"teacher {self.branch!r} at {self.urls[first]} scored {len(entries)} of {len(ids)} tokens. Is this a vLLM "
                "server? Others ignore prompt_logprobs."
            )
        logps, top_ids, top_logps = [], [], []
        for token, entry in zip(ids[prompt_len:], entries[prompt_len:], strict=True):
            logps.append(_logprob(entry.get(str(token))))
            if top_k:
                best = sorted(entry.items(), key=lambda item: item[1]["rank"])[:top_k]
                top_ids.append([int(candidate) for candidate, _ in best])
                top_logps.append([_logprob(value) for _, value in best])
        return TokenScores(
            logps=torch.tensor(logps, dtype=torch.float32),
            top_ids=torch.tensor(top_ids) if top_k else None,
            top_logps=torch.tensor(top_logps, dtype=torch.float32) if top_k else None,
        )

    def _served_model(self, url: str) -> dict[str, Any]:
        answer = self._request("GET", [url], "/v1/models", None)
        try:
            model = answer["data"][0]
        except (KeyError, IndexError, TypeError):
            raise TeacherError(
                f"teacher {self.branch!r} at {url} does not say which model it serves: {str(answer)[:200]}. Is the URL "
                "that of a vLLM server, without a path?"
            ) from None
        return {"id": model["id"], "max_model_len": model.get("max_model_len") or math.inf}

    def _request(self, method: str, urls: Sequence[str], path: str, body: dict[str, Any] | None) -> Any:
        """One request. Connection errors, time-outs, 429 and 5xx are tried again, on the next URL; any other refusal is
        final."""
        turns = itertools.cycle(urls)
        giving_up = self._giving_up
        retrying = Retrying(
            retry=retry_if_exception(lambda error: _may_pass(error) and not giving_up.is_set()),
            stop=stop_after_attempt(max(ATTEMPTS, len(urls))),
            wait=wait_exponential_jitter(0.2, 10),
            reraise=True,
        )
        where = f"teacher {self.branch!r} at {', '.join(urls)}"
        try:
            return retrying(lambda: self._request_once(method, next(turns) + path, body))
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            hint = " Set CAMOPD_TEACHER_API_KEY to the server's --api-key." if status in (401, 403) else ""
            text = self._without_key(error.response.text[:500])
            raise TeacherError(f"{where} answered {status}: {text}{hint}") from None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise TeacherError(
                f"{where} does not answer ({type(error).__name__}: {self._without_key(str(error))}) after "
                f"{retrying.statistics['attempt_number']} attempts. Is `vllm serve` up on that host and port, and "
                "reachable from this machine?"
            ) from None

    def _request_once(self, method: str, url: str, body: dict[str, Any] | None) -> Any:
        response = self._client.request(
            method,
            url,
            content=None if body is None else orjson.dumps(body),
            headers={} if body is None else {"Content-Type": "application/json"},
        )
        response.raise_for_status()
        try:
            return orjson.loads(response.content)
        except orjson.JSONDecodeError:
            raise TeacherError(
                f"teacher {self.branch!r} at {url} did not answer in JSON: {self._without_key(response.text[:200])!r}. Is "
                "the URL that of a vLLM server, without a path?"
            ) from None

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _logprob(entry: dict[str, Any] | None) -> float:
    """A token's log-prob; NaN where the server left it out, for `score` to count."""
    return math.nan if entry is None or entry["logprob"] is None else entry["logprob"]


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)
