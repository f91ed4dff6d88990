"""``EnginePool``: several engines as one.

    session known?  -> its engine, whose cache holds the conversation        each engine: at most ``max_in_flight``
    else            -> the engine with the least to do                       requests, the others wait in its queue

An engine that fails is put in quarantine: nothing is sent to it until ``readmit`` says that it has proven the pool's
weight version. What it was sampling goes on elsewhere, with the tokens it had and the budget that is left. A request of
which nobody knows what was sampled is never sent again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace

from skyrl_train.engines.base import Capabilities, Completion, Engine, Request
from skyrl_train.engines.continuation import can_continue, join, rest_of, split
from skyrl_train.engines.faults import EngineLostError
from skyrl_train.errors import EngineError

log = logging.getLogger("skyrl.engines.pool")

LOSSES = 2
"""Engines that one request may lose. It may be what ends them, and then no further one should get it."""


@dataclass(slots=True, eq=False)
class Seat:
    """One engine of the pool."""

    name: str
    engine: Engine
    cause: str | None = None
    """Why it is in quarantine; None: it serves."""
    discard: bool = False
    """What it had sampled when it was put there cannot be used."""
    busy: int = 0
    queue: deque[asyncio.Future[bool]] = field(default_factory=deque)

    @property
    def load(self) -> int:
        return self.busy + len(self.queue)


class EnginePool(Engine):
    """Spreads requests over engines of one kind.

    Args:
        engines: by name, such as their addresses.
        max_in_flight: requests at one engine at the same time; None: as many as come.
        patience: seconds that a request waits for an engine to come back when all are in quarantine.
        abort_timeout: seconds that a quarantined engine has to hand back what it was sampling.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        max_in_flight: int | None = None,
        patience: float = 0.0,
        abort_timeout: float = 10.0,
    ) -> None:
        if not engines:
            raise ValueError("a pool needs an engine")
        self._seats = [Seat(name, engine) for name, engine in engines.items()]
        self.max_in_flight, self.patience, self.abort_timeout = max_in_flight, patience, abort_timeout
        self.capabilities = _common([engine.capabilities for engine in engines.values()])
        self.version: int | None = None
        """What every serving engine has proven; None before the first commit."""
        self._sessions: dict[str, Seat] = {}
        self._aborted: set[str] = set()
        self._active: dict[str, Request] = {}
        self._returned = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    def engines(self) -> dict[str, Engine]:
        """The engines that serve, by name."""
        return {seat.name: seat.engine for seat in self._serving()}

    def seat(self, name: str) -> Engine:
        """The engine of that name, in quarantine or not."""
        return self._find(name).engine

    def quarantined(self) -> dict[str, str]:
        """Those that do not, and why."""
        return {seat.name: seat.cause for seat in self._seats if seat.cause is not None}

    def quarantine(self, name: str, cause: str, *, discard: bool = False) -> None:
        """Takes an engine out. Its waiting requests go elsewhere at once, those in flight as soon as they come back.

        Args:
            discard: do not use what it has in flight: its weights are not what they should be.
        """
        seat = self._find(name)
        if seat.cause is not None:
            return
        seat.cause, seat.discard = cause, discard
        log.error("engine %s is in quarantine: %s", name, cause)
        self._returned.clear()
        self._send_away(seat)
        self._sessions = {session: s for session, s in self._sessions.items() if s is not seat}
        task = asyncio.get_running_loop().create_task(self._call_back(seat))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def readmit(self, name: str, version: int, engine: Engine | None = None) -> None:
        """Lets an engine serve again, or the one that was started in its place.

        Raises:
            EngineError: it has not proven the pool's version.
        """
        if version != self.version and self.version is not None:
            raise EngineError(f"engine {name}: it has proven weight version {version}, the pool is at {self.version}.")
        seat = self._find(name)
        was_out = seat.cause is not None
        seat.engine, seat.cause, seat.discard = engine or seat.engine, None, False
        self._returned.set()
        if was_out:
            log.warning("engine %s serves again, at weight version %s", name, version)

    async def generate(self, request: Request) -> list[Completion]:
        """See ``Engine.generate``. Failing over is the pool's affair, and no error.

        Raises:
            EngineRefusedError: the request is at fault.
            EngineError: no engine serves, or the one that had it is lost with what it sampled.
        """
        if request.id in self._active:
            raise EngineError(f"engine pool: a request with the id {request.id!r} is already in flight.")
        self._active[request.id] = request
        tasks = [asyncio.ensure_future(self._complete(one, request.id)) for one in split(request)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            del self._active[request.id]
            self._aborted.discard(request.id)

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        wanted = [i for i in (self._active if request_ids is None else request_ids) if i in self._active]
        self._aborted.update(wanted)
        for seat in self._seats:
            self._send_away(seat)
        self._returned.set()
        names = [one.id for i in wanted for one in split(self._active[i])]
        await self._on_all([seat.engine.abort(names) for seat in self._serving()])
        if not self._serving():
            self._returned.clear()

    async def commit_weights(self, version: int) -> None:
        """Every serving engine commits. Those that fail are quarantined.

        Raises:
            EngineError: requests are in flight, or no engine is left.
        """
        seats = self._serving()
        if running := sum(seat.busy for seat in seats if seat.engine.paused is None):
            raise EngineError(f"engine pool: weights cannot be committed while {running} requests are in flight.")
        self.version = version
        results = await asyncio.gather(*(s.engine.commit_weights(version) for s in seats), return_exceptions=True)
        for seat, result in zip(seats, results, strict=True):
            if isinstance(result, EngineError):
                self.quarantine(seat.name, f"did not commit weight version {version}: {result}")
            elif isinstance(result, BaseException):
                raise result
        if not self._serving():
            raise EngineError(self._nobody())

    async def open_sessions(self, sessions: Sequence[str]) -> None:
        await self._on_all([seat.engine.open_sessions(sessions) for seat in self._serving()])

    async def close_sessions(self, sessions: Sequence[str]) -> None:
        for session in sessions:
            self._sessions.pop(session, None)
        await self._on_all([seat.engine.close_sessions(sessions) for seat in self._serving()])

    async def close(self) -> None:
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._on_all([seat.engine.close() for seat in self._seats])

    # One sample, from engine to engine.

    async def _complete(self, request: Request, asked: str) -> Completion:
        parts: list[Completion] = []
        rest: Request | None = request
        losses = 0
        while rest is not None:
            seat = await self._sit(rest, asked)
            if seat is None:
                return join([*parts, Completion(stop_reason="abort", weight_version=self.version or 0)])
            try:
                part = await self._ask(seat, rest)
            except EngineLostError as error:
                losses += 1
                if error.partial is None or losses == LOSSES:
                    raise
                part = replace(error.partial, stop_reason="abort")
            finally:
                self._stand_up(seat)
            if part is None:
                continue
            if part.stop_reason != "abort" or asked in self._aborted:
                return join([*parts, part])
            if not can_continue(rest):  # it begins anew
                continue
            parts.append(part)
            rest = rest_of(rest, part)
            await asyncio.sleep(0)  # an engine that aborts at once must not keep the others from running
        return replace(join(parts), stop_reason="length")

    async def _ask(self, seat: Seat, request: Request) -> Completion | None:
        """What the engine sampled; None: nothing of it can be used, and it may be asked of another."""
        version = self.version
        try:
            (part,) = await seat.engine.generate(request)
        except EngineLostError as error:
            self.quarantine(seat.name, str(error))
            if seat.discard or _is_older(error.partial, version):
                return None
            raise
        if seat.cause is not None and seat.discard:
            return None
        if _is_older(part, version):
            self.quarantine(
                seat.name,
                f"it sampled with weight version {part.weight_version} after {version} was committed "
                "(restarted with old weights?)",
            )
            return None
        return part

    async def _sit(self, request: Request, asked: str) -> Seat | None:
        """Waits for a free place at the right engine. None: the request was aborted meanwhile."""
        while asked not in self._aborted:
            seat = self._sessions.get(request.session or "") or await self._least_loaded(asked)
            if seat is None:
                continue
            if request.session is not None:
                self._sessions[request.session] = seat
            if self.max_in_flight is None or seat.busy < self.max_in_flight:
                seat.busy += 1
                return seat
            if await self._queue(seat):
                if seat.cause is None and asked not in self._aborted:
                    return seat
                self._stand_up(seat)
        return None

    async def _queue(self, seat: Seat) -> bool:
        """Waits until somebody hands over a place, or (False) sends everyone away."""
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        seat.queue.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            with suppress(ValueError):
                seat.queue.remove(waiter)
            if waiter.done() and not waiter.cancelled() and waiter.result():
                self._stand_up(seat)
            raise

    def _stand_up(self, seat: Seat) -> None:
        """Hands the place to the first who waits."""
        while seat.queue:
            waiter = seat.queue.popleft()
            if not waiter.done():
                waiter.set_result(True)
                return
        seat.busy -= 1

    def _send_away(self, seat: Seat) -> None:
        """Those who wait here look again where they belong."""
        for waiter in seat.queue:
            if not waiter.done():
                waiter.set_result(False)
        seat.queue.clear()

    async def _least_loaded(self, asked: str) -> Seat | None:
        if serving := self._serving():
            return min(serving, key=lambda seat: seat.load)
        if self.patience <= 0:
            raise EngineError(self._nobody())
        try:
            async with asyncio.timeout(self.patience):
                await self._returned.wait()
        except TimeoutError:
            raise EngineError(f"{self._nobody()} None came back within {self.patience:g} s.") from None
        return None

    async def _call_back(self, seat: Seat) -> None:
        """Asks a quarantined engine for what it was sampling. If it cannot answer, its calls fail by themselves."""
        try:
            async with asyncio.timeout(self.abort_timeout):
                await seat.engine.abort(None)
        except (EngineError, TimeoutError) as error:
            log.info("engine %s, in quarantine, did not abort its requests: %s", seat.name, error)

    async def _on_all(self, calls: Sequence[Awaitable[None]]) -> None:
        """All at once; the first error is raised when each has come to its end."""
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    def _serving(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.cause is None]

    def _find(self, name: str) -> Seat:
        for seat in self._seats:
            if seat.name == name:
                return seat
        raise EngineError(f"engine pool: there is no engine {name!r}.")

    def _nobody(self) -> str:
        causes = "; ".join(f"{name}: {cause}" for name, cause in self.quarantined().items())
        return f"no engine serves. {causes}"


def _is_older(part: Completion | None, version: int | None) -> bool:
    """Whether tokens were sampled with weights from before ``version``, which the engine had proven."""
    return version is not None and part is not None and bool(part.token_ids) and part.weight_version < version


def _common(all_of_them: Sequence[Capabilities]) -> Capabilities:
    """What every engine can do."""
    first, *others = all_of_them
    for other in others:
        flags = [f.name for f in fields(Capabilities) if f.name not in ("name", "sampling")]
        both = {name: getattr(first, name) and getattr(other, name) for name in flags}
        first = replace(first, sampling=first.sampling & other.sampling, **both)
    return first
