"""Engines that are lost and come back, at every time of a step; the servers are real, and one stands for each start."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from engines.contract import Rig, ask, one
from sglang_cpu.servers import begun

from skyrl_train.engines.sglang.control import MEMORY
from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.errors import EngineError, WeightSyncError
from skyrl_train.weight_sync.recovery import Recovery
from weight_sync.helpers import FAR, Syncing, attach_to, syncing

SOON = 30.0


class Source:
    """Starting an engine anew is attaching to the shared server anew; tests say when that works."""

    host, gpus = "here", ()

    def __init__(self, name: str, attach: Callable[[], Any], *, launched: bool = True) -> None:
        self.name, self.attach, self.launched = name, attach, launched
        self.may_start, self.started, self.stopped = asyncio.Event(), 0, 0
        self.may_start.set()

    async def start(self) -> SGLangEngine:
        await self.may_start.wait()
        self.started += 1
        return await self.attach()

    def died(self) -> str | None:
        return None

    async def stop(self) -> None:
        self.stopped += 1


@asynccontextmanager
async def recovering(
    servers: Any, model: Rig, *, attempts: int = 3, shared: bool = True, **more: Any
) -> AsyncIterator[tuple[Syncing, Recovery, dict[str, Source]]]:
    """``servers``: by the engines' names; one alone is "e"."""
    attach = {name: attach_to(server) for name, server in ({"e": servers} | more.pop("beside", {})).items()}
    async with syncing(model.folder, attach, sleep=shared, **more) as here:
        sources = {name: Source(name, way, launched="around" not in more) for name, way in attach.items()}
        recovery = Recovery(
            here.pool, here.sync, list(sources.values()), attempts=attempts, health_interval=0, share_memory=shared
        )  # pyright: ignore[reportArgumentType]
        recovery.start()
        try:
            yield here, recovery, sources
        finally:
            await recovery.close()


