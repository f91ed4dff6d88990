"""The process of one local worker: ``python -m skyrl_train.runtime.child FD ROLE FOLDER`` (see ``processes.py``).

Requests come as two pickles over the inherited socket, ``(number, kind)`` and ``args``; answers go back as one,
``(number, good, value)``. When the socket ends, the driver is gone, and this process goes too, whatever it computes.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from skyrl_train.errors import SkyRLError
from skyrl_train.runtime.base import Host


class Child:
    """Answers requests with a host."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()
        self._host: Host | None = None
        self._done = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop,), daemon=True).start()
        await self._done.wait()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while True:
                loop.call_soon_threadsafe(self._take, self._pipe.recv_bytes(), self._pipe.recv_bytes())
        except (EOFError, OSError, RuntimeError):  # the driver is gone, or our own loop has ended
            os._exit(1)

    def _take(self, head: bytes, args: bytes) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(head, args))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, head: bytes, args: bytes) -> None:
        number, kind = pickle.loads(head)
        try:
            self._send(number, True, await self._do(kind, pickle.loads(args)))
        except BaseException as error:  # every kind travels to the driver, which raises it there
            if not isinstance(error, SkyRLError):
                error.add_note("in the worker:\n" + traceback.format_exc())
            self._send(number, False, error)
        if kind == "close":
            self._done.set()

    async def _do(self, kind: str, args: tuple[Any, ...]) -> Any:
        if kind == "make":
            self._host = Host(*args)
            return None
        assert self._host is not None, "make comes first"
        done = getattr(self._host, kind)(*args)  # start, call, close, open_meeting
        return await done if inspect.isawaitable(done) else done

    def _send(self, number: int, good: bool, value: Any) -> None:
        try:
            answer = pickle.dumps((number, good, value), protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # what cannot be pickled raises nearly every kind
            text = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else type(value).__name__
            answer = pickle.dumps((number, False, RuntimeError(f"{text} cannot be sent back: {error}")))
        with self._lock:
            self._pipe.send_bytes(answer)


def main(descriptor: int, role: str, folder: str) -> int:
    from skyrl_train.tracking.logs import setup_logging

    setup_logging(folder=folder or None, role=role)
    asyncio.run(Child(Connection(descriptor)).run())
    return 0


if __name__ == "__main__":
    code = main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    os._exit(code)  # threads of a library (a watchdog, a pool) must not keep a closed worker alive
