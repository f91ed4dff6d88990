"""Workers as Ray actors.

An actor holds the same ``Host`` that the local runtime uses, so the arithmetic is the same to the bit.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl_train.errors import WorkerError
from skyrl_train.runtime import ray_cluster
from skyrl_train.runtime.base import Host
from skyrl_train.runtime.place import Place, own_address

log = logging.getLogger("skyrl.runtime")

START_TIMEOUT = 300.0
"""Seconds until each worker's process must have started: a loaded machine takes its time."""
CLOSE_TIMEOUT = 10.0
"""Seconds that a worker has to end its object before its process is killed."""
TAIL, LINES, TAIL_TIMEOUT = 4000, 8, 20.0
"""Bytes and lines of a dead worker's output that are told, and seconds in which its node must give them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySeat:
    """Where one actor goes."""

    bundle: int = 0
    device_index: int = 0
    """Of the GPUs that it sees, its own."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """For its environment, before anything is loaded."""


class _Cell:
    """What runs inside an actor: a host, on the actor's own event loop."""

    def __init__(
        self,
        factory: Callable[..., Any],
        args: tuple[Any, ...],
        role: str,
        folder: str | None,
        variables: Mapping[str, str],
    ) -> None:
        from skyrl_train.tracking.logs import setup_logging

        os.environ.update(variables)
        setup_logging(folder=folder, role=role)
        self._host = Host(factory, *args)

    async def output(self) -> str | None:
        """The file, on its own node, that gets what the process prints."""
        with suppress(OSError):
            return os.readlink("/proc/self/fd/2")
        return None

    async def open_meeting(self) -> tuple[str, int]:
        return self._host.open_meeting(own_address())

    async def start(self, place: Place) -> None:
        await self._host.start(place)

    async def call(self, method: str, args: tuple[Any, ...]) -> Any:
        return await self._host.call(method, *args)

    async def close(self) -> None:
        await self._host.close()


class RayWorkers:
    """Copies of a class, one actor each."""

    def __init__(self, actors: list[Any], role: str, held: ray_cluster.Held, seats: Sequence[RaySeat]) -> None:
        self._actors, self._role, self._held, self._seats = actors, role, held, seats
        self._outputs: list[str | None] = [None] * len(actors)
        self._gone: dict[int, WorkerError] = {}

    @classmethod
    async def start(
        cls,
        factory: Callable[..., Any],
        *args: Any,
        role: str,
        held: ray_cluster.Held,
        seats: Sequence[RaySeat] = (RaySeat(),),
        folder: Path | None = None,
        timeout: float = START_TIMEOUT,
    ) -> RayWorkers:
        """Places an actor on each seat and builds its object.

        Args:
            factory: makes the object, on the actor's compute thread.
            role: names the workers in errors.
            held: the resources; the actors themselves ask for none.
            folder: the run folder, where each actor writes a log of its own; on another node, that node's disk.
            timeout: seconds until every process must have started.

        Raises:
            WorkerError: a process did not start, or one died while starting. What the factory raises passes through.
        """
        where = None if folder is None else str(folder)
        actors = [
            held.spawn(_Cell, seat.bundle, factory, args, f"{role}-{rank}", where, seat.variables)
            for rank, seat in enumerate(seats)
        ]
        workers, count = cls(actors, role, held, seats), len(seats)
        try:
            await workers._await_processes(timeout)
            workers._outputs = await workers._every("output")
            meeting = await workers._ask(0, "open_meeting") if count > 1 else None
            places = [
                Place(rank=rank, size=count, device_index=seat.device_index, meeting=meeting)
                for rank, seat in enumerate(seats)
            ]
            await asyncio.gather(*(workers._ask(rank, "start", place) for rank, place in enumerate(places)))
        except BaseException:
            workers._kill()
            raise
        return workers

    async def _await_processes(self, timeout: float) -> None:
        """The resources are held: what is waited for is Python, starting."""
        late = await ray_cluster.not_started(self._actors, timeout)
        if late:
            who = ", ".join(f"rank {rank} on {self._node(rank)}" for rank in late)
            raise WorkerError(
                f"the processes of {len(late)} of {self.size} {self._role} worker(s) ({who}) did not start within "
                f"{timeout:g} s. The cluster has given their resources, so this is no matter of placement: the machine "
                "is too busy (more time: trainer.placement.worker_start_timeout), or Ray's logs "
                "(/tmp/ray/session_latest/logs) say why."
            )

    @property
    def size(self) -> int:
        return len(self._actors)

    async def all(self, method: str, *args: Any) -> list[Any]:
        given = ray_cluster.share(args, self.size)
        return list(await asyncio.gather(*(self._ask(rank, "call", method, given[rank]) for rank in range(self.size))))

    async def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        pairs = list(zip(range(self.size), arguments, strict=True))  # a wrong number is found before any call is made
        return list(await asyncio.gather(*(self._ask(rank, "call", method, args) for rank, args in pairs)))

    async def one(self, rank: int, method: str, *args: Any) -> Any:
        return await self._ask(rank, "call", method, args)

    async def close(self) -> None:
        """Ends the objects, as the local runtime does, then the processes: dead or hung ones within CLOSE_TIMEOUT."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._every("close")
        except (WorkerError, TimeoutError) as error:
            log.warning("%s workers did not close by themselves: %s", self._role, error or "no answer")
        finally:
            self._kill()

    def _kill(self) -> None:
        ray_cluster.kill(self._actors)

    async def _every(self, verb: str) -> list[Any]:
        return list(await asyncio.gather(*(self._ask(rank, verb) for rank in range(self.size))))

    async def _ask(self, rank: int, verb: str, *args: Any) -> Any:
        try:
            return await ray_cluster.answer(getattr(self._actors[rank], verb).remote(*args))
        except ray_cluster.ActorGone as error:
            if rank not in self._gone:
                self._gone[rank] = WorkerError(await self._obituary(rank, str(error)))
            raise self._gone[rank] from error

    async def _obituary(self, rank: int, how: str) -> str:
        words = await self._last_lines(rank)
        told = f"{self._role} worker, rank {rank}, died on node {self._node(rank)}: {how}"
        if words is None:
            return f"{told} Its node does not answer either: it is gone, or cut off."
        return told + (f" Its last lines:\n  {words}" if words else "")

    async def _last_lines(self, rank: int) -> str | None:
        """Of what it printed; None: its node does not answer."""
        file, node = self._outputs[rank] or os.devnull, self._held.node_ids[self._seats[rank].bundle]
        if node == ray_cluster.here():
            return _tail(file)
        return await ray_cluster.on_node(node, _tail, file, timeout=TAIL_TIMEOUT)

    def _node(self, rank: int) -> str:
        return self._held.names[self._seats[rank].bundle]


def _tail(file: str) -> str:
    """The last lines of a worker's output."""
    try:
        with open(file, "rb") as output:
            end = output.seek(0, os.SEEK_END)
            output.seek(max(0, end - TAIL))
            lines = output.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    told = [line for line in lines if line.strip() and not line.startswith(":")]  # Ray marks its own with a colon
    return "\n  ".join(told[-LINES:])
