"""A teacher on one or more vLLM servers, asked over HTTP for the log-probs of the student's tokens.

Several URLs are replicas of one teacher. All requests run on an event loop in a thread of their own, so that `submit`
returns at once and the trainer goes on with the student while the servers score.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ...errors import TeacherError
from ...vllm import limits
from ...vllm.http import Client, Fault, base_url, teacher_role, together
from ...vllm.loop import LoopThread
from ...vllm.replicas import Replica, Replicas
from ..address import is_server, urls_and_model
from ..base import TokenScores
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


logger = logging.getLogger(__name__)


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
        role = teacher_role(branch)
        self.branch = branch
        self.urls = [base_url(url, role) for url in urls]
        self.transports = dict.fromkeys(self.urls, "JSON")  # of each URL, or "compact" once it is known to speak it
        self._client = Client(role)
        self.replicas = Replicas(
            self.urls, self._client, patience, limits.REQUESTS_PER_REPLICA, self._choose_transport
        )
        self._loop = LoopThread(f"teacher-{branch}")
        try:
            self._loop.wait(self.replicas.connect(model))
        except BaseException:
            self.close()
            raise
        self.name, self.model_path, _, others = self.replicas.model
        if others and model is None:
            shown = self._client.without_key(", ".join(others))
            logger.warning(
                "teacher %r at %s is %s, the first of several models there: %s. Name the one that is to teach: "
                "{urls: ..., model: ...}.", branch, self.replicas.where, self.name, shown,
            )  # fmt: skip
        self.max_model_len = self.replicas.max_model_len

    def close(self) -> None:
        """Drop all connections and end the thread. What is still being scored fails."""
        self._loop.close(self._client.close)

    @property
    def has_key(self) -> bool:
        """Whether requests carry an API key."""
        return bool(self._client.key)

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST one small question to every replica: the answer of each URL. Raises `TeacherError`."""
        body = {"model": self.name, **body}
        answers = self._loop.wait(together(self._client.ask(url, path, body) for url in self.urls))
        return dict(zip(self.urls, answers, strict=True))

    def check_context(self, max_tokens: int) -> None:
        """Raise `TeacherError` unless a sequence of `max_tokens` tokens, plus the one vLLM generates, fits."""
        if self.max_model_len < max_tokens + 1:
            raise TeacherError(
                f"teacher {self.branch!r} at {self.replicas.where} takes sequences of {self.max_model_len} tokens, but "
                f"max_prompt_length + max_completion_length + 1 is {max_tokens + 1}. Start it with --max-model-len "
                f"{max_tokens + 1} (`camopd serve` with the lengths of the run), or lower max_completion_length."
            )

    def score(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int = 0) -> list[TokenScores]:
        """See [`Teacher.score`]. Raises `TeacherError` with the row numbers when log-probs are missing or not finite."""
        return self.submit(token_ids, prompt_lens, top_k).result()

    def submit(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int = 0) -> Future[list[TokenScores]]:
        """Begin to score and return at once; the result, or what `score` raises, comes with the future."""
        return self._loop.submit(self._score(token_ids, prompt_lens, top_k))

    async def _score(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int) -> list[TokenScores]:
        self.replicas.wait_anew()
        rows = [Row(index, *sequence) for index, sequence in enumerate(zip(token_ids, prompt_lens, strict=True))]
        scores = [no_scores(top_k)] * len(rows)  # of an empty completion: nothing to ask
        compact = not top_k and "compact" in self.transports.values()
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
        work = f"score {len(rows)} sequences of {tokens} tokens"
        return await self.replicas.ask(tokens, lambda replica: self._ask_replica(replica, rows, top_k), work)

    async def _choose_transport(self, replica: Replica) -> None:
        """Score one token the compact way; whoever cannot do that gets JSON. It may be started again with other flags."""
        probe = compact_request(self.replicas.model.name, Row(0, [0, 1], 1))
        try:
            probe.read(await self._client.request(replica.url, probe.path, probe.body, 30.0))
            transport = "compact"
        except (Fault, TeacherError, UnusableAnswer, AttributeError):
            transport = "JSON"  # 403 without the flag, 404 in old versions, 400 on runner V1
        self.transports[replica.url] = transport
        served = self.replicas.model.name
        logger.info("teacher %r: %s serves %r, transport %s", self.branch, replica.url, served, transport)

    async def _ask_replica(self, replica: Replica, rows: list[Row], top_k: int) -> list[TokenScores]:
        if self.transports[replica.url] == "compact" and not top_k and len(rows) == 1:
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
