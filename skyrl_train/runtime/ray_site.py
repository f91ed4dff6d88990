"""A Ray cluster as the place of a run: one bundle of a placement group for each node of the plan.

The bundle holds all that the run needs of its node; the actors on it ask for nothing themselves, so that several models
share a GPU. On GPUs an actor that does nothing is given all of the bundle's: it knows their numbers, which Ray chooses.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_train.errors import WorkerError
from skyrl_train.runtime import ray_cluster
from skyrl_train.runtime.base import Workers
from skyrl_train.runtime.plan import Plan, make_plan
from skyrl_train.runtime.ray_workers import RaySeat, RayWorkers

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config

log = logging.getLogger("skyrl.runtime")


class _Holder:
    """Has the GPUs of one bundle."""

    def gpus(self) -> tuple[str, ...]:
        return ray_cluster.own_gpus()


class RaySite:
    """See ``Site``.

    Args:
        plan: whose nodes are those that Ray has chosen.
        held: a bundle for each node that the plan uses.
        bundles: which one, by node of the plan.
    """

    def __init__(self, plan: Plan, held: ray_cluster.Held, bundles: dict[int, int], patience: float) -> None:
        self.plan, self._held, self._bundles, self._patience = plan, held, bundles, patience
        self._holders: dict[int, Any] = {}
        self._variables: dict[int, dict[str, str]] = {}

    @classmethod
    async def open(cls, config: Config, roles: Sequence[str]) -> RaySite:
        """See ``open_site``."""
        ray_cluster.connect()
        plan = make_plan(config, ray_cluster.nodes(), roles)
        needs, kind = plan.slots(), "GPU" if plan.on_gpu else "CPU"
        held = await ray_cluster.Held.of([{kind: float(count)} for count in needs.values()])
        bundles = {node: index for index, node in enumerate(needs)}
        nodes = list(plan.nodes)
        for node, index in bundles.items():
            nodes[node] = dataclasses.replace(nodes[node], name=held.names[index])
        patience = config.trainer.placement.worker_start_timeout
        site = cls(dataclasses.replace(plan, nodes=tuple(nodes)), held, bundles, patience)
        log.info("placement: %s", site.plan)
        try:
            if plan.on_gpu:
                await site._learn_gpus(needs)
        except BaseException:
            await site.close()
            raise
        return site

    async def workers(self, role: str, factory: Callable[..., Any], *args: Any, folder: Path | None = None) -> Workers:
        seats = [self._seat(seat.node, seat.slots[0]) for seat in self.plan.seats(role)]
        return await self._start(factory, *args, role=role, seats=seats, folder=folder)

    async def per_node(self, factory: Callable[..., Any], *args: Any, folder: Path | None = None) -> Workers | None:
        """Ranks are the places of ``Plan.slots``: the nodes that the plan uses, in their order."""
        seats = [self._seat(node) for node in self._bundles]
        return await self._start(factory, *args, role="node", seats=seats, folder=folder)

    async def close(self) -> None:
        ray_cluster.kill(list(self._holders.values()))
        self._held.release()

    async def _start(self, factory: Callable[..., Any], *args: Any, **options: Any) -> Workers:
        return await RayWorkers.start(factory, *args, held=self._held, timeout=self._patience, **options)

    def _seat(self, node: int, slot: int = 0) -> RaySeat:
        variables = ray_cluster.worker_environment() | self._variables.get(node, {})  # as they are now
        return RaySeat(bundle=self._bundles[node], device_index=slot, variables=variables)

    async def _learn_gpus(self, needs: dict[int, int]) -> None:
        for node, count in needs.items():
            self._holders[node] = self._held.spawn(_Holder, self._bundles[node], num_gpus=count)
        late = await ray_cluster.not_started(list(self._holders.values()), self._patience)
        if late:
            raise WorkerError(
                f"Ray gave the GPUs of {len(late)} node(s), and no process started on them within {self._patience:g} s "
                "(trainer.placement.worker_start_timeout)."
            )
        for node, holder in self._holders.items():
            given = await ray_cluster.answer(holder.gpus.remote())
            self._variables[node] = {"CUDA_VISIBLE_DEVICES": ",".join(given)}
