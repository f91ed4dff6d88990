"""A TCP proxy before a server, which can be told to fail as networks and servers do."""

from __future__ import annotations

import asyncio
from contextlib import suppress

ERROR = b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\nconnection: close\r\n\r\noops"
ENOUGH = 700
"""Bytes of an answer after which a connection is dropped."""


class FlakyProxy:
    """Passes everything on, unless ``mode`` is set.

    "pass"   as a wire does
    "500"    answers every request for a completion with an error
    "drop"   breaks off every completion in the middle
    """

    def __init__(self, target: int) -> None:
        self.target, self.mode, self.url = target, "pass", ""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(cls, target: int) -> FlakyProxy:
        proxy = cls(target)
        proxy._server = await asyncio.start_server(proxy._connected, "127.0.0.1", 0)
        proxy.url = f"http://127.0.0.1:{proxy._server.sockets[0].getsockname()[1]}"
        return proxy

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        state = {"completion": False}
        tasks = [
            asyncio.create_task(self._requests(reader, back, writer, state)),
            asyncio.create_task(self._answers(there, writer, state)),
        ]
        self._tasks.update(tasks)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
                self._tasks.discard(task)
            for end in (writer, back):
                with suppress(OSError):
                    end.close()

    async def _requests(
        self, reader: asyncio.StreamReader, back: asyncio.StreamWriter, writer: asyncio.StreamWriter, state: dict
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if data.startswith((b"POST", b"GET", b"OPTIONS")):
                    state["completion"] = data.startswith(b"POST /generate")
                if self.mode == "500" and state["completion"]:
                    writer.write(ERROR)
                    await writer.drain()
                    return
                back.write(data)
                await back.drain()

    async def _answers(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, state: dict) -> None:
        passed = 0
        with suppress(OSError):
            while data := await there.read(1 << 16):
                writer.write(data)
                await writer.drain()
                passed += len(data)
                if self.mode == "drop" and state["completion"] and passed > ENOUGH:
                    return
