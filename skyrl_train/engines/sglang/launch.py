"""``SGLangServer``: a stock SGLang server started by us, with a port, a key and a log of its own."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from skyrl_train.engines.faults import EngineLostError, EngineRefusedError
from skyrl_train.engines.http import ServerClient
from skyrl_train.engines.server_process import PRIVATE, Server, ServerProcess, free_port
from skyrl_train.engines.sglang.causes import PORT_TAKEN, advice, how_it_ended, last_error
from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.engines.sglang.node import NodeServers
from skyrl_train.engines.sglang.options import command_line
from skyrl_train.errors import ConfigError, EngineError, EngineTimeoutError

log = logging.getLogger("skyrl.engines.sglang")

ATTEMPTS = 3
"""Starts, each on another port, when somebody takes the port that was free a moment ago."""
INTERVAL = 0.25
"""Seconds between two looks at a server that starts."""
DEFENCES: dict[str, str | None] = {
    "PYTHONSAFEPATH": "1",  # else a file of the user's working directory may stand in for a package of the server's
    "PYTHONUNBUFFERED": "1",
}


class SGLangServer:
    """Starts a server, waits until it serves, and ends it.

    Args:
        arguments: by SGLang's names. ``host`` and ``port`` may be among them; the port is free and new otherwise.
        log: the file for its output.
        python: of the environment that has SGLang; None: ours.
        env: variables on top of this process's.
        start_timeout: seconds until it must serve.
        node: where it runs; None: on this machine.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        *,
        log: Path,
        python: str | None = None,
        env: Mapping[str, str | None] | None = None,
        start_timeout: float = 1800.0,
        node: NodeServers | None = None,
    ) -> None:
        self.arguments, self.node = dict(arguments), node
        self.host = str(self.arguments.pop("host", node.address if node else "127.0.0.1"))
        self._fixed_port = self.arguments.pop("port", None)
        self.port = 0
        self.log, self.python, self.start_timeout = log, python or sys.executable, start_timeout
        self.env = DEFENCES | dict(env or {})
        given = [self.arguments.pop(name, None) for name in ("admin_api_key", "api_key")]
        self.key = str(given[0] or given[1] or secrets.token_hex(24))
        self._user_file = self.arguments.pop("config", None)
        self.process: Server | None = None

    @property
    def url(self) -> str:
        near = self.node.address if self.node else "127.0.0.1"
        host = near if self.host == "0.0.0.0" else self.host
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Starts the process, on this machine, and returns at once."""
        self._start(free_port(self.host) if self._fixed_port is None else 0)

    def _start(self, free: int) -> None:
        self.port = int(self._fixed_port or free)
        command = [self.python, "-m", "sglang.launch_server", "--config", PRIVATE, "--host", self.host]
        command += ["--port", str(self.port), *command_line(self.arguments)]
        private = self._private()
        if self.node is None:
            self.process = ServerProcess(command, log=self.log, env=self.env, private=private)
        else:
            self.process = self.node.server(command, log=self.log, env=self.env, private=private)
        self.process.start()

    async def _start_there(self) -> None:
        """Starts the process, on its node."""
        if self.node is None:
            self.start()
        else:
            self._start(await self.node.free_port(self.host))

    async def ready(self) -> None:
        """Waits until the server serves; starts it if need be, and again if somebody took its port.

        Raises:
            EngineError: it ended; with the last error of its log, and what to do about it.
            EngineTimeoutError: it does not serve within ``start_timeout``.
        """
        for attempt in range(1, ATTEMPTS + 1):
            if self.process is None:
                await self._start_there()
            try:
                await self._until_it_answers()
                if self.process is not None:
                    self.process.forget()
                return
            except EngineError:
                taken = self.process is not None and PORT_TAKEN.search(self.process.log_tail())
                await self.close()
                if not taken or self._fixed_port is not None or attempt == ATTEMPTS:
                    raise
                log.warning("%s: somebody took the port; trying another", self.url)
            except BaseException:
                await self.close()
                raise

    async def attach(self, **options: Any) -> SGLangEngine:
        """The engine of the server, once that serves. Closing it ends the server. Errors as ``ready``'s."""
        await self.ready()
        try:
            return await SGLangEngine.attach(self.url, key=self.key, on_close=self.close, **options)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Ends the server and everything it started."""
        process, self.process = self.process, None
        if process is not None:
            await process.close()

    async def _until_it_answers(self) -> None:
        assert self.process is not None
        until = time.monotonic() + self.start_timeout
        client = ServerClient(self.url, key=self.key)
        try:
            while True:
                if self.process.returncode is not None:
                    raise EngineError(self._ended(self.process))
                with suppress(EngineLostError, EngineTimeoutError, EngineRefusedError):
                    await client.get("/model_info", deadline=5.0)
                    return
                if time.monotonic() > until:
                    raise EngineTimeoutError(
                        f"{self.url}: does not serve {self.start_timeout:g} s after its start. "
                        f"Last lines of {self.log}: {last_error(self.process.log_tail())}"
                    )
                await asyncio.sleep(INTERVAL)
        finally:
            await client.close()

    def _ended(self, process: Server) -> str:
        log = process.log_tail()
        remedy, ended = advice(log), how_it_ended(process.returncode)
        return (
            f"the SGLang server {self.url} ended with {ended} while it started: {last_error(log)}"
            + (f" -- {remedy}" if remedy else "")
            + f" (log: {self.log})"
        )

    def _private(self) -> str:
        """The file with the key.

        Both keys are set: with an admin key alone, ``/server_info`` would tell it to whoever asks.
        """
        return yaml.safe_dump(self._read_user_file() | {"api-key": self.key, "admin-api-key": self.key})

    def _read_user_file(self) -> dict[str, Any]:
        """SGLang takes one file of options: what the user's says goes into ours."""
        if not self._user_file:
            return {}
        try:
            content = yaml.safe_load(Path(self._user_file).expanduser().read_text(encoding="utf-8")) or {}
            return {str(name).replace("_", "-"): value for name, value in content.items()}
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
            raise ConfigError(
                "generator.engine_init_kwargs.config", self._user_file, f"cannot be read: {error}."
            ) from error
