"""Servers on a node of a Ray cluster: ``EngineNode`` lives there, ``NodeServers`` stands for it here.

The node starts, watches and ends its servers, exactly as this machine does its own; all else goes over HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_train.engines.server_process import ServerProcess, free_port
from skyrl_train.engines.sglang.options import Surroundings, look_around, server_variables
from skyrl_train.errors import EngineError, WorkerError
from skyrl_train.runtime.base import Workers
from skyrl_train.runtime.gpus import visible_gpus
from skyrl_train.runtime.place import host_identity, own_address

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from skyrl_train.config.schema import Config
    from skyrl_train.runtime.site import Site

log = logging.getLogger("skyrl.engines.sglang")

INTERVAL, WATCH = 0.2, 5.0
"""Seconds between two looks at a process, and between two reports about it."""
NOT_STARTED, NODE_GONE = 127, 137
"""Exit statuses that are told of a server that could not be started, and of one whose node is gone."""
PATIENCE = 60.0
"""Seconds for a short answer of a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What a node says of itself."""

    host: str
    """The same for processes that can share memory (``host_identity``)."""
    address: str
    """By which servers there are reached."""
    gpus: tuple[str, ...]
    """UUIDs of those that the plan gives to this run there, in the order of its slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What is to be known of a node before a server is started there."""

    facts: NodeFacts
    around: Surroundings
    variables: dict[str, str | None]
    servers: NodeServers | None
    """None: servers are started by this process."""


async def look_at_nodes(config: Config, site: Site, folder: Path, stack: AsyncExitStack) -> dict[int, Ground]:
    """The nodes of the plan that have engines.

    Raises:
        ConfigError, MissingPackageError: no server could be started there.
        WorkerError: a node does not answer.
    """
    plan, gpu = site.plan, site.plan.on_gpu
    workers = await site.per_node(EngineNode, folder=folder)
    if workers is None:
        here = EngineNode()
        around, variables = here.look_around(config, gpu)
        return {seat.node: Ground(facts=here.facts(gpu), around=around, variables=variables, servers=None)
                for seat in plan.engines}  # fmt: skip
    stack.push_async_callback(workers.close)
    ranks = {node: rank for rank, node in enumerate(plan.slots())}
    facts: list[NodeFacts] = await workers.all("facts", gpu)
    near = all(each.host == host_identity() for each in facts)  # nobody else needs to reach the servers then
    found = {}
    for node in dict.fromkeys(seat.node for seat in plan.engines):
        rank = ranks[node]
        around, variables = await workers.one(rank, "look_around", config, gpu)
        servers = NodeServers(workers, rank, "127.0.0.1" if near else facts[rank].address)
        found[node] = Ground(facts=facts[rank], around=around, variables=variables, servers=servers)
    return found


class EngineNode:
    """On a node: the servers that run there. What ends this process ends them."""

    def __init__(self) -> None:
        self._servers: dict[int, ServerProcess] = {}

    def facts(self, gpu: bool) -> NodeFacts:
        return NodeFacts(host=host_identity(), address=own_address(), gpus=visible_gpus() if gpu else ())

    def look_around(self, config: Config, gpu: bool) -> tuple[Surroundings, dict[str, str | None]]:
        """What there is for a server here, and the variables that it needs. Errors as ``options.look_around``'s."""
        around = look_around(config.generator.engine_python, gpu=gpu)
        return around, server_variables(config, around=around)

    def free_port(self, host: str) -> int:
        return free_port(host)

    def start(
        self, number: int, command: Sequence[str], log: str, env: Mapping[str, str | None], private: str | None
    ) -> None:
        """Starts a server under a number that no other has had.

        Raises:
            EngineError: it cannot be started.
        """
        server = ServerProcess(command, log=Path(log), env=env, private=private)
        server.start()
        self._servers[number] = server

    def forget(self, number: int) -> None:
        self._servers[number].forget()

    async def watch(self, number: int) -> tuple[int | None, str]:
        """Exit status, None while it runs, and the end of the log; answers after WATCH seconds, or when it ends."""
        server, until = self._servers[number], time.monotonic() + WATCH
        while server.returncode is None and time.monotonic() < until:
            await asyncio.sleep(INTERVAL)
        return server.returncode, server.log_tail()

    async def end(self, number: int) -> None:
        await self._servers[number].close()

    async def close(self) -> None:
        await asyncio.gather(*(server.close() for server in self._servers.values()))


class NodeServers:
    """One node, seen from the driver.

    Args:
        workers: of ``EngineNode``.
        rank: which of them.
        address: at which servers there listen.
    """

    _numbers = count()

    def __init__(self, workers: Workers, rank: int, address: str) -> None:
        self.workers, self.rank, self.address = workers, rank, address

    async def free_port(self, host: str) -> int:
        """A port of the node on which nobody listens now.

        Raises:
            EngineError: the node does not answer.
        """
        try:
            async with asyncio.timeout(PATIENCE):
                return int(await self.workers.one(self.rank, "free_port", host))
        except (WorkerError, TimeoutError) as error:
            raise EngineError(f"the node of the engine does not answer: {error or f'{PATIENCE:g} s'}") from error

    def server(
        self, command: Sequence[str], *, log: Path, env: Mapping[str, str | None], private: str | None
    ) -> NodeServer:
        """A server there, not yet started."""
        return NodeServer(self, next(self._numbers), command, log, env, private)


class NodeServer:
    """A server on a node; see ``Server``. Belongs to one event loop."""

    def __init__(
        self,
        node: NodeServers,
        number: int,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str | None],
        private: str | None,
    ) -> None:
        self.log, self._node, self._number = log, node, number
        self._start_with = (list(command), str(log), dict(env), private)
        self._returncode: int | None = None
        self._tail = ""
        self._started = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._background(self._run())

    async def _run(self) -> None:
        try:
            await self._ask("start", *self._start_with)
            self._started.set()
            while self._returncode is None:
                self._returncode, self._tail = await self._ask("watch")
        except EngineError as error:
            self._returncode, self._tail = NOT_STARTED, str(error)
        except WorkerError as error:
            self._returncode, self._tail = NODE_GONE, str(error)
        finally:
            self._started.set()

    @property
    def returncode(self) -> int | None:
        return self._returncode

    def log_tail(self) -> str:
        """As it was at most WATCH seconds ago, or at its end."""
        return self._tail

    def forget(self) -> None:
        self._background(self._forget())

    async def _forget(self) -> None:
        with suppress(WorkerError):  # it went with the node
            await self._ask("forget")

    async def close(self) -> None:
        if self._returncode is None:
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._started.wait()
                    await self._ask("end")
            except (WorkerError, TimeoutError) as error:
                log.warning("a server on %s could not be ended: %s", self._node.address, error or "no answer")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self, verb: str, *args: object) -> Any:
        return await self._node.workers.one(self._node.rank, verb, self._number, *args)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
