"""``SGLangEngine``: one stock SGLang server, attached by its address. Whoever started it, the calls are the same.

Log-probs are SGLang's: of the distribution after ``logit_bias``, penalties and ``min_new_tokens``, under the sampling
temperature (1 when greedy), before top-p, top-k and min-p. Without those first three they are the policy's own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from skyrl_train.engines.base import Completion, Engine, Request
from skyrl_train.engines.continuation import split
from skyrl_train.engines.faults import EngineLostError
from skyrl_train.engines.http import ServerClient
from skyrl_train.engines.sglang.control import Control
from skyrl_train.engines.sglang.facts import ServerFacts, probe
from skyrl_train.engines.sglang.messages import Answer, check, generate_body
from skyrl_train.errors import EngineError, EngineTimeoutError

log = logging.getLogger("skyrl.engines.sglang")

INTERVAL = 256
"""Tokens between two events of a stream."""
ASK_AGAIN = 0.5
"""Seconds after which an abort is repeated: a request that is just being tokenized does not hear the first one."""


@dataclass(slots=True, eq=False)
class Flight:
    """One sample on its way."""

    request: Request
    rid: str
    answer: Answer
    sent: bool = False
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    landed: asyncio.Event = field(default_factory=asyncio.Event)


class SGLangEngine(Control, Engine):
    """Samples from one server. Made by ``attach``; sleep, pause, adapters and versions are in ``Control``.

    Args:
        client: speaks to the server; closed with the engine.
        facts: what the server said of itself.
        request_timeout: seconds for one sample.
        control_timeout: seconds for any other call.
        stream: take the tokens as they come, so that those of a server that dies are not lost.
        on_close: called last by ``close``: ends a server that was started for this engine.
    """

    def __init__(
        self,
        client: ServerClient,
        facts: ServerFacts,
        *,
        request_timeout: float = 3600.0,
        control_timeout: float = 120.0,
        stream: bool = True,
        on_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(client, facts, control_timeout)
        self.capabilities = facts.capabilities()
        self.request_timeout, self.stream = request_timeout, stream
        self._on_close = on_close
        self._flights: dict[str, list[Flight]] = {}
        self._background: set[asyncio.Task[Any]] = set()

    @classmethod
    async def attach(cls, url: str, *, key: str | None = None, deadline: float = 30.0, **options: Any) -> SGLangEngine:
        """Attaches to a server that runs.

        Args:
            url: with or without ``http://``.
            key: the server's admin key, if it has one.
            deadline: seconds for each question asked.
            **options: of the constructor.

        Raises:
            EngineError: nobody answers there, or it is no SGLang server.
        """
        client = ServerClient(url, key=key)
        try:
            facts = await probe(client, deadline=deadline)
        except BaseException:
            await client.close()
            raise
        return cls(client, facts, **options)

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def in_flight(self) -> int:
        """Samples that have not come back."""
        return sum(map(len, self._flights.values()))

    @property
    def idle(self) -> bool:
        return not self._flights and not self._background

    async def generate(self, request: Request) -> list[Completion]:
        """See ``Engine.generate``.

        Raises:
            EngineRefusedError: the request is at fault.
            EngineLostError: the server is; carries what had been sampled, if ``n`` is 1.
            EngineTimeoutError: it took more than ``request_timeout``.
        """
        check(request, self.facts)
        self.check_awake()
        self.check_adapter(request.params.extra.get("lora_path", self.adapter))
        if request.id in self._flights:
            raise EngineError(f"{self.url}: a request with the id {request.id!r} is already in flight.")
        flights = [Flight(one, self._rid(one), self._answer()) for one in split(request)]
        self._flights[request.id] = flights
        try:
            return await _all(self._fly(flight) for flight in flights)
        except BaseException:
            self._later(self._abandon([f for f in flights if not f.landed.is_set()]))
            raise
        finally:
            del self._flights[request.id]

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        wanted = self._flights if request_ids is None else [i for i in request_ids if i in self._flights]
        flights = [flight for name in wanted for flight in self._flights[name]]
        for flight in flights:
            flight.aborted.set()
        waiting: list[Flight] = []
        try:
            async with asyncio.timeout(self.control_timeout):
                while waiting := [f for f in flights if f.sent and not f.landed.is_set()]:
                    await self._tell_abort(waiting, everything=request_ids is None)
                    if self.paused:
                        return  # they come back when generation goes on
                    await _wait(waiting, ASK_AGAIN)
        except EngineTimeoutError:
            raise
        except TimeoutError:
            raise EngineTimeoutError(
                f"{self.url}: {len(waiting)} aborted requests did not come back within {self.control_timeout:g} s."
            ) from None

    async def abort_sent(self) -> None:
        flights = [f for flights in self._flights.values() for f in flights if f.sent and not f.landed.is_set()]
        if flights:
            await self._tell_abort(flights, everything=True)
            await _wait(flights, ASK_AGAIN)

    async def commit_weights(self, version: int) -> None:
        """See ``Engine.commit_weights``: flushes the prefix cache, sets the label, and reads it back.

        Raises:
            EngineError: requests are in flight, or the server reports another version afterwards.
        """
        if self.in_flight and not self.paused:
            raise EngineError(f"{self.url}: weights cannot be committed while {self.in_flight} requests are in flight.")
        await self.flush()
        await self.set_version(version)

    async def close(self) -> None:
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.client.close()
        if self._on_close is not None:
            await self._on_close()

    # One sample.

    async def _fly(self, flight: Flight) -> Completion:
        if not await self._may_start(flight):
            return flight.answer.completion()
        interval = self._interval(flight.request) if self.stream else None
        body = generate_body(
            flight.request, flight.rid, self.facts, adapter=self.adapter, salt=self.salt, interval=interval
        )
        answer = flight.answer = self._answer()
        flight.sent = True
        try:
            if interval is None:
                answer.take(await self.client.generate("/generate", body, deadline=self.request_timeout))
                return answer.completion()
            async with aclosing(self.client.stream("/generate", body, deadline=self.request_timeout)) as events:
                async for event in events:
                    answer.take(event)
            if answer.reason is None:
                raise EngineLostError(f"{self.url}/generate: the answer ended before the completion did.")
            return answer.completion()
        except EngineLostError as error:
            if error.partial is None and interval is not None:  # of one answer at the end, nothing would be known
                error.partial = answer.completion()
            raise
        finally:
            self.answered_at = time.monotonic()
            flight.landed.set()

    async def _may_start(self, flight: Flight) -> bool:
        """Waits while generation is paused, so that nothing queues up at the server. False: aborted meanwhile."""
        while self.paused and not flight.aborted.is_set():
            waits = [asyncio.ensure_future(event.wait()) for event in (self.running, flight.aborted)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        if flight.aborted.is_set():
            flight.landed.set()
            return False
        return True

    def _interval(self, request: Request) -> int:
        """Without ``incremental_streaming_output`` each event repeats all before it, so there should be few."""
        return INTERVAL if self.facts.incremental else max(INTERVAL, request.params.max_new_tokens // 4)

    def _answer(self) -> Answer:
        return Answer(self.url, asked_at=self.committed, incremental=self.facts.incremental and self.stream)

    def _rid(self, request: Request) -> str:
        """The server aborts every request whose name begins with the one given: so none may begin another."""
        return f"{uuid4().hex}-{request.id}"

    # Aborts.

    async def _tell_abort(self, flights: Sequence[Flight], *, everything: bool) -> None:
        if everything:
            await self.client.post("/abort_request", {"abort_all": True}, deadline=self.control_timeout)
            return
        for flight in flights:
            await self.client.post("/abort_request", {"rid": flight.rid}, deadline=self.control_timeout)

    async def _abandon(self, flights: Sequence[Flight]) -> None:
        """Nobody waits for these any more; the server need not go on."""
        try:
            await self._tell_abort([f for f in flights if f.sent], everything=False)
        except EngineError as error:
            log.debug("aborting abandoned requests failed: %s", error)

    def _later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _all(works: Iterable[Awaitable[Completion]]) -> list[Completion]:
    """Every result in order; the first error cancels the rest, and is raised as it is."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _wait(flights: Sequence[Flight], seconds: float) -> None:
    """Until all have landed, or the time is up."""
    waits = [asyncio.ensure_future(flight.landed.wait()) for flight in flights]
    await asyncio.wait(waits, timeout=seconds)
    for wait in waits:
        wait.cancel()
