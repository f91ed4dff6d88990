"""Workers: N copies of a plain class, wherever they live. Two verbs.

``Host`` is the process side, the same for both runtimes: one object, one compute thread. Plain methods run on that
thread, one after the other; ``async`` methods run on the event loop and may hand work to the same thread. So an engine
that shares the learner's parameters never computes while the learner does.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from skyrl_train.runtime.place import Place, open_meeting


class Workers(Protocol):
    """Handles to N copies of a class."""

    @property
    def size(self) -> int:
        """N."""
        ...

    async def all(self, method: str, *args: Any) -> list[Any]:
        """Calls ``method(*args)`` on every copy; the answers in rank order.

        Raises:
            WorkerError: a worker died. What the method itself raises passes through.
        """
        ...

    async def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Calls ``method`` on copy i with ``arguments[i]``; the answers in rank order."""
        ...

    async def one(self, rank: int, method: str, *args: Any) -> Any:
        """Calls ``method(*args)`` on copy ``rank``."""
        ...

    async def close(self) -> None:
        """Ends the workers."""
        ...


class Host:
    """One worker object and the thread it computes on."""

    def __init__(self, factory: Callable[..., Any], *args: Any) -> None:
        self._factory, self._args = factory, args
        self._object: Any = None
        self._meeting: Any = None
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")

    def open_meeting(self, host: str) -> tuple[str, int]:
        """Opens the store where the workers of this role meet, in the process of rank 0; it stays open with it."""
        self._meeting, port = open_meeting(host)
        return host, port

    async def start(self, place: Place | None = None) -> None:
        """Builds the object on the compute thread. A factory that takes ``executor`` gets that thread, one that takes
        ``place`` which worker it is."""
        given = {"executor": self._compute, "place": place or Place()}
        taken = inspect.signature(self._factory).parameters
        extra = {name: value for name, value in given.items() if name in taken}
        try:
            self._object = await self._run(lambda: self._factory(*self._args, **extra))
        except BaseException:
            self._compute.shutdown(wait=False, cancel_futures=True)
            raise

    async def call(self, method: str, *args: Any) -> Any:
        """Calls one method of the object."""
        function = getattr(self._object, method)
        if inspect.iscoroutinefunction(function):
            return await function(*args)
        return await self._run(lambda: function(*args))

    async def close(self) -> None:
        """Ends the object, if it has a ``close``, and the thread."""
        try:
            if hasattr(self._object, "close"):
                await self.call("close")
        finally:
            self._compute.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._compute, function)
