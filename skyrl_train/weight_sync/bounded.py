"""Workers whose every call has a deadline: a disk or a GPU that hangs must not hold a weight sync for ever."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from skyrl_train.errors import WorkerError
from skyrl_train.runtime.base import Workers
from skyrl_train.runtime.deadline import within

T = TypeVar("T")
TIMES = 2
"""The deadline, in timeouts of an engine: of a call that both sides wait in, the engine's error says more."""


class BoundedWorkers:
    """The policy's workers, as a weight sync calls them.

    Args:
        timeout: seconds (``generator.weight_sync_timeout``).
    """

    def __init__(self, workers: Workers, timeout: float) -> None:
        self._workers, self._timeout = workers, TIMES * timeout

    @property
    def size(self) -> int:
        return self._workers.size

    async def all(self, method: str, *args: Any) -> list[Any]:
        return await self._within(method, self._workers.all(method, *args))

    async def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return await self._within(method, self._workers.each(method, arguments))

    async def one(self, rank: int, method: str, *args: Any) -> Any:
        return await self._within(f"{method} on rank {rank}", self._workers.one(rank, method, *args))

    async def close(self) -> None:
        await self._workers.close()

    async def _within(self, what: str, answer: Awaitable[T]) -> T:
        """Raises WorkerError when the time is over; what the call itself raises passes through."""

        def late() -> WorkerError:
            return WorkerError(
                f"weight sync: the policy's workers did not finish {what} within {self._timeout:g} s, {TIMES} x "
                "generator.weight_sync_timeout. A GPU, a network or a disk (generator.weight_sync_path) hangs."
            )

        async with within(self._timeout, late):
            return await answer
