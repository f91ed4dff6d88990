"""``ServerProcess``: a server of ours as a child process, with its log, which ends whenever we end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from skyrl_train.errors import EngineError

SUPERVISOR = Path(__file__).with_name("supervisor.py")
TAIL = 1 << 16
"""Bytes of the log's end that are looked at."""
DROPPED = ("RAY_RUNTIME_ENV_HOOK",)
"""Variables that a server must not inherit: Ray's uv hook would reinstall the environment in its workers."""


PRIVATE = "{private file}"
"""In a command: the path of a file that only we can read."""


class Server(Protocol):
    """A server of ours, on this machine or on another."""

    log: Path

    def start(self) -> None:
        """Starts it and returns at once; whether it serves is asked over HTTP."""
        ...

    @property
    def returncode(self) -> int | None:
        """The server's exit status; None while it runs, and before it was started."""
        ...

    def log_tail(self) -> str:
        """The end of what this process has written to its log."""
        ...

    def forget(self) -> None:
        """Removes the private file: it has been read."""
        ...

    async def close(self) -> None:
        """Ends the server's whole process group; returns when it has ended."""
        ...


class ServerProcess:
    """A server on this machine.

    Args:
        command: program and arguments.
        private: text of the file that takes the place of PRIVATE in the command: a command line is read by everyone.
        log: file that gets stdout and stderr, appended.
        env: variables on top of this process's; None as a value removes one.
        grace: seconds between TERM and KILL when it is ended.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str | None] | None = None,
        grace: float = 3.0,
        private: str | None = None,
    ) -> None:
        self.command, self.log, self.grace, self.private = list(command), log, grace, private
        self.env = {name: value for name, value in os.environ.items() if name not in DROPPED}
        for name, value in (env or {}).items():
            if value is None:
                self.env.pop(name, None)
            else:
                self.env[name] = value
        self._process: subprocess.Popen[bytes] | None = None
        self._from = 0
        self._private_file: Path | None = None

    def start(self) -> None:
        """Starts it.

        Raises:
            EngineError: the program is not there, or the log cannot be written.
        """
        guard = [sys.executable, "-I", "-S", str(SUPERVISOR), str(os.getpid()), str(self.grace)]
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as log:
                self._from = log.tell()
                self._process = subprocess.Popen(
                    [*guard, *self._whole_command()], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env,
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise EngineError(f"the server cannot be started (log {self.log}): {error}") from error

    @property
    def returncode(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def log_tail(self) -> str:
        with suppress(OSError), self.log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._from, end - TAIL))
            return file.read().decode(errors="replace")
        return ""

    def forget(self) -> None:
        if self._private_file is not None:
            self._private_file.unlink(missing_ok=True)
            self._private_file = None

    def _whole_command(self) -> list[str]:
        if self.private is None:
            return self.command
        descriptor, name = tempfile.mkstemp(prefix="skyrl-engine-", suffix=".yaml")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self.private)
        self._private_file = Path(name)
        return [name if word == PRIVATE else word for word in self.command]

    async def close(self) -> None:
        self.forget()
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        until = time.monotonic() + self.grace + 5.0
        while process.poll() is None and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if process.poll() is None:  # the kernel then kills the server with it
            process.kill()
            process.wait()


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nobody listens now. Somebody else may take it before the server does."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
