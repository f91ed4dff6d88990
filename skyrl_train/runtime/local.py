"""Workers in this process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from skyrl_train.runtime.base import Host
from skyrl_train.runtime.place import Place

SWITCH = 0.0005
"""Seconds for which a thread keeps Python for itself, inside ``quick_turns``. The default, 5 ms, is as long as many a
step of a weight sync."""


@contextmanager
def quick_turns() -> Iterator[None]:
    """While inside, a thread that computes gives way to this process's event loop sooner."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(SWITCH, before))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class LocalWorkers:
    """One copy of a class in this process, on a compute thread of its own."""

    def __init__(self, host: Host) -> None:
        self._hosts = [host]

    @classmethod
    async def start(cls, factory: Callable[..., Any], *args: Any, place: Place | None = None) -> LocalWorkers:
        """Builds the copy. What the factory raises passes through."""
        host = Host(factory, *args)
        await host.start(place)
        return cls(host)

    @property
    def size(self) -> int:
        return len(self._hosts)

    async def all(self, method: str, *args: Any) -> list[Any]:
        return await self.each(method, [args] * self.size)

    async def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        pairs = list(zip(self._hosts, arguments, strict=True))  # a wrong number is found before any call is made
        return list(await asyncio.gather(*(host.call(method, *args) for host, args in pairs)))

    async def one(self, rank: int, method: str, *args: Any) -> Any:
        return await self._hosts[rank].call(method, *args)

    async def close(self) -> None:
        for host in self._hosts:
            await host.close()
