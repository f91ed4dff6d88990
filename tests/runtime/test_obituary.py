"""Of two workers that wait for each other, the one that died is named, also where the other one tells first."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from skyrl_train.errors import WorkerError
from skyrl_train.runtime.processes import ProcessWorkers


class Peer:
    def leave(self, after: float, dies: bool) -> None:
        time.sleep(after)
        if dies:
            os._exit(9)
        raise RuntimeError("Connection closed by peer")


def told(*ways: tuple[float, bool]) -> BaseException:
    async def main() -> BaseException:
        workers = await ProcessWorkers.start(Peer, role="policy", count=len(ways))
        try:
            with pytest.raises((WorkerError, RuntimeError)) as caught:
                await workers.each("leave", list(ways))
            return caught.value
        finally:
            await workers.close()

    return asyncio.run(main())


def test_the_dead_one_is_named() -> None:
    error = told((0.0, False), (0.5, True))
    assert isinstance(error, WorkerError) and "policy worker, rank 1, died" in str(error)


def test_an_error_of_the_living_is_told_as_it_is() -> None:
    assert str(told((0.0, False), (0.1, False))) == "Connection closed by peer"
