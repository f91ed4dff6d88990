"""``Delivery``: one pass of the transaction over some engines, side by side. An engine that fails drops out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.errors import EngineError, SkyRLError, WeightSyncError, WorkerError


class Delivery:
    """Who still takes part, who does not and why, and how long each phase took.

    Args:
        engines: by name.
        version: that is delivered.
        timeout: ``generator.weight_sync_timeout``, for the messages.
    """

    def __init__(self, engines: Mapping[str, SGLangEngine], version: int, timeout: float) -> None:
        self.engines = dict(engines)
        self.version, self.timeout = version, timeout
        self.failed: dict[str, SkyRLError] = {}
        self.seconds: dict[str, float] = {}

    async def each(
        self, phase: str, call: Callable[[str, SGLangEngine], Awaitable[Any]], *, detail: str = "", timed: bool = True
    ) -> dict[str, Any]:
        """Calls every engine that takes part; what came back, by name.

        Args:
            phase: for messages and times: several calls of one name add up.
            detail: such as ``bucket 2 of 5``, for messages.
            timed: False where the caller takes the time, since calls overlap.
        """
        begun = time.monotonic()
        engines = dict(self.engines)
        results = await asyncio.gather(*(call(*pair) for pair in engines.items()), return_exceptions=True)
        if timed:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begun
        answers = {}
        for (name, engine), result in zip(engines.items(), results, strict=True):
            if isinstance(result, BaseException):
                if name not in self.engines and isinstance(result, EngineError | WeightSyncError):
                    continue  # another call, side by side with this one, has failed before
                self._drop(name, engine, phase, detail, result)
            else:
                answers[name] = result
        return answers

    def drop(self, name: str, error: SkyRLError) -> None:
        """Takes an engine out."""
        self.engines.pop(name, None)
        self.failed[name] = error

    def _drop(self, name: str, engine: SGLangEngine, phase: str, detail: str, error: BaseException) -> None:
        if not isinstance(error, EngineError | WeightSyncError) or isinstance(error, WorkerError):
            raise error  # a fault of ours, a dead worker, or the end of the run
        if isinstance(error, WeightSyncError) and str(error).startswith(engine.url):
            self.drop(name, error)  # it says which engine by itself: a proof
            return
        where = f"phase {phase}{f', {detail}' if detail else ''}, engine {engine.url}"
        late = isinstance(error, TimeoutError) or "timed out" in str(error)
        begin = f"Weight sync timed out in {where}" if late else f"weight sync failed in {where}"
        bound = f" Each wait is bounded by generator.weight_sync_timeout={self.timeout:g} s." if late else ""
        wrapped = WeightSyncError(f"{begin}, version {self.version}: {error}{bound}")
        wrapped.__cause__ = error
        self.drop(name, wrapped)
