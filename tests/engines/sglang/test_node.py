"""Servers that a node starts, watches and ends for us: here the node is a worker of this process."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.engines.server_process import PRIVATE, Server, ServerProcess
from skyrl_train.engines.sglang import node as module
from skyrl_train.engines.sglang.launch import SGLangServer
from skyrl_train.engines.sglang.node import NODE_GONE, NOT_STARTED, EngineNode, NodeServers
from skyrl_train.errors import EngineError, WorkerError
from skyrl_train.runtime.local import LocalWorkers

ECHO = "import pathlib, sys, time; p = pathlib.Path(sys.argv[1]); print('read', p.read_text(), p, flush=True);"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.01)
    monkeypatch.setattr(module, "WATCH", 0.05)


def play(script: Callable[[NodeServers], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        workers = await LocalWorkers.start(EngineNode)
        try:
            return await script(NodeServers(workers, 0, "127.0.0.1"))
        finally:
            await workers.close()

    return asyncio.run(run())


def command(then: str) -> list[str]:
    return [sys.executable, "-c", ECHO + then, PRIVATE]


async def until(server: Server, text: str) -> None:
    end = time.monotonic() + 20
    while text not in server.log_tail():
        assert time.monotonic() < end, server.log_tail()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("near", [True, False])
def test_both_kinds_of_server_keep_one_contract(near: bool, tmp_path: Path) -> None:
    async def script(node: NodeServers) -> None:
        options: Any = {"log": tmp_path / "engine.log", "env": {"SOMETHING": "1"}, "private": "key: secret"}
        words = command("time.sleep(60)")
        server: Server = ServerProcess(words, **options) if near else node.server(words, **options)
        assert server.returncode is None
        server.start()
        await until(server, "read key: secret")
        assert server.returncode is None
        file = Path(server.log_tail().split()[-1])
        assert file.exists() and oct(file.stat().st_mode)[-3:] == "600"
        server.forget()
        end = time.monotonic() + 10
        while file.exists():
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        await server.close()

    play(script)


def test_the_end_of_a_server_comes_with_its_status_and_last_words(tmp_path: Path) -> None:
    async def script(node: NodeServers) -> None:
        options: Any = {"log": tmp_path / "engine.log", "env": {}}
        server = node.server(command("print('no memory'); sys.exit(7)"), private="x", **options)
        server.start()
        await until(server, "no memory")
        while server.returncode is None:
            await asyncio.sleep(0.01)
        assert server.returncode == 7
        await server.close()
        (tmp_path / "file").touch()
        nothing = node.server(["true"], log=tmp_path / "file" / "engine.log", env={}, private=None)
        nothing.start()
        while nothing.returncode is None:
            await asyncio.sleep(0.01)
        assert nothing.returncode == NOT_STARTED and "cannot be started" in nothing.log_tail()

    play(script)


def test_a_server_that_is_closed_at_once_is_ended(tmp_path: Path) -> None:
    async def script(node: NodeServers) -> None:
        server = node.server(command("time.sleep(60)"), log=tmp_path / "engine.log", env={}, private="x")
        server.start()
        await server.close()
        (process,) = node.workers._hosts[0]._object._servers.values()  # type: ignore[attr-defined]
        assert process.returncode is not None

    play(script)


class Gone:
    """A node that is no more."""

    size = 1

    async def one(self, rank: int, method: str, *args: Any) -> Any:
        raise WorkerError("node worker, rank 0, died on node far (10.0.0.2)")


def test_a_node_that_is_gone_is_an_engine_that_failed(tmp_path: Path) -> None:
    async def run() -> None:
        node = NodeServers(Gone(), 0, "10.0.0.2")  # type: ignore[arg-type]
        server = SGLangServer({"model_path": "m"}, log=tmp_path / "engine.log", node=node, start_timeout=5)
        with pytest.raises(EngineError, match=r"the node of the engine does not answer: .* died on node far"):
            await server.attach()
        lost = node.server(["x"], log=tmp_path / "x", env={}, private=None)
        lost.start()
        await asyncio.sleep(0.01)
        assert lost.returncode == NODE_GONE != NOT_STARTED and "died on node far" in lost.log_tail()
        await lost.close()

    asyncio.run(run())


def test_where_a_server_listens() -> None:
    node = NodeServers(Gone(), 0, "10.0.0.2")  # type: ignore[arg-type]
    assert SGLangServer({}, log=Path("x"), node=node).url == "http://10.0.0.2:0"
    assert SGLangServer({"host": "0.0.0.0"}, log=Path("x"), node=node).url == "http://10.0.0.2:0"
    assert SGLangServer({"host": "10.9.9.9", "port": 5}, log=Path("x"), node=node).host == "10.9.9.9"
    assert SGLangServer({}, log=Path("x")).url == "http://127.0.0.1:0"
