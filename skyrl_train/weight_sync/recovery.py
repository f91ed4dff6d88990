"""``Recovery``: watches engines, and brings those in quarantine back: started anew, synced, proven, and only then used.

Between two engines that fail nothing waits: the pool goes on with the others. When none is left, requests and syncs
wait for one that comes back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from skyrl_train.engines.pool import EnginePool
from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.engines.sglang.sources import Source
from skyrl_train.errors import EngineError, WeightSyncError
from skyrl_train.weight_sync.base import WeightSync
from skyrl_train.weight_sync.engine_sync import EngineSync
from skyrl_train.weight_sync.proof import ProofFailed

log = logging.getLogger("skyrl.engines")

LOOK = 0.5
"""Seconds between two looks at our processes and at the quarantine."""


class Recovery(WeightSync):
    """A weight sync that does not give up while an engine may still come back. Watches from ``start`` to ``close``.

    Args:
        sources: how each engine of the pool can be had again.
        attempts: how often each engine is brought back; 0: never.
        health_interval: seconds between two questions whether an engine still computes; 0: none.
        health_timeout: seconds that it has to answer.
        share_memory: engines use the learner's GPU, so none is started while the learner learns.
    """

    def __init__(
        self,
        pool: EnginePool,
        sync: EngineSync,
        sources: Sequence[Source],
        *,
        attempts: int = 3,
        health_interval: float = 10.0,
        health_timeout: float = 30.0,
        share_memory: bool = False,
    ) -> None:
        self.pool, self.inner, self.sources = pool, sync, {source.name: source for source in sources}
        self.attempts, self.share_memory = attempts, share_memory
        self.health_interval, self.health_timeout = health_interval, health_timeout
        self.used: Counter[str] = Counter()
        """How often each engine was brought back."""
        self.returned: Counter[str] = Counter()
        self._repairs: dict[str, asyncio.Task[None]] = {}
        self._starting: set[str] = set()
        """Engines whose repair is past its gate."""
        self._ended: set[str] = set()
        """Engines that are given up."""
        self._fatal: ProofFailed | None = None
        """What a repair found that is to stop the run."""
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to watch."""
        self._tasks = [asyncio.create_task(self._watch())]
        if self.health_interval > 0:
            self._tasks.append(asyncio.create_task(self._ask_after_health()))

    async def close(self) -> None:
        """Ends the watch, the repairs that are under way, and the syncs' links."""
        tasks = [*self._tasks, *self._repairs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.inner.close()

    async def sync(self, version: int) -> dict[str, float]:
        """See ``EngineSync.sync``; where that ends without an engine, waits for one and tries again.

        Raises:
            WeightSyncError: none can come back any more.
        """
        while True:
            self._raise_fatal()
            try:
                return await self.inner.sync(version) | self.metrics()
            except ProofFailed:
                raise
            except WeightSyncError as error:
                log.error("%s", error)
                await self.inner.make_way()
                while not self.inner.standing_by or (self.share_memory and self._starting):
                    if self.hopeless():
                        raise
                    await asyncio.sleep(LOOK)

    async def wake(self, version: int) -> None:
        self._raise_fatal()
        await self.inner.wake(version)

    @property
    def wanted(self) -> bool:
        return self.inner.wanted

    async def enter_training(self) -> None:
        """See ``EngineSync.enter_training``. Servers that share the learner's memory have started by then, or ended."""
        self._raise_fatal()
        if self.share_memory:
            self.inner.ready.clear()
            if starting := [self._repairs[name] for name in self._starting]:
                log.info("%d engine(s) on the learner's GPUs are being started; training waits for that", len(starting))
                await asyncio.wait(starting)
            out = self.pool.quarantined().keys() - self.inner.standing_by.keys()
            await asyncio.gather(*map(self._end, out))
        await self.inner.enter_training()

    def _raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    def hopeless(self) -> bool:
        """Whether no engine serves, stands by, or can come back."""
        coming = any(not task.done() for task in self._repairs.values())
        left = any(self._may_return(name) for name in self.pool.quarantined())
        return not (self.pool.engines() or self.inner.standing_by or self.inner.taking_part or coming or left)

    def metrics(self) -> dict[str, float]:
        """Counts since the start of the run."""
        return {"engines/restarts": float(self.used.total()), "engines/returned": float(self.returned.total())}

    async def _watch(self) -> None:
        while True:
            for name, source in self.sources.items():
                if name in self.pool.engines() and (cause := source.died()):
                    self.pool.quarantine(name, cause)
            for name in self.pool.quarantined():
                task = self._repairs.get(name)
                waits = name in self.inner.standing_by or name in self.inner.taking_part
                if waits or not (task is None or task.done()):
                    continue
                if self._may_return(name):
                    self._repairs[name] = asyncio.create_task(self._repair(name))
                elif name not in self._ended:
                    self._ended.add(name)
                    self._repairs[name] = asyncio.create_task(self._give_up(name))
            await asyncio.sleep(LOOK)

    def _may_return(self, name: str) -> bool:
        return self.used[name] < self.attempts

    async def _repair(self, name: str) -> None:
        source = self.sources[name]
        cause = source.died()
        log.error("engine %s is out: %s", name, cause or self.pool.quarantined().get(name))
        if self.share_memory:
            await self.inner.ready.wait()
        self._starting.add(name)
        try:
            await self._bring_back(name, source)
        finally:
            self._starting.discard(name)

    async def _bring_back(self, name: str, source: Source) -> None:
        self.used[name] += 1
        attempt = f"attempt {self.used[name]} of {self.attempts}"
        log.warning("engine %s is %s (%s)", name, "started anew" if source.launched else "attached anew", attempt)
        engine: SGLangEngine | None = None
        try:
            await self._forget(name)
            engine = await source.start()
            if await self.inner.bring_up(name, engine):
                self.returned[name] += 1
            else:
                log.info("engine %s stands by for the next weight sync", name)
        except (EngineError, WeightSyncError) as error:
            log.error("engine %s did not come back (%s): %s", name, attempt, error)
            if engine is not None:
                await engine.client.close(final=True)
            if isinstance(error, ProofFailed) and self.inner.settings.on_proof_failure == "stop":
                self._fatal = error

    async def _give_up(self, name: str) -> None:
        log.error(
            "engine %s is given up: generator.engine_restarts=%d are used up. %s", name, self.attempts,
            self.pool.quarantined().get(name, ""),
        )  # fmt: skip
        await self._end(name)

    async def _end(self, name: str) -> None:
        """What it has in flight fails at once, and its server, if it is ours, gives its memory back."""
        await self._forget(name)
        await self.sources[name].stop()

    async def _forget(self, name: str) -> None:
        """Ends what is left of the engine's old self on this side."""
        engine = self.pool.seat(name)
        if isinstance(engine, SGLangEngine):
            with suppress(EngineError):
                await engine.client.close(final=True)

    async def _ask_after_health(self) -> None:
        while True:
            await asyncio.sleep(self.health_interval)
            engines = [(n, e) for n, e in self.pool.engines().items() if isinstance(e, SGLangEngine)]
            await asyncio.gather(*(self._ask(name, engine) for name, engine in engines))

    async def _ask(self, name: str, engine: SGLangEngine) -> None:
        if engine.paused or engine.asleep:
            return
        try:
            await engine.check_health(self.health_timeout)
        except EngineError as error:
            if self.pool.engines().get(name) is engine and not engine.paused and not engine.asleep:
                self.pool.quarantine(name, f"it does not compute any more: {error}")
