"""Where the processes of a run live: on this machine, or on nodes of a Ray cluster, as the plan says."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skyrl_train.config.backend import resolve_runtime
from skyrl_train.runtime.base import Workers
from skyrl_train.runtime.gpus import visible_gpus
from skyrl_train.runtime.local import LocalWorkers
from skyrl_train.runtime.place import Place
from skyrl_train.runtime.plan import Node, Plan, make_plan
from skyrl_train.runtime.processes import ProcessWorkers

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config

log = logging.getLogger("skyrl.runtime")


class Site(Protocol):
    """Room for a run's workers and engines."""

    plan: Plan

    async def workers(self, role: str, factory: Callable[..., Any], *args: Any, folder: Path | None = None) -> Workers:
        """Starts the workers of a role on their seats; their logs go to the run folder.

        Raises:
            WorkerError: they did not start. What the factory raises passes through.
        """
        ...

    async def per_node(self, factory: Callable[..., Any], *args: Any, folder: Path | None = None) -> Workers | None:
        """One object on each node of the plan, to start engines there; None where engines are started by this
        process. It sees the GPUs of the plan, numbered as there."""
        ...

    async def close(self) -> None:
        """Gives everything back. The workers are closed before."""
        ...


async def open_site(config: Config, roles: Sequence[str] = ("policy",)) -> Site:
    """Plans the run and takes what it needs.

    Args:
        roles: the models that it has: "policy", "ref", "critic".

    Raises:
        ConfigError: the machine, or the cluster, cannot hold the plan; no cluster answers.
        WorkerError: the cluster could, and does not give it within a minute.
    """
    if resolve_runtime(config) == "local":
        return LocalSite(config, roles)
    from skyrl_train.runtime.ray_site import RaySite

    return await RaySite.open(config, roles)


class LocalSite:
    """This machine: one worker in this process, several in processes of their own."""

    def __init__(self, config: Config, roles: Sequence[str] = ("policy",)) -> None:
        gpus = len(visible_gpus()) if config.trainer.device != "cpu" else 0
        self.plan = make_plan(config, [Node(name=platform.node() or "this machine", gpus=gpus)], roles)
        self._patience = config.trainer.placement.worker_start_timeout

    async def workers(self, role: str, factory: Callable[..., Any], *args: Any, folder: Path | None = None) -> Workers:
        devices = [seat.slots[0] for seat in self.plan.seats(role)]
        if len(devices) == 1:
            return await LocalWorkers.start(factory, *args, place=Place(device_index=devices[0]))
        return await ProcessWorkers.start(
            factory, *args, role=role, count=len(devices), first_device=devices[0], folder=folder,
            timeout=self._patience,
        )  # fmt: skip

    async def per_node(self, factory: Callable[..., Any], *args: Any, folder: Path | None = None) -> Workers | None:
        return None

    async def close(self) -> None:
        """Nothing is held."""
