"""Work beside the event loop and the compute thread, that nobody has to wait for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_background(name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Calls a function on a thread of its own. One that hangs, on a disk say, does not keep the process from ending."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # whoever waits for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


async def beside(name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What the function returns or raises, called ``in_background`` while the event loop goes on."""
    return await asyncio.wrap_future(in_background(name, function, *args, **kwargs))


class Started(Generic[T]):
    """Work that can be started before somebody waits for it, once.

    Args:
        make: the work.
    """

    def __init__(self, make: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._make = make
        self._task: asyncio.Task[T] | None = None

    def start(self) -> asyncio.Task[T]:
        if self._task is None:
            self._task = asyncio.create_task(self._make())
        return self._task

    def __await__(self) -> Generator[Any, None, T]:
        return self.start().__await__()

    async def given_up(self) -> None:
        """Ends it; what it raised is nobody's any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
