"""The HTTP client against a server that misbehaves on purpose, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from skyrl_train.engines import http
from skyrl_train.engines.faults import EngineLostError, EngineRefusedError
from skyrl_train.engines.http import ServerClient, normalize_url, said
from skyrl_train.engines.server_process import free_port
from skyrl_train.errors import EngineError, EngineTimeoutError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def serve(handler: Handler, play: Callable[[ServerClient], Awaitable[Any]], keepalive: float = 5.0) -> Any:
    """Runs ``play`` with a client of a server that answers every path by ``handler``."""

    async def main() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, keepalive_timeout=keepalive, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        client = ServerClient(f"127.0.0.1:{runner.addresses[0][1]}", key="k3y")
        try:
            return await play(client)
        finally:
            await client.close()
            await runner.cleanup()

    return asyncio.run(main())


def test_addresses() -> None:
    for text in ("h:1", "http://h:1", "http://h:1/"):
        assert normalize_url(text) == "http://h:1"
    assert normalize_url("https://h/v") == "https://h/v"


def test_json_goes_there_and_back_with_the_key() -> None:
    async def echo(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer k3y"
        return web.json_response({"path": request.path, "got": await request.json() if request.can_read_body else None})

    async def play(client: ServerClient) -> None:
        assert await client.post("/a", {"x": [1, "é"]}, deadline=5) == {"path": "/a", "got": {"x": [1, "é"]}}
        assert await client.generate("/b", [1], deadline=5) == {"path": "/b", "got": [1]}
        assert (await client.get("/c", deadline=5))["path"] == "/c"
        assert await client.exists("/d", deadline=5)

    serve(echo, play)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, EngineRefusedError), (404, EngineRefusedError), (500, EngineLostError), (503, EngineLostError)],
)
def test_a_failure_names_the_address_the_path_and_what_was_said(status: int, kind: type[EngineError]) -> None:
    async def fail(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "out of paper"}}, status=status)

    async def play(client: ServerClient) -> None:
        for call in (client.post("/a", {}, deadline=5), client.generate("/a", {}, deadline=5), drain(client, "/a")):
            with pytest.raises(kind, match=f"http://127.0.0.1:[0-9]+/a: HTTP {status}: out of paper"):
                await call

    serve(fail, play)


async def drain(client: ServerClient, path: str, deadline: float = 5) -> list[Any]:
    return [event async for event in client.stream(path, {}, deadline=deadline)]


def test_a_hanging_server_is_given_up_in_time() -> None:
    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    async def play(client: ServerClient) -> None:
        for call in (client.post("/slow", {}, deadline=0.1), drain(client, "/slow", 0.1)):
            with pytest.raises(EngineTimeoutError, match=r"/slow: no answer within 0\.1 s"):
                await call

    serve(hang, play)


async def stall(request: web.Request) -> web.StreamResponse:
    """Begins an answer and does not end it."""
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b'data: {"n": 1}\n\n')
    await asyncio.sleep(30)
    return response


def test_a_server_that_stops_in_the_middle_of_its_answer_is_given_up_too() -> None:
    with pytest.raises(EngineTimeoutError):
        serve(stall, lambda client: drain(client, "/generate", 0.2))


def test_closing_ends_calls_in_flight() -> None:
    async def play(client: ServerClient) -> None:
        tasks = [asyncio.create_task(drain(client, "/generate", 30)) for _ in range(3)]
        tasks.append(asyncio.create_task(client.post("/slow", {}, deadline=30)))
        await asyncio.sleep(0.2)
        await client.close()
        async with asyncio.timeout(2):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, EngineLostError) and "closed on this side" in str(r) for r in results), results

    serve(stall, play)


def test_nobody_listens() -> None:
    async def main() -> None:
        client = ServerClient(f"http://127.0.0.1:{free_port()}")
        with pytest.raises(EngineLostError, match="cannot connect") as raised:
            await client.generate("/generate", {}, deadline=5)
        assert raised.value.partial is not None and raised.value.partial.token_ids == []  # it certainly never ran
        await client.close()

    asyncio.run(main())


def test_a_dropped_connection_is_neither_repeated_nor_taken_for_nothing() -> None:
    calls = []

    async def drop(request: web.Request) -> web.Response:
        calls.append(request.path)
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async def play(client: ServerClient) -> None:
        for call in (client.generate("/generate", {}, deadline=5), client.post("/control", {}, deadline=5)):
            with pytest.raises(EngineLostError, match="connection failed") as raised:
                await call
            assert raised.value.partial is None

    serve(drop, play)
    assert calls == ["/generate", "/control"]


def events(*chunks: bytes) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(0.01)
        return response

    return handler


def test_events_come_whole_however_they_are_cut() -> None:
    big = {"text": "x" * 300_000}  # longer than any line buffer
    line = b"data: " + json.dumps(big).encode() + b"\n\n"
    handler = events(b'data: {"n"', b": 1}\n", b'\ndata: {"n": 2}\n\n' + line[:1000], line[1000:], b"data: [DONE]\n\n")
    assert serve(handler, lambda client: drain(client, "/g")) == [{"n": 1}, {"n": 2}, big]


def test_an_answer_that_breaks_off_is_noticed() -> None:
    with pytest.raises(EngineLostError, match="broke off"):
        serve(events(b'data: {"n": 1}\n\n'), lambda client: drain(client, "/g"))
    with pytest.raises(EngineLostError, match="cannot be read"):
        serve(events(b"data: {oops}\n\n"), lambda client: drain(client, "/g"))


def test_calls_close_upon_each_other_share_a_connection(monkeypatch) -> None:
    """A control call that comes later gets a new one: uvicorn closes those that were idle."""
    monkeypatch.setattr(http, "CONTROL_IDLE", 0.2)
    peers: dict[str, list[object]] = {"/generate": [], "/control": []}

    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        peers[request.path].append(request.transport.get_extra_info("peername"))
        return await events(b"data: 1\n\ndata: [DONE]\n\n")(request)

    async def play(client: ServerClient) -> None:
        for pause in (0.0, 0.0, 0.4):
            await asyncio.sleep(pause)
            await drain(client, "/generate")
            await client.post("/control", {}, deadline=5)

    serve(handler, play)
    assert len(set(peers["/generate"])) == 1
    first, second, third = peers["/control"]
    assert first == second != third


@pytest.mark.parametrize("call", ["generate", "post"])
def test_a_connection_is_not_used_again_after_a_failure(call: str) -> None:
    """uvicorn closes it without saying so, and the next request on it would be lost."""
    peers = []

    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        peers.append(request.transport.get_extra_info("peername"))
        return web.json_response({}, status=500 if len(peers) == 1 else 200)

    async def play(client: ServerClient) -> None:
        with pytest.raises(EngineLostError):
            await getattr(client, call)("/g", {}, deadline=5)
        await getattr(client, call)("/g", {}, deadline=5)

    serve(handler, play)
    assert len(set(peers)) == 2


def test_one_client_belongs_to_one_loop() -> None:
    async def ok(request: web.Request) -> web.Response:
        return web.json_response({})

    async def play(client: ServerClient) -> None:
        await client.get("/", deadline=5)
        with pytest.raises(EngineError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, client.get("/", deadline=5))

    serve(ok, play)


def test_what_a_server_said() -> None:
    assert said(b'{"error": {"message": "a\\n b"}}') == "a b"
    assert said(b'{"success": false, "message": "no"}') == "no" and said(b'{"detail": "x"}') == "x"
    assert said(b"") == "(no text)" and said(b"plain") == "plain" and said(b"[1]") == "[1]"
    assert len(said(b"y" * 9999)) < 600
