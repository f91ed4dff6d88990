"""The Ray cluster: joining it, what it has, resources held of it, actors on them. The only file that imports Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from skyrl_train.errors import ConfigError, MissingPackageError, WorkerError
from skyrl_train.runtime.plan import Node

log = logging.getLogger("skyrl.runtime")

CONNECT_TIMEOUT = 10.0
"""Seconds that the head node of a named cluster has to answer."""
PLACE_TIMEOUT = 50.0
"""Seconds until the cluster must have given what is asked of it."""
UV_HOOK = "RAY_RUNTIME_ENV_HOOK"


def connect(address: str | None = None) -> None:
    """Joins the cluster that ``RAY_ADDRESS`` names, or starts one on this machine.

    Ray's uv hook rebuilds editable installs in each worker, from paths that are not there ("Failed to generate package
    metadata"). The workers run this very environment, so the hook is taken out of the way.

    Raises:
        MissingPackageError: Ray is not installed.
        ConfigError: no cluster answers at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError("ray", "trainer.placement.runtime=ray", 'pip install "skyrl-train[ray]"') from error
    if ray.is_initialized():
        return
    if os.environ.pop(UV_HOOK, None):
        log.warning("%s is set; it breaks editable installs in Ray workers and is ignored for this run", UV_HOOK)
    os.environ.setdefault("RAY_enable_worker_prestart", "0")  # idle processes, of no use to us
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU actors keep the accelerator variables
    where = address or os.environ.get("RAY_ADDRESS")
    try:
        _require_listener(where)
        ray.init(
            address=where,
            include_dashboard=None if where or find_spec("aiohttp_cors") else False,  # which ray[default] brings
            log_to_driver=True,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": worker_environment()},
        )
    except OSError as error:  # ConnectionError, TimeoutError, a name that no resolver knows
        raise ConfigError(
            "RAY_ADDRESS",
            where,
            f"no Ray cluster answers there ({error}).",
            "Start one with `ray start --head --port=6379`, or unset the variable to start one on this machine.",
        ) from error


def _require_listener(address: str | None) -> None:
    """Raises OSError if nobody listens at ``host:port``; Ray itself would try for minutes without a word."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT).close()


def worker_environment() -> dict[str, str]:
    """What every worker needs of the driver's environment to compute the same numbers and find the same code."""
    names = ("GOMP_SPINCOUNT", "SKYRL_LOG_LEVEL", "HF_HUB_OFFLINE", "HF_HOME", "PYTHONPATH", "MKL_CBWR")
    names += tuple(name for name in os.environ if name.startswith(("NCCL_", "SGLANG_", "OMP_", "MKL_")))
    return {name: os.environ[name] for name in names if name in os.environ}


def nodes() -> tuple[Node, ...]:
    """The nodes of the cluster that live, with all that they have."""
    import ray

    found = [node for node in ray.nodes() if node["Alive"]]
    return tuple(
        Node(name=_name(node), cpus=node["Resources"].get("CPU", 0.0), gpus=int(node["Resources"].get("GPU", 0)))
        for node in found
    )


class Held:
    """Resources of the cluster, in bundles: each bundle is of one node, and two are of two nodes.

    Args:
        group: Ray's placement group, which is ready.
    """

    def __init__(self, group: Any) -> None:
        import ray

        self.group = group
        table: Any = ray.util.placement_group_table(group)
        known = {node["NodeID"]: _name(node) for node in ray.nodes()}
        ids: list[str] = [table["bundles_to_node_id"][index] for index in range(len(group.bundle_specs))]
        self.node_ids = tuple(ids)
        self.names: tuple[str, ...] = tuple(known.get(node, node) for node in ids)
        """Of the node of each bundle."""

    @classmethod
    async def of(cls, bundles: Sequence[Mapping[str, float]], timeout: float = PLACE_TIMEOUT) -> Held:
        """Waits until the cluster gives the bundles.

        Raises:
            WorkerError: it does not within ``timeout`` seconds; says what is asked and what is there.
        """
        import ray
        from ray.util.placement_group import placement_group

        group = placement_group([dict(bundle) for bundle in bundles], strategy="STRICT_SPREAD")
        if await asyncio.to_thread(group.wait, timeout):
            return cls(group)
        ray.util.remove_placement_group(group)
        asked = ", ".join(f"({_amounts(bundle)})" for bundle in bundles)
        raise WorkerError(
            f"the Ray cluster did not give what this run needs within {timeout:g} s. Asked, each of another node: "
            f"{asked}. There: {'; '.join(map(str, nodes()))}; of it free: {_amounts(ray.available_resources())}. "
            "Another run may hold the rest (`ray status` tells)."
        )

    def release(self) -> None:
        """Gives the resources back; whatever still runs on them is ended by Ray."""
        import ray

        ray.util.remove_placement_group(self.group)

    def spawn(self, kind: type, bundle: int, *args: Any, **resources: float) -> Any:
        """An actor of the plain class ``kind`` in a bundle."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor: Any = ray.remote(kind)
        there = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)
        given = {"num_cpus": 0, "num_gpus": 0} | resources
        return actor.options(max_concurrency=4096, scheduling_strategy=there, **given).remote(*args)


async def not_started(actors: Sequence[Any], timeout: float) -> list[int]:
    """Waits for the actors' processes; the places of those that have not started after ``timeout`` seconds."""
    import ray

    deadline = time.monotonic() + timeout
    ready = {actor.__ray_ready__.remote(): rank for rank, actor in enumerate(actors)}
    pending = list(ready)
    while pending:
        patience = min(1.0, max(0.0, deadline - time.monotonic()))
        _, pending = await asyncio.to_thread(ray.wait, pending, num_returns=len(pending), timeout=patience)
        if pending and time.monotonic() >= deadline:
            break
    return sorted(ready[reference] for reference in pending)


async def answer(reference: Any) -> Any:
    """What an actor's method returns. What its own code raises comes without Ray's wrapping, as in every runtime.

    Raises:
        ActorGone: the actor, its process or its node is gone.
    """
    from ray.exceptions import RayError, RayTaskError

    try:
        return await reference
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, BaseException) else error) from None
    except RayError as error:
        raise ActorGone(_brief(str(error))) from error


class ActorGone(Exception):
    """An actor died; says how, as far as Ray knows."""


def share(args: tuple[Any, ...], count: int) -> list[Any]:
    """Arguments for ``count`` actors, sent to each node once."""
    import ray

    return [args] if count == 1 else [ray.put(args)] * count


def kill(actors: Sequence[Any]) -> None:
    """Ends the actors' processes, whatever they do."""
    import ray

    for actor in actors:
        ray.kill(actor)


def here() -> str:
    """The id of the node of this process."""
    import ray

    return ray.get_runtime_context().get_node_id()


def own_gpus() -> tuple[str, ...]:
    """The GPUs that Ray has given to this actor, as CUDA_VISIBLE_DEVICES names them."""
    import ray

    return tuple(ray.get_runtime_context().get_accelerator_ids().get("GPU", ()))


async def on_node(node_id: str, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
    """Runs a function on a node; None if it has not answered within ``timeout`` seconds, as a dead one."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task: Any = ray.remote(function)
    try:
        async with asyncio.timeout(timeout):
            return await task.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(*args)
    except (RayError, TimeoutError):
        return None


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources[kind]:g} {kind}" for kind in ("CPU", "GPU") if resources.get(kind)) or "nothing"


def _brief(text: str) -> str:
    """Ray's own sentences, without its tables of ids."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(("\t", " "))]
    return " ".join(lines)[:600]