def run(test: Callable[[], Any]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await test()

    asyncio.run(bounded())


async def until(done: Callable[[], Any]) -> None:
    async with asyncio.timeout(SOON):
        while not done():
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("when", ["before the first sync", "while the learner learns", "while it generates"])
def test_the_only_engine_on_the_learners_gpu_comes_back(sglang_server, sglang_model: Rig, when: str) -> None:
    async def main() -> None:
        async with recovering(sglang_server, sglang_model) as (here, recovery, sources):
            if when != "before the first sync":
                await recovery.sync(1)
            if when != "while it generates":
                await recovery.enter_training()
            here.change_policy(0.02 if when != "while it generates" else 0.0)
            here.pool.quarantine("e", "it died")
            if when == "while it generates":
                await until(here.pool.engines)
            else:
                await recovery.sync(2)
            assert sources["e"].started == 1
            (engine,) = here.pool.engines().values()
            assert isinstance(engine, SGLangEngine) and await here.answers_as_the_policy(engine)

    run(main)


def test_where_nothing_starts_the_run_ends(sglang_server, sglang_model: Rig) -> None:
    async def main() -> None:
        async with recovering(sglang_server, sglang_model, attempts=2) as (here, recovery, sources):

            async def fails() -> SGLangEngine:
                raise EngineError("no memory")

            sources["e"].attach = fails
            await recovery.enter_training()
            here.pool.quarantine("e", "it died")
            with pytest.raises(WeightSyncError, match="no engine is left"):
                await recovery.sync(1)
            assert sources["e"].started == 2
            await until(lambda: sources["e"].stopped)

    run(main)


def test_one_lost_in_a_step_without_a_sync_comes_back_with_newer_weights(sglang_server, sglang_model: Rig) -> None:
    async def main() -> None:
        async with recovering(sglang_server, sglang_model, sleep_level=1) as (here, recovery, _):
            await recovery.sync(1)
            await recovery.enter_training()
            here.change_policy()
            await recovery.wake(2)
            assert here.pool.version == 1
            here.pool.quarantine("e", "it died")
            await until(here.pool.engines)
            (engine,) = here.pool.engines().values()
            assert here.pool.version == 2
            assert isinstance(engine, SGLangEngine) and await here.answers_as_the_policy(engine)

    run(main)


def test_beside_others_it_waits_for_the_next_sync_and_wants_it(sglang_servers, sglang_model: Rig) -> None:
    one, other = sglang_servers("0.5.17"), {"b": sglang_servers("0.5.21")}

    async def main() -> None:
        async with recovering(one, sglang_model, beside=other, sleep_level=1) as (here, recovery, _):
            await recovery.sync(1)
            await recovery.enter_training()
            here.change_policy()
            await recovery.wake(2)
            here.pool.quarantine("b", "it died")
            await until(lambda: recovery.wanted)
            assert list(here.pool.engines()) == ["e"] and here.pool.version == 1
            await recovery.enter_training()
            assert here.sync.standing_by["b"].asleep, "what stands by gives its memory to the learner"
            await recovery.sync(2)
            assert sorted(here.pool.engines()) == ["b", "e"] and not recovery.wanted

    run(main)


def test_training_waits_for_a_start_and_ends_what_is_out(sglang_servers, sglang_model: Rig) -> None:
    one, other = sglang_servers("0.5.17"), {"b": sglang_servers("0.5.21")}

    async def main() -> None:
        async with recovering(one, sglang_model, beside=other) as (here, recovery, sources):
            await recovery.sync(1)
            sources["b"].may_start.clear()
            here.pool.quarantine("b", "it died")
            await until(lambda: recovery._starting)
            entering = asyncio.create_task(recovery.enter_training())
            await asyncio.sleep(0.3)
            assert not entering.done()
            sources["b"].may_start.set()
            await entering
            assert all(engine.asleep for engine in here.pool.engines().values())  # pyright: ignore
            here.pool.quarantine("e", "it died")
            await recovery.enter_training()
            assert sources["e"].stopped == 1, "its memory is the learner's"
            for source in sources.values():  # others use these servers too
                again = await source.attach()
                again.asleep = set(MEMORY)
                await again.wake_up()
                await again.client.close()

    run(main)


def test_what_is_given_up_holds_no_request(sglang_server, sglang_model: Rig, caplog) -> None:
    async def main() -> None:
        async with recovering(sglang_server, sglang_model, attempts=0, shared=False) as (here, recovery, sources):
            await recovery.sync(1)
            engine = here.engines["e"]

            async def never(request_ids: Any = None) -> None:
                await asyncio.sleep(3600)

            engine.abort = never  # type: ignore[method-assign]  # as of a server that hangs
            task = asyncio.create_task(here.pool.generate(ask(max_new_tokens=900)))
            await begun(engine)
            here.pool.quarantine("e", "it hangs")
            async with asyncio.timeout(SOON):
                with pytest.raises(EngineError, match="no engine serves"):
                    await task
            await until(lambda: sources["e"].stopped)
            assert recovery.hopeless()

    with caplog.at_level(logging.ERROR):
        run(main)
    assert "engine e is given up: generator.engine_restarts=0 are used up. it hangs" in caplog.text


def test_a_server_that_its_owner_restarted_is_attached_anew(sglang_server, sglang_model: Rig) -> None:
    async def main() -> None:
        async with recovering(sglang_server, sglang_model, shared=False, around=FAR) as (here, recovery, sources):
            await recovery.sync(1)
            other = await attach_to(sglang_server)()
            await other.set_version(0)  # what a new server reports
            await other.client.close()
            here.change_policy()
            await recovery.sync(2)
            assert sources["e"].started == 1, "the old one's group is not called"
            (engine,) = here.pool.engines().values()
            assert isinstance(engine, SGLangEngine) and await here.answers_as_the_policy(engine)
            assert (await one(engine, ask())).weight_version == 2

    run(main)
