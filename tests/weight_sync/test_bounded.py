"""Calls of a weight sync that hang on the learner's side."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from skyrl_train.errors import WorkerError
from skyrl_train.runtime.local import LocalWorkers
from skyrl_train.weight_sync.bounded import BoundedWorkers


class Worker:
    def write(self, seconds: float) -> str:
        time.sleep(seconds)
        return "written"

    def fail(self) -> None:
        raise TimeoutError("its own")


def test_a_call_that_hangs_is_told_with_its_deadline() -> None:
    async def main() -> Any:
        workers = await LocalWorkers.start(Worker)
        bounded = BoundedWorkers(workers, 0.1)
        try:
            assert bounded.size == 1 and await bounded.all("write", 0.0) == ["written"]
            assert await bounded.each("write", [(0.0,)]) == ["written"]
            with pytest.raises(TimeoutError, match="its own"):
                await bounded.one(0, "fail")
            with pytest.raises(WorkerError, match=r"write on rank 0 within 0\.2 s, 2 x generator\.weight_sync_timeout"):
                await bounded.one(0, "write", 1.0)
        finally:
            await workers.close()

    asyncio.run(main())
