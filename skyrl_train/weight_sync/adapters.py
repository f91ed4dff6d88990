"""``AdapterSync``: the policy's LoRA adapter, under a new name for each version, on engines that hold the base model.

A name is never loaded twice: a request that names the version it wants can get no other, and the prefix cache, which
goes by the adapter, holds nothing of an older one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from skyrl_train.engines.faults import EngineRefusedError
from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.runtime.base import Workers
from skyrl_train.weight_sync.delivery import Delivery
from skyrl_train.weight_sync.proof import Probe, ProofFailed
from skyrl_train.weight_sync.settings import SyncSettings
from skyrl_train.weight_sync.surroundings import Surroundings

log = logging.getLogger("skyrl.weight_sync")

VISIBLE = 4.0
"""An adapter's work on the log-probs is looked at where it is so many times the difference that the base shows."""
NAME = "policy-v"
TAKEN = "already loaded"
"""How SGLang says that there is an adapter of that name."""


class AdapterSync:
    """Loads adapters, uses them, and unloads old ones.

    Args:
        workers: the policy's, which have a ``WeightSender``.
        around: how each engine lies to the learner: from memory only where they share it.
    """

    def __init__(self, workers: Workers, settings: SyncSettings, around: Mapping[str, Surroundings]) -> None:
        self.workers, self.settings, self.around = workers, settings, around
        self._config: dict[str, Any] = {}
        self._based: WeakKeyDictionary[SGLangEngine, bool] = WeakKeyDictionary()
        self._loaded: WeakKeyDictionary[SGLangEngine, list[str]] = WeakKeyDictionary()

    def without_base(self, run: Delivery) -> list[str]:
        """Engines that were not given the base model, or that gave it up in sleep."""
        return [name for name, engine in run.engines.items() if engine not in self._based or engine.lost_weights]

    async def take(self) -> None:
        """Takes the adapter as it is now: nothing of the learner is needed afterwards."""
        self._config = (await self.workers.all("adapter_begin"))[0]

    async def load(self, run: Delivery) -> None:
        """Loads what was taken, on every engine of a delivery that has the base; requests use it from now on."""
        for engine in run.engines.values():
            self._based[engine] = True
        try:
            if any(not self._by_memory(name, engine) for name, engine in run.engines.items()):
                await self.workers.one(0, "adapter_write", self.settings.adapter_folder)
            await run.each("adapter", lambda name, engine: self._load(name, engine, run.version))
        finally:
            await self.workers.all("adapter_end")

    async def unload_old(self, run: Delivery) -> None:
        """Unloads every earlier version."""
        await run.each("unload", self._unload)

    async def check(
        self,
        engine: SGLangEngine,
        probe: Probe,
        expected: Sequence[Sequence[float]],
        base: Sequence[Sequence[float]],
    ) -> None:
        """Proves that the adapter is applied: with it and without it, the log-probs change as the learner's do.

        Args:
            expected: the learner's log-probs of the probe, with the adapter.
            base: without it.

        Raises:
            ProofFailed: they do not.
        """
        with_it, without = [
            await probe.ask(engine, adapter=adapter, salt=engine.salt) for adapter in (engine.adapter, None)
        ]
        noise = _mean([abs(a - b) for a, b in _pairs(without, base)])
        wanted = [a - b for a, b in _pairs(expected, base)]
        found = [a - b for a, b in _pairs(with_it, without)]
        size, off = _mean([abs(x) for x in wanted]), _mean([abs(x - y) for x, y in zip(wanted, found, strict=True)])
        if size > VISIBLE * noise and not off <= size / 2:
            raise ProofFailed(
                f"{engine.url}: the adapter {engine.adapter} is not applied as it should be: it changes the learner's "
                f"log-probs by {size:.3g} nats a token, and the engine's differ from that by {off:.3g}. Likely causes: "
                "an adapter of another version, one that was not loaded, another scale (alpha / rank)."
            )

    def _by_memory(self, name: str, engine: SGLangEngine) -> bool:
        around = self.around[name]
        return around.launched and around.same_host and "/load_lora_adapter_from_tensors" in engine.facts.endpoints

    async def _load(self, name: str, engine: SGLangEngine, version: int) -> None:
        loaded = self._loaded.setdefault(engine, [])
        adapter = f"{NAME}{version}"
        try:
            there = await self._send(name, engine, adapter)
        except EngineRefusedError as error:
            if TAKEN not in str(error):
                raise
            await engine.unload_lora_adapter(adapter)  # a second try, or one of an earlier run
            there = await self._send(name, engine, adapter)
        loaded += [other for other in there if other.startswith(NAME) and other not in loaded]
        engine.use_adapter(adapter)

    async def _send(self, name: str, engine: SGLangEngine, adapter: str) -> list[str]:
        """Loads the adapter; returns the names of all that the engine has, those of an earlier run among them."""
        if self._by_memory(name, engine):
            sender = self.around[name].sender
            payloads = await self.workers.one(sender, "adapter_share", engine.facts.tensor_parallel)
            return await engine.load_lora_tensors(adapter, payloads, self._config)
        return await engine.load_lora_adapter(adapter, self.settings.adapter_folder)

    async def _unload(self, name: str, engine: SGLangEngine) -> None:
        loaded = self._loaded.get(engine, [])
        for adapter in [adapter for adapter in loaded if adapter != engine.adapter]:
            await engine.unload_lora_adapter(adapter)
            loaded.remove(adapter)


def _pairs(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [pair for x, y in zip(a, b, strict=True) for pair in zip(x, y, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
