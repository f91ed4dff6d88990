"""One script for every engine: the embedded one, SGLang by its address, and several of either as a pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache

import pytest
from sglang_cpu.servers import push

from engines.contract import CHECKS, Rig
from skyrl_train.engines.base import Engine
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.engines.pool import EnginePool
from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.engines.sglang.launch import SGLangServer


def embedded(rig: Rig, request: pytest.FixtureRequest) -> Engine:
    return EmbeddedEngine(rig.model, tokenizer=rig.tokenizer, deterministic=False)


def pooled(rig: Rig, request: pytest.FixtureRequest) -> Engine:
    return EnginePool({"a": embedded(rig, request), "b": embedded(rig, request)}, max_in_flight=8)


@pytest.fixture(scope="module")
def own_weights(sglang_servers: Callable[[str], SGLangServer], rig: Rig) -> Callable[[str], None]:
    """Gives a server the rig's weights, once: other tests may have left others."""

    @cache
    def give(version: str) -> None:
        server = sglang_servers(version)

        async def main() -> None:
            engine = await SGLangEngine.attach(server.url, key=server.key)
            try:
                await push(engine, rig.model, 1)
            finally:
                await engine.close()

        asyncio.run(main())

    return give


async def attach(request: pytest.FixtureRequest, version: str, stream: bool = True) -> Engine:
    server = request.getfixturevalue("sglang_servers")(version)
    return await SGLangEngine.attach(server.url.removeprefix("http://"), key=server.key, stream=stream)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("backend", [embedded, pooled, "sglang 0.5.17", "sglang 0.5.17 at once", "sglang 0.5.21"])
def test_contract(check: Callable, backend: Callable | str, rig: Rig, request: pytest.FixtureRequest) -> None:
    version, stream = "", True
    if isinstance(backend, str):
        version, stream = backend.split()[1], "at once" not in backend
        request.getfixturevalue("own_weights")(version)

    async def main() -> None:
        engine = backend(rig, request) if callable(backend) else await attach(request, version, stream)
        try:
            await check(engine, rig)
        finally:
            await engine.close()

    asyncio.run(main())
