"""Servers of one model: what they serve, which of them are well, and which gets the next request."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import CaMOPDError
from ..teachers.address import same_model
from . import limits
from .http import Client, Fault, dice, pause, together


T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass
class Replica:
    """One server. It is chosen by `tokens_in_flight`, the tokens this process waits for there."""

    url: str
    alive: bool = True
    outages: int = 0  # how often it was taken out
    requests_in_flight: int = 0
    tokens_in_flight: int = 0
    recovery: asyncio.Task[None] | None = (
        None  # waits until it is well again; the loop itself holds only a weak reference
    )


class Replicas:
    """All servers of a model. `model` is what they serve, known after `connect`."""

    def __init__(
        self,
        urls: Sequence[str],
        client: Client,
        patience: float,
        places: int,
        make_ready: Callable[[Replica], Coroutine[Any, Any, None]],
    ):
        """
        Args:
            urls: of the servers.
            client: what reaches them.
            patience: seconds to wait when all of them are gone.
            places: requests in flight at once to each of them.
            make_ready: awaited for a server before it gets its first request, and when it is well again before the next: it
                may have been started anew. A `Fault` of it keeps the server out.
        """
        self.all = [Replica(url) for url in urls]
        self.where = ", ".join(urls)
        self._client = client
        self._patience = patience
        self._places = places
        self._make_ready = make_ready
        self._changed = asyncio.Condition()  # a place has become free, a replica has come or gone
        self._outage: asyncio.Task[None] | None = None  # counts the time without any replica
        self._outage_over = ""  # why nobody waits any longer
        self._last_fault = ""

    async def connect(self, expected: str | None) -> None:
        """Reach every replica, learn what it serves, and make it ready.

        Raises the error of the role when one does not answer, or serves another model than the others or than `expected`.
        """
        role = self._client.role
        served = await together(self._client.served_model(replica.url, expected=expected) for replica in self.all)
        if len({model.name for model in served}) > 1:
            listing = ", ".join(
                f"{replica.url} serves {model.name!r}" for replica, model in zip(self.all, served, strict=True)
            )
            raise role.error(
                f"the replicas of {role.name} serve different models: {listing}. Start every replica with the same model "
                "and --served-model-name."
            )
        self.model = served[0]
        if expected is not None and not any(same_model(expected, name) for name in self.model[:2]):
            served_names = ", ".join(map(repr, (self.model.name, *self.model.others)))
            raise role.error(
                f"{role.name} at {self.where} serves {self._client.without_key(served_names)}, and the "
                f"config wants {expected!r}. Start the right model there, or fix the URL or the config."
            )
        self.max_model_len = min(model.max_model_len or math.inf for model in served)
        await together(self._make_ready(replica) for replica in self.all)

    async def ask(self, tokens: int, ask: Callable[[Replica], Awaitable[T]], work: str) -> tuple[str, T]:
        """What one of the replicas answers, and its URL; after each fault, another one is asked.

        Args:
            tokens: that are waited for.
            ask: a replica. Raises `Fault` for what may pass; what a stranger's answer makes it raise is told as such.
            work: for messages, as "score 3 sequences of 90 tokens".

        Raises the error of the role for what is final, and after too many faults.
        """
        tried: Replica | None = None
        first_fault, faults, role = math.inf, 0, self._client.role
        for attempt in itertools.count(1):
            try:
                async with self.lease(tokens, avoid=tried) as tried:
                    return tried.url, await ask(tried)
            except Fault as fault:
                first_fault = min(first_fault, time.monotonic())
                faults += fault.takes_out  # one that is busy (429) is only waited for
                if faults >= limits.ATTEMPTS or time.monotonic() - first_fault > self._patience:
                    raise role.error(
                        f"{role.name} could not {work} in {attempt} attempts; the last: {fault}. Look at that server's log."
                    ) from None
            except (CaMOPDError, asyncio.CancelledError):
                raise
            except Exception as error:  # whatever a stranger may answer must reach the trainer as one kind of error
                where, what = tried.url if tried else self.where, f"{type(error).__name__}: {error}"[:500]
                raise role.error(
                    f"{role.name} at {where} answered what cannot be read ({self._client.without_key(what)}). Is this a "
                    "vLLM server?"
                ) from None
            await pause(attempt, limits.SCORE_PAUSE)
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def lease(self, tokens: int, avoid: Replica | None) -> AsyncIterator[Replica]:
        """A living replica with a free place, and rather not the one to `avoid`; waits until there is one.

        A `Fault` inside takes the replica out. Raises the error of the role when all have been gone for too long.
        """
        replica = await self._free_replica(tokens, avoid)
        try:
            yield replica
        except Fault as fault:
            if fault.takes_out:
                await self.take_out(replica, str(fault))
            raise
        finally:
            async with self._changed:
                replica.requests_in_flight -= 1
                replica.tokens_in_flight -= tokens
                self._changed.notify()

    def wait_anew(self) -> None:
        """For a new batch: wait again where the last one has given up."""
        if self._outage_over:
            self._begin_outage()

    async def _free_replica(self, tokens: int, avoid: Replica | None) -> Replica:
        """The one with the fewest tokens in flight."""
        async with self._changed:
            while True:
                alive = [replica for replica in self.all if replica.alive]
                # Wait for a busy one that works rather than go back to an idle one that does not.
                others = [replica for replica in alive if replica is not avoid] or alive
                free = [replica for replica in others if replica.requests_in_flight < self._places]
                if free:
                    # Where they are equally busy any of them will do; ranks that all took the first would flood it.
                    replica = min(free, key=lambda replica: (replica.tokens_in_flight, dice.random()))
                    replica.requests_in_flight += 1
                    replica.tokens_in_flight += tokens
                    return replica
                if self._outage_over:
                    raise self._client.role.error(self._outage_over)
                await self._changed.wait()

    async def take_out(self, replica: Replica, why: str) -> None:
        """Give a replica no more requests until it is well again."""
        self._last_fault = why
        if not replica.alive:
            return
        logger.warning("%s: replica %s is out: %s", self._client.role.name, replica.url, why)
        replica.alive = False
        replica.outages += 1
        replica.recovery = asyncio.create_task(self._let_in_when_well(replica))
        if not any(replica.alive for replica in self.all):
            self._begin_outage()

    def _begin_outage(self) -> None:
        self._outage_over = ""
        self._outage = asyncio.create_task(self._wait_for_any())

    async def _let_in_when_well(self, replica: Replica) -> None:
        """Let a replica in again when it is healthy and still serves the same model."""
        started = time.monotonic()
        while True:
            try:
                await self._client.request(replica.url, "/health", None, limits.ANSWER_SECONDS, parse=False)
                model = await self._client.served_model(replica.url, attempts=1, expected=self.model.name)
                if model.name == self.model.name and await self._is_ready(replica):
                    break
                if model.name != self.model.name:
                    self._last_fault = f"{replica.url} serves {self._client.without_key(model.name)!r} now"
            except (Fault, CaMOPDError):
                pass
            await asyncio.sleep(limits.HEALTH_SECONDS)
        async with self._changed:
            replica.alive = True
            self._outage_over = ""
            if self._outage is not None:
                self._outage.cancel()
            self._changed.notify_all()
        seconds = time.monotonic() - started
        logger.warning("%s: replica %s is back after %.0f s", self._client.role.name, replica.url, seconds)

    async def _is_ready(self, replica: Replica) -> bool:
        try:
            await self._make_ready(replica)
        except (Fault, CaMOPDError) as fault:
            self._last_fault = str(fault)
            return False
        return True

    async def _wait_for_any(self) -> None:
        """Say that every replica is gone, and end the wait of all requests when `patience` is over."""
        role, started, said = self._client.role, time.monotonic(), 0
        while (waited := time.monotonic() - started) < self._patience:
            # The first second is quiet: most are a hiccup.
            if waited > limits.HEALTH_SECONDS + said * limits.REMINDER_SECONDS:
                said += 1
                logger.warning(
                    "%s: no replica answers (%s). Waiting for one, %.0f of %.0f seconds so far; the last fault: %s",
                    role.name, self.where, waited, self._patience, self._last_fault,
                )  # fmt: skip
            await asyncio.sleep(min(limits.HEALTH_SECONDS, self._patience - waited))
        async with self._changed:
            self._outage_over = (
                f"{role.name} has no replica left: {self.where} did not come back in teacher_timeout="
                f"{self._patience:g} seconds; the last fault: {self._last_fault}. Start the server again, then resume."
            )
            self._changed.notify_all()
