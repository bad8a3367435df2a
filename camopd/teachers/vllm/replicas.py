"""The servers of one teacher: what they serve, which of them are well, and which gets the next request."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ...errors import TeacherError
from .. import limits
from ..address import same_model
from .http import Client, Fault, dice, together
from .transports import Row, UnusableAnswer, compact_request


logger = logging.getLogger(__name__)


@dataclass
class Replica:
    """One server. It is chosen by `tokens_in_flight`, the tokens this process waits for there."""

    url: str
    compact: bool = False
    alive: bool = True
    requests_in_flight: int = 0
    tokens_in_flight: int = 0
    recovery: asyncio.Task[None] | None = (
        None  # waits until it is well again; the loop itself holds only a weak reference
    )

    @property
    def transport(self) -> str:
        return "compact" if self.compact else "JSON"


class Replicas:
    """All replicas of a teacher. `model` is what they serve, known after `connect`."""

    def __init__(self, urls: Sequence[str], client: Client, patience: float):
        self.all = [Replica(url) for url in urls]
        self.where = ", ".join(urls)
        self._client = client
        self._patience = patience
        self._changed = asyncio.Condition()  # a place has become free, a replica has come or gone
        self._outage: asyncio.Task[None] | None = None  # counts the time without any replica
        self._outage_over = ""  # why nobody waits any longer
        self._last_fault = ""

    async def connect(self, expected: str | None) -> None:
        """Reach every replica, learn what it serves, and see which transport it speaks.

        Raises `TeacherError` when one does not answer, or serves another model than the others or than is `expected`.
        """
        branch = self._client.branch
        served = await together(self._client.served_model(replica.url) for replica in self.all)
        if len({model.name for model in served}) > 1:
            listing = ", ".join(
                f"{replica.url} serves {model.name!r}" for replica, model in zip(self.all, served, strict=True)
            )
            raise TeacherError(
                f"the replicas of teacher {branch!r} serve different models: {listing}. A branch has one teacher; "
                "start every replica with the same model and --served-model-name."
            )
        self.model = served[0]
        if expected is not None and not any(same_model(expected, name) for name in self.model[:2]):
            raise TeacherError(
                f"teacher {branch!r} at {self.where} serves {self._client.without_key(self.model.name)!r}, and the "
                f"config wants {expected!r}. Start the right model there, or fix the URL or the config."
            )
        self.max_model_len = min(model.max_model_len or math.inf for model in served)
        await together(self._choose_transport(replica) for replica in self.all)
        for replica in self.all:
            logger.info(
                "teacher %r: %s serves %r, transport %s", branch, replica.url, self.model.name, replica.transport
            )

    @asynccontextmanager
    async def lease(self, tokens: int, avoid: Replica | None) -> AsyncIterator[Replica]:
        """A living replica with a free place, and rather not the one to `avoid`; waits until there is one.

        A `Fault` inside takes the replica out. Raises `TeacherError` when all have been gone for too long.
        """
        replica = await self._free_replica(tokens, avoid)
        try:
            yield replica
        except Fault as fault:
            if fault.takes_out:
                self._take_out(replica, str(fault))
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
                free = [replica for replica in others if replica.requests_in_flight < limits.REQUESTS_PER_REPLICA]
                if free:
                    # Where they are equally busy any of them will do; ranks that all took the first would flood it.
                    replica = min(free, key=lambda replica: (replica.tokens_in_flight, dice.random()))
                    replica.requests_in_flight += 1
                    replica.tokens_in_flight += tokens
                    return replica
                if self._outage_over:
                    raise TeacherError(self._outage_over)
                await self._changed.wait()

    def _take_out(self, replica: Replica, why: str) -> None:
        self._last_fault = why
        if not replica.alive:
            return
        logger.warning("teacher %r: replica %s is out: %s", self._client.branch, replica.url, why)
        replica.alive = False
        replica.recovery = asyncio.create_task(self._let_in_when_well(replica))
        if not any(replica.alive for replica in self.all):
            self._begin_outage()

    def _begin_outage(self) -> None:
        self._outage_over = ""
        self._outage = asyncio.create_task(self._wait_for_any())

    async def _let_in_when_well(self, replica: Replica) -> None:
        """Let a replica in again when it is healthy and still serves this teacher's model."""
        started = time.monotonic()
        while True:
            try:
                await self._client.request(replica.url, "/health", None, limits.ANSWER_SECONDS, parse=False)
                model = await self._client.served_model(replica.url, attempts=1)
                if model.name == self.model.name:
                    break
                self._last_fault = f"{replica.url} serves {self._client.without_key(model.name)!r} now"
            except (Fault, TeacherError):
                pass
            await asyncio.sleep(limits.HEALTH_SECONDS)
        await self._choose_transport(replica)  # it may have been started again with other flags
        async with self._changed:
            replica.alive = True
            self._outage_over = ""
            if self._outage is not None:
                self._outage.cancel()
            self._changed.notify_all()
        seconds = time.monotonic() - started
        logger.warning("teacher %r: replica %s is back after %.0f s", self._client.branch, replica.url, seconds)

    async def _wait_for_any(self) -> None:
        """Say that every replica is gone, and end the wait of all requests when `patience` is over."""
        branch, started, said = self._client.branch, time.monotonic(), 0
        while (waited := time.monotonic() - started) < self._patience:
            # The first second is quiet: most are a hiccup.
            if waited > limits.HEALTH_SECONDS + said * limits.REMINDER_SECONDS:
                said += 1
                logger.warning(
                    "teacher %r: no replica answers (%s). Waiting for one, %.0f of %.0f seconds so far; the last fault: %s",
                    branch, self.where, waited, self._patience, self._last_fault,
                )  # fmt: skip
            await asyncio.sleep(min(limits.HEALTH_SECONDS, self._patience - waited))
        async with self._changed:
            self._outage_over = (
                f"teacher {branch!r} has no replica left: {self.where} did not come back in teacher_timeout="
                f"{self._patience:g} seconds; the last fault: {self._last_fault}. Start the server again, then resume."
            )
            self._changed.notify_all()

    async def _choose_transport(self, replica: Replica) -> None:
        """Score one token the compact way; whoever cannot do that gets JSON."""
        probe = compact_request(self.model.name, Row(0, [0, 1], 1))
        try:
            probe.read(await self._client.request(replica.url, probe.path, probe.body, 30.0))
            replica.compact = True
        except (Fault, TeacherError, UnusableAnswer, AttributeError):
            replica.compact = False  # 403 without the flag, 404 in old versions, 400 on runner V1
