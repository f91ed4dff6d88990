"""Links: how packed buckets get from the policy's worker to one engine. Each has its own: none disturbs another.

ipc        handles of shared memory, on one host: CUDA IPC on a GPU, POSIX shared memory on a CPU
broadcast  a process group of the worker and the engine's ranks: NCCL between GPUs, gloo otherwise
disk       a folder that both can read, for what nothing else reaches
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from contextlib import suppress
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from skyrl_train.engines.faults import EngineRefusedError
from skyrl_train.engines.sglang.causes import advice
from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.engines.sglang.payloads import LOADER, Bucket
from skyrl_train.errors import EngineError, WeightSyncError
from skyrl_train.runtime.base import Workers
from skyrl_train.weight_sync.proof import predictable, ranks_of

log = logging.getLogger("skyrl.weight_sync")

GRACE = 5.0
"""Seconds that the server has to answer after its broadcast was given up."""
GROUP = "skyrl"
"""What the servers call the group. Each is in one."""
TAKEN = "already been created"
"""How torch says that there is a group of that name."""
_numbers = count(1)


class Link(ABC):
    """The way to one engine.

    Args:
        workers: the policy's, which have a ``WeightSender``.
        engine: the receiver.
        timeout: seconds for each wait.
        sender: rank of the worker that sends; all of them have packed the bucket.
    """

    name: str

    def __init__(self, workers: Workers, engine: SGLangEngine, timeout: float, sender: int = 0) -> None:
        self.workers, self.engine, self.timeout, self.sender = workers, engine, timeout, sender

    @property
    def reads_own(self) -> bool:
        """Whether the engine can read the sender's own parameters (``weight_sync/own_memory.py``)."""
        return False

    async def open(self) -> None:  # noqa: B027 - optional
        """Makes the way, if it is not there yet."""

    async def prepare(self, index: int) -> None:  # noqa: B027 - optional
        """Before ``send``, when nothing else is on its way."""

    @abstractmethod
    async def send(self, index: int, bucket: Bucket) -> None:
        """Brings one packed bucket over; when this returns, the engine has it and the bucket may go.

        The next one may be sent before.

        Raises:
            EngineError, WeightSyncError: it did not arrive; the engine's weights are then a mixture.
        """

    async def finish(self) -> None:  # noqa: B027 - optional
        """After the last bucket."""

    async def close(self) -> None:  # noqa: B027 - optional
        """Ends what ``open`` made."""


class IpcLink(Link):
    """Shared memory: each of the engine's ranks opens a handle of its own."""

    name = "ipc"

    def __init__(self, workers: Workers, engine: SGLangEngine, timeout: float, sender: int = 0) -> None:
        super().__init__(workers, engine, timeout, sender)
        self._ready: dict[int, tuple[list[str], str]] = {}
        self._directed = LOADER in engine.facts.loaders and predictable(engine.facts)

    @property
    def reads_own(self) -> bool:
        """Of several ranks, all but one would read across GPUs, where converted tensors are fewer bytes."""
        return self._directed and self.engine.facts.tensor_parallel == self.engine.facts.pipeline_parallel == 1

    async def prepare(self, index: int) -> None:
        facts = self.engine.facts
        asked = (self.engine.url, ranks_of(facts), facts.pipeline_parallel, self._directed)
        self._ready[index] = await self.workers.one(self.sender, "weights_share", index, *asked)

    async def send(self, index: int, bucket: Bucket) -> None:
        await self.engine.update_from_tensors(*self._ready.pop(index))


