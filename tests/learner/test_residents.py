"""Who is on the GPU when: told by what the workers are asked, in order."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from skyrl_train.errors import WorkerError
from skyrl_train.learner.policy import Handle
from skyrl_train.learner.residents import Residents
from skyrl_train.runtime.local import LocalWorkers

asked: list[str] = []


class Model:
    """Notes what it is asked for; 10 bytes are moved each time."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _note(self, what: str) -> int:
        asked.append(f"{self.name} {what}")
        return 10

    def offload(self) -> int:
        return self._note("off")

    def onload(self) -> int:
        return self._note("on")

    def make_room(self) -> int:
        return self._note("lean")


def test_each_phase_has_those_that_it_needs() -> None:
    async def run() -> dict[str, Any]:
        workers = [await LocalWorkers.start(Model, name) for name in ("policy", "ref")]
        residents = Residents(Handle(workers[0]), 60.0)
        residents.add(Handle(workers[1]))
        for phase in (residents.nobody, residents.policy_only, residents.everybody):
            await phase()
            asked.append("-")
        for each in workers:
            await each.close()
        return residents.metrics() | {"again": residents.metrics()}

    asked.clear()
    metrics = asyncio.run(run())
    phases = [sorted(part.split(", ")) for part in ", ".join(asked).split(", -")]
    assert phases[0] == ["policy off", "ref off"]
    assert asked[3:6] == ["ref off", "policy lean", "policy on"]
    assert sorted(asked[7:9]) == ["policy on", "ref on"]
    assert metrics["memory/offload_GB"] == 4e-8 and metrics["memory/onload_GB"] == 3e-8 and metrics["again"] == {}
    assert metrics["memory/offload_s"] >= 0


def test_a_move_that_hangs_is_told() -> None:
    class Hangs(Model):
        async def offload(self) -> int:  # type: ignore[override]
            await asyncio.sleep(30)
            return 0

    async def run() -> None:
        workers = await LocalWorkers.start(Hangs, "policy")
        with pytest.raises(
            WorkerError, match=r"did not finish offload .* within 0\.2 s \(trainer\.collective_timeout\)"
        ):
            await Residents(Handle(workers), 0.2).nobody()
        await workers.close()

    asyncio.run(run())
