"""The direct transport: commits, or says in which phase, of which engine and version, it failed."""

from __future__ import annotations

import asyncio
import time

import pytest

from skyrl_train.engines.scripted import ScriptedEngine
from skyrl_train.errors import EngineError, EngineTimeoutError, WeightSyncError
from skyrl_train.weight_sync.direct import DirectSync


class Engine(ScriptedEngine):
    """Commits as it is told: at once, never, or with an error."""

    def __init__(self, how: Exception | float) -> None:
        super().__init__(lambda _: [1])
        self.how = how

    async def commit_weights(self, version: int) -> None:
        if isinstance(self.how, Exception):
            raise self.how
        await asyncio.sleep(self.how)
        await super().commit_weights(version)


def sync(engine: Engine, timeout: float = 5.0) -> dict[str, float]:
    return asyncio.run(DirectSync(engine, timeout).sync(3))


def test_after_a_sync_the_engine_reports_the_version() -> None:
    engine = Engine(0.0)
    assert sync(engine) == {"weight_sync/version": 3.0}
    assert engine.version == 3


def test_an_engine_that_does_not_answer_ends_at_the_deadline() -> None:
    engine = Engine(60.0)
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"timed out.*scripted engine.*version 3.*weight_sync_timeout=0\.1 s"):
        sync(engine, timeout=0.1)
    assert time.monotonic() - start < 5 and engine.version == 0


@pytest.mark.parametrize("error", [EngineError("cache is locked"), EngineTimeoutError("no answer within 600 s")])
def test_an_engine_that_fails_is_named_with_its_own_words(error: EngineError) -> None:
    with pytest.raises(WeightSyncError, match="phase commit, scripted engine, version 3") as raised:
        sync(Engine(error))
    assert str(error) in str(raised.value) and raised.value.__cause__ is error


def test_what_is_no_engine_error_passes() -> None:
    with pytest.raises(ZeroDivisionError):
        sync(Engine(ZeroDivisionError()))