class BroadcastLink(Link):
    """A process group. It stays open between syncs, and is made anew when a broadcast broke."""

    def __init__(
        self,
        workers: Workers,
        engine: SGLangEngine,
        timeout: float,
        backend: str,
        override: str = "auto",
        sender: int = 0,
    ) -> None:
        super().__init__(workers, engine, timeout, sender)
        self.name, self.override = backend, override
        self.group: str | None = None
        self._own = ""
        self._turn = asyncio.Lock()

    async def open(self) -> None:
        if self.group is not None:
            return
        if self.override == "enable":
            await self._clear()
        try:
            await self._join()
        except EngineError as error:
            if TAKEN not in str(error) or self.override == "disable":
                raise
            log.warning("%s still holds a group of an earlier run; it is replaced", self.engine.url)
            await self._clear()
            await self._join()

    async def _join(self) -> None:
        size = 1 + self.engine.facts.tensor_parallel
        host = urlsplit(self.engine.url).hostname or ""
        self._own = f"{GROUP}-{next(_numbers)}"  # on our side several engines' groups live in one process
        address, port = await self.workers.one(
            self.sender, "weights_open_group", self._own, GROUP, self.name, size, self.timeout, host
        )
        self.group = GROUP
        asked = asyncio.create_task(
            self.engine.join_group(address, port, offset=1, world_size=size, name=GROUP, backend=self.name)
        )
        await self._together(asked, asyncio.create_task(self.workers.one(self.sender, "weights_join_group", self._own)))

    async def _clear(self) -> None:
        with suppress(EngineRefusedError):  # there is none
            await self.engine.leave_group(GROUP)

    async def send(self, index: int, bucket: Bucket) -> None:
        async with self._turn:  # both sides must take the buckets in the same order
            await self._broadcast(index, bucket)

    async def _broadcast(self, index: int, bucket: Bucket) -> None:
        if self.group is None:
            raise EngineError(f"{self.engine.url}: an earlier bucket broke off, so bucket {index + 1} was not sent.")
        specs = [(spec.name, str(spec.dtype).removeprefix("torch."), spec.shape) for spec in bucket]
        asked = asyncio.create_task(self.engine.update_from_group(self.group, specs))
        own = self.workers.one(self.sender, "weights_broadcast", index, self._own)
        await self._together(asked, asyncio.create_task(own))

    async def _together(self, asked: asyncio.Task[Any], own: asyncio.Task[Any]) -> None:
        """Both halves of a collective. If one fails the other is made to end too, and the group is given up."""
        try:
            await asyncio.wait((asked, own), return_when=asyncio.FIRST_EXCEPTION)
            if asked.done() and own.done() and not asked.exception() and not own.exception():
                return
            first = next(task for task in (asked, own) if task.done() and task.exception())
            await self.close()
            with suppress(TimeoutError):
                async with asyncio.timeout(GRACE):
                    await asyncio.wait((asked, own))
            error = asked.exception() if asked.done() and not asked.cancelled() else first.exception()
            remedy = advice(str(error))
            if remedy:
                known = next((k for k in (EngineRefusedError, WeightSyncError) if isinstance(error, k)), EngineError)
                raise known(f"{error} -- {remedy}") from error
            raise error or first.exception() or EngineError(f"{self.engine.url}: the broadcast broke off.")
        finally:
            for task in (asked, own):
                task.cancel()
            await asyncio.gather(asked, own, return_exceptions=True)

    async def close(self) -> None:
        name, self.group = self.group, None
        if name is not None:
            self.engine.groups.discard(name)
            await self.workers.one(self.sender, "weights_close_group", self._own)


class DiskLink(Link):
    """A model folder. Several engines read the same one."""

    name = "disk"

    def __init__(self, workers: Workers, engine: SGLangEngine, timeout: float, folder: Folder) -> None:
        super().__init__(workers, engine, timeout)
        self.folder = folder

    async def send(self, index: int, bucket: Bucket) -> None:
        await self.folder.write(self.workers, index)

    async def finish(self) -> None:
        await self.engine.update_from_disk(self.folder.path)


class Folder:
    """Where the buckets of one sync are written, each once."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._written: dict[int, asyncio.Task[None]] = {}

    def begin(self) -> None:
        """A new sync: what was written before is old."""
        self._written.clear()

    async def write(self, workers: Workers, index: int) -> None:
        if index not in self._written:
            self._written[index] = asyncio.create_task(workers.one(0, "weights_write", index, self.path))
        await self._written[index]


def make(
    kind: str,
    workers: Workers,
    engine: SGLangEngine,
    timeout: float,
    folder: Folder,
    override: str = "auto",
    sender: int = 0,
) -> Link:
    """The link of a kind that ``choose`` named."""
    if kind == "ipc":
        return IpcLink(workers, engine, timeout, sender)
    if kind == "disk":
        return DiskLink(workers, engine, timeout, folder)
    return BroadcastLink(workers, engine, timeout, kind, override, sender)
