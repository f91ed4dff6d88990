"""``EngineSync``: the transaction that brings the policy's weights to engines that are servers.

    wake weights -> pause -> send every bucket -> prove the digests -> wake the rest -> flush once, commit the version
                 -> continue -> probe -> let requests in

All engines go through it side by side, and one that fails anywhere drops out: it is put in quarantine, and gets no
prompt until it has gone through the whole of it. The order is what makes it safe: an engine whose weights are not
proven has neither a cache nor the new version's name, and its probe is answered before any request of ours.

Where nobody else can ask the engines (we launched them), they need not leave memory to anyone, and digests were told
with the last bucket, the digests are compared last: the workers compute theirs while the engines answer the probe.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping

from skyrl_train.engines.faults import EngineRefusedError
from skyrl_train.engines.pool import EnginePool
from skyrl_train.engines.sglang.control import HELD, PauseMode
from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.errors import EngineError, WeightSyncError
from skyrl_train.learner.residents import Residents
from skyrl_train.runtime.base import Workers
from skyrl_train.runtime.local import quick_turns
from skyrl_train.weight_sync.adapters import AdapterSync
from skyrl_train.weight_sync.base import WeightSync
from skyrl_train.weight_sync.bounded import BoundedWorkers
from skyrl_train.weight_sync.delivery import Delivery
from skyrl_train.weight_sync.proof import Probe, ProofFailed, tolerance_for
from skyrl_train.weight_sync.settings import SyncSettings
from skyrl_train.weight_sync.shipment import Shipment
from skyrl_train.weight_sync.surroundings import Surroundings

log = logging.getLogger("skyrl.weight_sync")


class EngineSync(WeightSync):
    """Syncs a pool of SGLang engines with the policy's workers.

    Args:
        pool: the engines.
        workers: the policy's, which have a ``WeightSender``.
        around: how each engine lies to the learner, by name.
        learner_dtype: number format in which the learner computes.
        checkpoint_dtype: of the model's files: what an engine with ``dtype=auto`` goes by.
        probe_rows: token ids of the probe.
        residents: the learner's models on the engines' GPUs, which come and go; None: they share none.
    """

    def __init__(
        self,
        pool: EnginePool,
        workers: Workers,
        settings: SyncSettings,
        *,
        around: Mapping[str, Surroundings],
        learner_dtype: str,
        checkpoint_dtype: str,
        probe_rows: tuple[tuple[int, ...], ...] = (),
        residents: Residents | None = None,
    ) -> None:
        workers = BoundedWorkers(workers, settings.timeout)
        self.pool, self.workers, self.settings = pool, workers, settings
        self.learner_dtype, self.checkpoint_dtype = learner_dtype, checkpoint_dtype
        self.probe_rows, self.residents = probe_rows, residents
        self.shipment = Shipment(workers, settings, around, checkpoint_dtype)
        self.adapters = AdapterSync(workers, settings, around) if settings.adapters else None
        self.standing_by: dict[str, SGLangEngine] = {}
        """Engines that were started or attached anew and have not been given weights."""
        self.taking_part: set[str] = set()
        """Engines in quarantine that are being brought up just now."""
        self.current: int | None = None
        """The version that the learner's weights are at; None while it learns."""
        self.ready = asyncio.Event()
        """Set while the learner leaves room: an engine may be started on its GPUs."""
        self._lock = asyncio.Lock()

    async def sync(self, version: int) -> dict[str, float]:
        """See ``WeightSync.sync``. Engines that fail are quarantined; the others go on.

        Raises:
            WeightSyncError: no engine is left, or one failed its proof twice and the run is to stop then.
        """
        async with self._lock:
            self.pool.version = self.current = None  # an engine that comes back while this fails stands by
            engines = self._serving() | self.standing_by
            self.taking_part |= self.standing_by.keys()
            self.standing_by = {}
            metrics = await self._bring(engines, version)
            self.current = version
            self.ready.set()
        moved = self.residents.metrics() if self.residents else {}
        return metrics | moved | {"weight_sync/engines_quarantined": float(len(self.pool.quarantined()))}

    @property
    def wanted(self) -> bool:
        """Whether an engine stands by for weights."""
        return bool(self.standing_by)

    async def make_way(self) -> None:
        """No engine is left. The learner's models leave the engines' GPUs, so that one can be started there."""
        async with self._lock:
            if self.residents:
                await self.residents.nobody()
            self.ready.set()

    async def bring_up(self, name: str, engine: SGLangEngine) -> bool:
        """Gives one engine, started or attached anew, the current weights, and lets it serve.

        Returns:
            False if the learner is learning, or others serve a version that it has left behind: the engine then stands
            by for the next sync.

        Raises:
            WeightSyncError: it failed.
        """
        async with self._lock:
            if self.current is None or (self.pool.engines() and self.pool.version != self.current):
                self.standing_by[name] = engine
                return False
            self.taking_part.add(name)
            await self._bring({name: engine}, self.current)
            return True

    async def enter_training(self) -> None:
        """The learner's weights are about to change: no engine can be brought up until the next sync.

        Engines that share the learner's memory go to sleep, and its models come back.
        """
        async with self._lock:
            self.current = None
            self.ready.clear()
            if self.settings.sleep:
                awake = self._serving() | self.standing_by
                run = Delivery(awake, self.pool.version or 0, self.settings.timeout)
                await run.each("sleep", lambda _, engine: engine.sleep(self.settings.sleep_level))
                for name, error in run.failed.items():
                    self.standing_by.pop(name, None)
                    self.pool.quarantine(name, str(error))
            if self.residents:
                await self.residents.everybody()

    async def wake(self, version: int) -> None:
        """See ``WeightSync.wake``. An engine that is lost meanwhile, with none beside it, gets the newer weights."""
        async with self._lock:
            if self.residents:
                await self.residents.nobody()
            run = Delivery(self._serving(), self.pool.version or 0, self.settings.timeout)
            await run.each("wake", lambda _, engine: engine.wake_up())
            for name, error in run.failed.items():
                self.pool.quarantine(name, str(error))
            self.current = version
            self.ready.set()

    async def close(self) -> None:
        """Ends the links."""
        await self.shipment.close()

    async def _bring(self, engines: Mapping[str, SGLangEngine], version: int) -> dict[str, float]:
        try:
            with quick_turns():
                return await self._transaction(engines, version)
        finally:
            self.taking_part -= engines.keys()

    async def _transaction(self, engines: Mapping[str, SGLangEngine], version: int) -> dict[str, float]:
        """The transaction, with one more try for those whose proof failed."""
        if not engines:
            raise WeightSyncError(f"no engine is left for weight version {version}. {self._causes()}")
        begun = time.monotonic()
        delivery = await self._deliver(engines, version)
        again = {n: engines[n] for n, e in delivery.failed.items() if isinstance(e, ProofFailed)}
        if again:
            for name in again:
                log.error("%s Sending once more.", delivery.failed[name])
            second = await self._deliver(again, version)
            delivery.failed = {n: e for n, e in delivery.failed.items() if n not in again} | second.failed
            delivery.engines |= second.engines
        self.pool.version = version
        for name, engine in delivery.engines.items():
            engine.admit()
            self.pool.readmit(name, version, engine)
        for name, error in delivery.failed.items():
            self.pool.quarantine(name, str(error), discard=True)
        broken = [e for e in delivery.failed.values() if isinstance(e, ProofFailed)]
        if broken and self.settings.on_proof_failure == "stop":
            raise ProofFailed(f"{broken[0]} (generator.weight_proof_failure=stop)")
        if not delivery.engines:
            raise WeightSyncError("; ".join(dict.fromkeys(map(str, delivery.failed.values()))))
        return self._metrics(delivery, version, time.monotonic() - begun)

    async def _deliver(self, engines: Mapping[str, SGLangEngine], version: int) -> Delivery:
        """The learner packs while the engines pause, and computes its half of the probe once all have the weights: on a
        GPU that both share, loading would wait for it.

        Where the learner has to leave that GPU first, its half is waited for.
        """
        run = Delivery(engines, version, self.settings.timeout)
        if self.residents:
            await self.residents.policy_only()
        await run.each("wake", lambda _, engine: engine.wake_up(["weights"]))
        await run.each("join", self._join)
        pause = asyncio.create_task(run.each("pause", self._pause))
        half: asyncio.Task[list[list[list[float]]]] | None = None
        try:
            names = list(run.engines) if self.adapters is None else self.adapters.without_base(run)
            shipped = await self.shipment.send(run, names, merged=self.adapters is None, after=pause)
            last = not self.residents and not self.settings.sleep and self.shipment.can_wait(run)
            if not last:
                await self.shipment.prove(run, shipped)
            if self.adapters is not None:
                await self.adapters.take()
            if self._probes and run.engines:
                half = asyncio.create_task(self._expected())
                if self.residents:
                    await half
            if self.residents:
                await self.residents.nobody()
            await self._finish(run, version)
            if half is not None:
                await run.each("probe", lambda _, engine: self._probe(engine, half))
            if last:
                await self.shipment.prove(run, shipped)
        finally:
            started = [pause] if half is None else [pause, half]
            for task in started:
                task.cancel()
            await asyncio.gather(*started, return_exceptions=True)
        if self.adapters is not None:
            await self.adapters.unload_old(run)
        return run

    async def _finish(self, run: Delivery, version: int) -> None:
        """From weights that are there to engines that compute, but serve no request of ours."""
        await run.each("wake", lambda _, engine: engine.wake_up())
        if self.adapters is not None:
            await self.adapters.load(run)
        checked = self.settings.proof != "off"
        commit = run.each("commit", lambda _, engine: engine.set_version(version, check=checked))
        if all(self.shipment.around[name].launched for name in run.engines):  # nobody else asks them meanwhile
            await asyncio.gather(commit, self._flush_and_continue(run))
        else:
            await asyncio.gather(commit, run.each("flush", self._flush))
            await run.each("continue", lambda _, engine: engine.resume(admit=False))

    async def _flush_and_continue(self, run: Delivery) -> None:
        """In this order: a server that goes on with nothing to do may take 0.4 s until it hears of the flush."""
        await run.each("flush", self._flush)
        await run.each("continue", lambda _, engine: engine.resume(admit=False))

    # Parts of the transaction.

    async def _join(self, name: str, engine: SGLangEngine) -> None:
        """A server of somebody else's may be another one by now, to which a call for the old one's group is fatal."""
        if not self.shipment.around[name].launched and engine.committed is not None:
            found = await engine.version()
            if found != engine.committed:
                raise EngineError(
                    f"{engine.url}: reports weight version {found}, and {engine.committed} was committed: its owner "
                    "has started it anew, or somebody else updates it."
                )
        await self.shipment.open(name, engine)

    async def _pause(self, name: str, engine: SGLangEngine) -> None:
        if engine.idle and self.shipment.around[name].launched:
            engine.hold()
        else:
            await engine.pause(self._pause_mode(engine))

    async def _flush(self, name: str, engine: SGLangEngine) -> None:
        if engine.paused == "in_place":  # what runs keeps its cache, so new requests are kept apart from it
            engine.salt = f"skyrl-{time.monotonic_ns()}"
            return
        try:
            await engine.flush(wait=0.0 if engine.paused == "retract" else 5.0)  # retracted requests wait with it
        except EngineRefusedError as error:
            if engine.paused != HELD:
                raise
            log.warning("%s was thought idle, and is paused now: %s", engine.url, error)
            await engine.pause("abort")
            await engine.flush()

    @property
    def _probes(self) -> bool:
        """Of an adapter there are no digests, so the probe alone proves it."""
        wanted = ("probe", "both") if self.adapters is None else ("probe", "both", "digest")
        return self.settings.proof in wanted and bool(self.probe_rows)

    async def _expected(self) -> list[list[list[float]]]:
        """The learner's log-probs of the probe, and those of its base model where an adapter is synced."""
        asked = (self.probe_rows, Probe.start(self.probe_rows[0]))
        bases = (False,) if self.adapters is None else (False, True)
        return [(await self.workers.all("weights_probe", *asked, base))[0] for base in bases]

    async def _probe(self, engine: SGLangEngine, expected: Awaitable[list[list[list[float]]]]) -> None:
        dtype = engine.dtype(self.checkpoint_dtype)
        tolerance = tolerance_for(self.settings.probe_tolerance, dtype, self.learner_dtype)
        probe = Probe(rows=self.probe_rows, tolerance=tolerance)
        found = await probe.ask(engine, adapter=engine.adapter, salt=engine.salt)
        wanted, *base = await expected
        probe.compare(engine.url, found, wanted)
        if self.adapters is not None:
            await self.adapters.check(engine, probe, wanted, *base)

    def _pause_mode(self, engine: SGLangEngine) -> PauseMode:
        """``retract`` ends SGLang 0.5.10 to 0.5.20 at the flush; there, the pool carries aborted requests on."""
        wanted = self.settings.pause_mode
        return "abort" if wanted == "retract" and engine.facts.flush_after_retract_is_fatal else wanted

    def _serving(self) -> dict[str, SGLangEngine]:
        return {name: engine for name, engine in self.pool.engines().items() if isinstance(engine, SGLangEngine)}

    def _causes(self) -> str:
        return "; ".join(f"{name}: {cause}" for name, cause in self.pool.quarantined().items())

    def _metrics(self, delivery: Delivery, version: int, seconds: float) -> dict[str, float]:
        times = {f"weight_sync/{phase}_s": value for phase, value in delivery.seconds.items()}
        return times | {
            "weight_sync/version": float(version),
            "weight_sync/total_s": seconds,
            "weight_sync/engines": float(len(delivery.engines)),
        }
