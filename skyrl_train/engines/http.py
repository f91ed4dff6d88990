"""``ServerClient``: one HTTP client for one inference server. Every call has a deadline; no call is ever repeated.

    generate, stream    on pooled connections: thousands at a time, idle ones dropped before the server drops them
    get, post, ...      on connections that serve calls close upon each other, such as a weight sync's: uvicorn closes
                        idle ones after 5 s, and a control call must not meet that

Errors name the address, the path, and what the server said.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson

from skyrl_train.engines.base import Completion
from skyrl_train.engines.faults import EngineLostError, EngineRefusedError
from skyrl_train.errors import EngineError, EngineTimeoutError

IDLE = 3.0
"""Seconds after which an unused pooled connection is closed: less than the 5 s of uvicorn."""
CONTROL_IDLE = 1.0
"""The same for control calls."""
CONNECT = 10.0
"""Seconds for a TCP connection."""
QUOTED = 500
"""Characters of a server's answer that an error quotes."""


def normalize_url(url: str) -> str:
    """``10.0.0.1:8000`` and ``http://10.0.0.1:8000/`` are the same server."""
    return (url if "://" in url else f"http://{url}").rstrip("/")


class ServerClient:
    """Speaks to one server, in one event loop.

    Args:
        url: with or without ``http://``.
        key: sent as the bearer token with every call.
    """

    def __init__(self, url: str, *, key: str | None = None) -> None:
        self.url = normalize_url(url)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pooled: aiohttp.ClientSession | None = None
        self._control: aiohttp.ClientSession | None = None
        self._retired: list[aiohttp.ClientSession] = []
        self._final = False
        self._scopes: set[asyncio.Timeout] = set()
        self._broken: set[asyncio.Timeout] = set()

    async def get(self, path: str, *, deadline: float) -> Any:
        """The JSON at ``path``. See ``post`` for what is raised."""
        return await self._ask("GET", path, None, deadline)

    async def post(self, path: str, body: Any = None, *, deadline: float) -> Any:
        """The JSON that a control call answers, or its text.

        Raises:
            EngineTimeoutError: no answer within ``deadline`` seconds; the call may have had its effect.
            EngineRefusedError: 4xx.
            EngineLostError: 5xx, or the connection failed.
        """
        return await self._ask("POST", path, body, deadline)

    async def exists(self, path: str, *, deadline: float) -> bool:
        """Whether the server has an endpoint there. Asks by OPTIONS, which runs nothing and needs no key."""
        async with self._call("OPTIONS", path, None, deadline, self._sessions()[1]) as response:
            return response.status != 404

    async def generate(self, path: str, body: Any, *, deadline: float) -> Any:
        """The JSON of one generation. Errors as ``post``'s."""
        async with self._call("POST", path, body, deadline, self._sessions()[0]) as response:
            content = await response.read()
            self._check(response, path, content)
            return orjson.loads(content)

    async def stream(self, path: str, body: Any, *, deadline: float) -> AsyncGenerator[Any, None]:
        """The events of one generation as they come, each parsed. Errors as ``post``'s."""
        async with self._call("POST", path, body, deadline, self._sessions()[0]) as response:
            if response.status != 200:
                self._check(response, path, await response.read())
            rest, done = b"", False
            async for data in response.content.iter_any():  # readline refuses long lines
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    text = event.strip().removeprefix(b"data:").strip()
                    if text == b"[DONE]":
                        done = True  # read on to the end, so that the connection can be used again
                    elif text:
                        yield orjson.loads(text)
            if not done:
                raise EngineLostError(f"{self.url}{path}: the answer broke off.")

    async def close(self, *, final: bool = False) -> None:
        """Closes every connection; calls in flight raise EngineLostError.

        Args:
            final: later calls raise it too; else the client may be used again.
        """
        self._final = self._final or final
        for scope in self._scopes:  # a reader of a closed aiohttp session would wait for ever
            self._broken.add(scope)
            scope.reschedule(0.0)
        await asyncio.sleep(0)
        sessions = [self._pooled, self._control, *self._retired]
        self._pooled, self._control, self._retired = None, None, []
        for session in sessions:
            if session is not None:
                await session.close()

    async def _ask(self, method: str, path: str, body: Any, deadline: float) -> Any:
        async with self._call(method, path, body, deadline, self._sessions()[1]) as response:
            content = await response.read()
            self._check(response, path, content)
        try:
            return orjson.loads(content)
        except ValueError:
            return content.decode(errors="replace")

    @asynccontextmanager
    async def _call(
        self, method: str, path: str, body: Any, deadline: float, session: aiohttp.ClientSession
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request; whatever goes wrong with it becomes an error of ours."""
        data = None if body is None else orjson.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        scope = asyncio.timeout(deadline)
        self._scopes.add(scope)
        try:
            async with (
                scope,
                session.request(method, self.url + path, data=data, headers=headers) as response,
            ):
                if response.status >= 500:
                    self._retire(session)
                yield response
        except EngineError:
            raise
        except aiohttp.ClientConnectorError as error:
            raise EngineLostError(f"{self.url}{path}: cannot connect: {error}", Completion()) from error
        except TimeoutError as error:
            if scope in self._broken:
                raise EngineLostError(f"{self.url}{path}: the connection was closed on this side.") from error
            raise EngineTimeoutError(f"{self.url}{path}: no answer within {deadline:g} s.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLostError(
                f"{self.url}{path}: the connection failed: {type(error).__name__}: {error}"
            ) from error
        except ValueError as error:  # JSON that is none
            raise EngineLostError(f"{self.url}{path}: the answer cannot be read: {error}") from error
        finally:
            self._scopes.discard(scope)
            self._broken.discard(scope)

    def _check(self, response: aiohttp.ClientResponse, path: str, content: bytes) -> None:
        if response.status == 200:
            return
        kind = EngineRefusedError if 400 <= response.status < 500 else EngineLostError
        raise kind(f"{self.url}{path}: HTTP {response.status}: {said(content)}")

    def _retire(self, session: aiohttp.ClientSession) -> None:
        """After a failure uvicorn closes the connection without saying so, and a request sent on it would be lost: the
        next ones get new connections. What runs on the old ones goes on there.
        """
        if session is self._pooled:
            self._pooled = self._session(IDLE)
        elif session is self._control:
            self._control = self._session(CONTROL_IDLE)
        else:
            return
        self._retired.append(session)

    def _session(self, idle: float) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=idle)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT)
        return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)

    def _sessions(self) -> tuple[aiohttp.ClientSession, aiohttp.ClientSession]:
        loop = asyncio.get_running_loop()
        if self._final:
            raise EngineLostError(f"{self.url}: the connection was closed on this side.", Completion())
        if self._pooled is None or self._control is None:
            self._loop = loop
            self._pooled, self._control = self._session(IDLE), self._session(CONTROL_IDLE)
        elif loop is not self._loop:
            raise EngineError(f"{self.url}: the client belongs to another event loop; close it there first.")
        return self._pooled, self._control


def said(content: bytes) -> str:
    """What a server said, in one short line: the message inside JSON where there is one."""
    text = content.decode(errors="replace")
    try:
        found: Any = orjson.loads(content)
        while isinstance(found, dict):
            found = next((found[k] for k in ("error", "message", "error_message", "detail") if k in found), str(found))
        text = str(found)
    except ValueError:
        pass
    line = " ".join(text.split()) or "(no text)"
    return line if len(line) <= QUOTED else line[:QUOTED] + " ..."
