"""The doors: engines are on the policy's version before anything is generated, and a failed sync is not forgotten."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from skyrl_train.doors import Doors
from skyrl_train.engines.scripted import ScriptedEngine
from skyrl_train.errors import EngineError, WeightSyncError
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.tracker import Tracker
from skyrl_train.weight_sync.direct import DirectSync


class Engine(ScriptedEngine):
    """Notes the versions that it was given; fails while told to."""

    def __init__(self) -> None:
        super().__init__(lambda _: [1])
        self.versions: list[int] = []
        self.broken = False

    async def commit_weights(self, version: int) -> None:
        if self.broken:
            raise EngineError("two requests are in flight")
        self.versions.append(version)
        await super().commit_weights(version)


def doors(engine: Engine, path: Path, version: int = 0) -> Doors:
    return Doors(DirectSync(engine, timeout=5.0), Tracker(RunFolder(path / "run")), version)


def test_engines_follow_the_policy(tmp_path: Path) -> None:
    async def run() -> None:
        engine = Engine()
        d = doors(engine, tmp_path)
        assert await d.enter_generation() == {"weight_sync/version": 0.0}  # also at the start: nothing is assumed
        assert await d.enter_generation() == {}  # evaluation, then training: one sync
        for version in (1, 2):
            await d.enter_training()
            d.learned()
            assert d.version == version and engine.version == version - 1
            assert await d.enter_generation() == {"weight_sync/version": float(version)}
        assert engine.versions == [0, 1, 2]

    asyncio.run(run())


def test_a_resumed_run_starts_on_the_version_of_its_checkpoint(tmp_path: Path) -> None:
    engine = Engine()
    assert asyncio.run(doors(engine, tmp_path, version=7).enter_generation()) == {"weight_sync/version": 7.0}
    assert engine.version == 7


def test_a_failed_sync_is_tried_again_and_never_taken_for_done(tmp_path: Path) -> None:
    async def run() -> None:
        engine = Engine()
        d = doors(engine, tmp_path)
        engine.broken = True
        for _ in range(2):
            with pytest.raises(WeightSyncError, match="in flight"):
                await d.enter_generation()
        engine.broken = False
        assert await d.enter_generation() == {"weight_sync/version": 0.0}

    asyncio.run(run())


def test_the_sync_is_timed(tmp_path: Path) -> None:
    d = doors(Engine(), tmp_path)
    with d.tracker.step(1) as log:
        log(asyncio.run(d.enter_generation()))
    (row,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert '"time/weight_sync"' in row and '"weight_sync/version"' in row
