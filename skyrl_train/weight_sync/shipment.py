"""``Shipment``: the weights, packed by the policy's workers, brought to engines over their links, digests proven."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping
from functools import partial
from typing import Any

from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.runtime.base import Workers
from skyrl_train.weight_sync.delivery import Delivery
from skyrl_train.weight_sync.links import Folder, Link, make
from skyrl_train.weight_sync.outline import SendPlan, Sent
from skyrl_train.weight_sync.proof import DigestProof, ProofFailed, digest_kind, predictable, ranks_of
from skyrl_train.weight_sync.sender import AHEAD
from skyrl_train.weight_sync.settings import SyncSettings
from skyrl_train.weight_sync.surroundings import Surroundings, choose

log = logging.getLogger("skyrl.weight_sync")

Shipped = tuple[Delivery, Awaitable[Sent]]
"""Engines that were sent the same, and what will be known of it when the workers come to it."""


class Shipment:
    """The way of the weights from workers to engines.

    Args:
        workers: the policy's, which have a ``WeightSender``.
        around: how each engine lies to the learner, by name.
        checkpoint_dtype: of the model's files: what an engine with ``dtype=auto`` goes by.
    """

    def __init__(
        self, workers: Workers, settings: SyncSettings, around: Mapping[str, Surroundings], checkpoint_dtype: str
    ) -> None:
        self.workers, self.settings, self.around = workers, settings, around
        self.checkpoint_dtype = checkpoint_dtype
        self._links: dict[str, Link] = {}
        self._folder = Folder(settings.folder)
        self._digests = DigestProof()

    async def open(self, name: str, engine: SGLangEngine) -> None:
        """Makes the link to an engine, if it is not there yet."""
        link = self._links.get(name)
        if link is None or link.engine is not engine:
            await self._drop_link(name)
            settings = self.settings
            around = self.around[name]
            kind = choose(settings.backend, engine.facts, around)
            log.info("weights reach %s by %s, from rank %d", engine.url, kind, around.sender)
            link = make(
                kind, self.workers, engine, settings.timeout, self._folder, settings.override_group, around.sender
            )
            self._links[name] = link
        await link.open()

    async def close(self) -> None:
        """Ends the links."""
        for name in list(self._links):
            await self._drop_link(name)

    async def send(
        self,
        run: Delivery,
        names: list[str],
        *,
        merged: bool = True,
        after: Awaitable[Any] | None = None,
    ) -> list[Shipped]:
        """Sends the weights to some engines of a delivery; those that fail drop out.

        Args:
            merged: with the adapter's work in them, if the policy has one; else the base model's.
            after: what the engines have to do first: it is awaited once the first bucket is packed.

        Returns:
            What ``prove`` looks at.
        """
        shipped: list[Shipped] = []
        for plan, together in self._plans(run, names, merged):
            there = {name: run.engines[name] for name in together if name in run.engines}
            part = Delivery(there, run.version, run.timeout)
            part.seconds = run.seconds
            shipped.append((part, await self._send_buckets(run, part, plan, after)))
            await self._drop_failed(run, part)
        if after is not None:
            await after
        return shipped

    async def prove(self, run: Delivery, shipped: list[Shipped]) -> None:
        """Compares the digests of what engines hold with those of what was sent; those that differ drop out."""
        for part, sent in shipped:
            _leave_out(part, run)
            if self._wants_digests:
                found = await part.each("prove", lambda _, engine, sent=sent: self._digests.check(engine, sent))
                self._compare_replicas(part, found)
                await self._drop_failed(run, part)
            await sent

    def can_wait(self, run: Delivery) -> bool:
        """Whether ``prove`` may come last: nobody but us asks these engines, and none has to be asked for it."""
        launched = all(self.around[name].launched for name in run.engines)
        return launched and not (self._wants_digests and any(map(self._digests.due, run.engines.values())))

    async def _drop_failed(self, run: Delivery, part: Delivery) -> None:
        for name, error in part.failed.items():
            run.drop(name, error)
            await self._drop_link(name)

    @property
    def _wants_digests(self) -> bool:
        return self.settings.proof in ("digest", "both")

    def _plans(self, run: Delivery, names: list[str], merged: bool) -> list[tuple[SendPlan, list[str]]]:
        """Engines that can be served by the same packed buckets, together."""
        together: dict[Any, list[str]] = {}
        for name in names:
            if name not in run.engines:
                continue
            engine = run.engines[name]
            device = "cpu" if self._links[name].name in ("gloo", "disk") else self.around[name].learner_device
            kind = digest_kind(engine.facts) if self._wants_digests and predictable(engine.facts) else None
            own = self.settings.own_memory and self._links[name].reads_own
            together.setdefault((engine.dtype(self.checkpoint_dtype), device, kind, own), []).append(name)
        plans = []
        for (dtype, device, kind, own), members in together.items():
            ranks = dict.fromkeys(rank for name in members for rank in ranks_of(run.engines[name].facts))
            limit = self.settings.bucket_bytes
            plan = SendPlan(
                dtype=dtype, limit=limit, device=device, ranks=tuple(ranks), digests=kind, merged=merged, own=own,
                hold=own and not self.settings.sleep,
            )  # fmt: skip
            plans.append((plan, members))
        return plans

    async def _send_buckets(
        self,
        run: Delivery,
        part: Delivery,
        plan: SendPlan,
        after: Awaitable[Any] | None,
    ) -> Awaitable[Sent]:
        """Bucket after bucket: while one is loaded, the next is packed and its message is read."""
        self._folder.begin()
        if any(self._links[name].name == "disk" for name in part.engines):
            await self.workers.one(0, "weights_write_config", self._folder.path)
        on_their_way: dict[int, asyncio.Task[Any]] = {}
        try:
            buckets = (await self.workers.all("weights_begin", plan))[0]
            for index, bucket in enumerate(buckets):
                if len(on_their_way) == AHEAD:
                    first = await _arrived(part, on_their_way)
                    await self.workers.all("weights_release", first)
                await _timed(part, "pack", self.workers.all("weights_pack", index))
                if index == 0:
                    if after is not None:
                        await after
                        _leave_out(part, run)
                    await part.each("begin", lambda _, engine: engine.begin_update())
                await part.each("share", lambda name, _, index=index: self._links[name].prepare(index))
                detail = f"bucket {index + 1} of {len(buckets)}"
                send = part.each("send", partial(self._send_bucket, index, bucket), detail=detail, timed=False)
                on_their_way[index] = asyncio.create_task(send)
                if plan.digests and index < len(buckets) - 1:
                    await _timed(part, "hash", self.workers.all("weights_hash", index))
            while on_their_way:
                await _arrived(part, on_their_way)
            await part.each("send", lambda name, _: self._links[name].finish())
            await part.each("end", lambda _, engine: engine.end_update())
        except BaseException:
            for task in on_their_way.values():
                task.cancel()
            await asyncio.gather(*on_their_way.values(), return_exceptions=True)
            await self.workers.all("weights_end")
            raise
        return asyncio.create_task(self._sent(len(buckets) - 1 if plan.digests else None))

    async def _sent(self, unhashed: int | None) -> Sent:
        """Frees the buckets, all engines having answered; the last one's digests are taken beside what comes next."""
        if unhashed is not None:
            await self.workers.all("weights_hash", unhashed)
        found: list[Sent] = await self.workers.all("weights_end")
        reports = {engine: told for each in found for engine, told in each.reports.items()}
        return Sent(digests=found[0].digests, reports=reports)

    async def _send_bucket(self, index: int, bucket: Any, name: str, engine: SGLangEngine) -> None:
        await self._links[name].send(index, bucket)

    def _compare_replicas(self, part: Delivery, found: Mapping[str, str | None]) -> None:
        """Engines of one shape must hold the same; the odd one out is dropped. This tells nothing for one engine."""
        shapes: dict[Any, dict[str, str]] = {}
        for name, whole in found.items():
            if whole is not None and name in part.engines:
                facts = part.engines[name].facts
                split = (facts.tensor_parallel, facts.pipeline_parallel, facts.expert_parallel, facts.data_parallel)
                kind = (facts.device, facts.dtype, facts.quantization, facts.lora)
                shapes.setdefault((split, kind), {})[name] = whole
        for digests in shapes.values():
            values = list(digests.values())
            usual = max(values, key=values.count)
            for name in [name for name, whole in digests.items() if whole != usual]:
                url, others = part.engines[name].url, len(digests) - 1
                part.drop(name, ProofFailed(f"{url}: holds other weights than the {others} engines of its kind."))

    async def _drop_link(self, name: str) -> None:
        link = self._links.pop(name, None)
        if link is not None:
            await link.close()


def _leave_out(part: Delivery, run: Delivery) -> None:
    """Engines that have failed elsewhere meanwhile."""
    part.engines = {name: engine for name, engine in part.engines.items() if name in run.engines}


async def _arrived(part: Delivery, on_their_way: dict[int, asyncio.Task[Any]]) -> int:
    """Waits for the bucket that was sent first; its number."""
    index, task = next(iter(on_their_way.items()))
    await _timed(part, "send", task)
    del on_their_way[index]
    return index


async def _timed(part: Delivery, phase: str, work: Awaitable[Any]) -> None:
    begun = time.monotonic()
    await work
    part.seconds[phase] = part.seconds.get(phase, 0.0) + time.monotonic() - begun
