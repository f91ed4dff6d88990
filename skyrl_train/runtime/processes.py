"""Workers as processes on this machine, without Ray: one for each GPU, or several on a CPU.

Each is a process of its own (``child.py``) that is spoken to over a socket pair. It holds the same ``Host`` as the
other runtimes, so the arithmetic is the same. If the driver goes away, by SIGKILL too, its workers end with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from skyrl_train.errors import SkyRLError, WorkerError
from skyrl_train.runtime.place import Place

log = logging.getLogger("skyrl.runtime")

START_TIMEOUT = 300.0
"""Seconds until a process must have answered for the first time: it loads Python and our runtime, no model."""
CLOSE_TIMEOUT = 10.0
"""Seconds that a worker has to end its object before its process is killed."""
OBITUARY = 2.0
"""Seconds in which a worker's death shows, once another has told of an error that may come from it."""
TAIL = 4000
"""Bytes of a dead worker's output that are looked at for its last words."""
LINES = 8


class ProcessWorkers:
    """Copies of a class, one process each."""

    def __init__(self, children: list[_Process]) -> None:
        self._children = children

    @classmethod
    async def start(
        cls,
        factory: Callable[..., Any],
        *args: Any,
        role: str,
        count: int = 1,
        first_device: int = 0,
        folder: Path | None = None,
        timeout: float = START_TIMEOUT,
    ) -> ProcessWorkers:
        """Starts ``count`` processes and builds their objects.

        Args:
            factory: makes the object, on the process's compute thread; of a module, as it travels by its name.
            role: names the workers in errors and in their logs.
            first_device: the GPU of rank 0; the others follow.
            folder: the run folder, where each process writes a log of its own.
            timeout: seconds until each process must have answered.

        Raises:
            WorkerError: one died while starting, or did not answer. What the factory raises passes through.
        """
        workers = cls([_Process(role, rank, folder) for rank in range(count)])
        try:
            making = [child.ask("make", factory, *args) for child in workers._children]
            await workers._within(timeout, asyncio.gather(*making))
            meeting = await workers._children[0].ask("open_meeting", "127.0.0.1") if count > 1 else None
            places = [
                Place(rank=rank, size=count, device_index=first_device + rank, meeting=meeting) for rank in range(count)
            ]
            pairs = zip(workers._children, places, strict=True)
            await asyncio.gather(*(child.ask("start", place) for child, place in pairs))
        except BaseException:
            workers._kill()
            raise
        return workers

    async def _within(self, seconds: float, answers: Any) -> None:
        try:
            async with asyncio.timeout(seconds):
                await answers
        except TimeoutError as error:
            role = self._children[0].role
            raise WorkerError(
                f"the {role} workers' processes did not answer within {seconds:g} s "
                "(trainer.placement.worker_start_timeout)."
            ) from error

    @property
    def size(self) -> int:
        return len(self._children)

    async def all(self, method: str, *args: Any) -> list[Any]:
        packed = pack((method, *args))
        return await self._together([child.ask_packed("call", packed) for child in self._children])

    async def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        pairs = list(zip(self._children, arguments, strict=True))  # a wrong number is found before any call is made
        calls = [child.ask("call", method, *args) for child, args in pairs]
        return await self._together(calls)

    async def _together(self, calls: Sequence[Awaitable[Any]]) -> list[Any]:
        """All answers. Of a worker that died the others may tell first, that a connection was closed, and not whose."""
        try:
            return list(await asyncio.gather(*calls))
        except SkyRLError:
            raise
        except Exception as error:
            until = time.monotonic() + (OBITUARY if self.size > 1 else 0.0)
            while time.monotonic() < until:
                for child in self._children:
                    if child.gone is not None:
                        raise child.gone from error
                await asyncio.sleep(0.05)
            raise

    async def one(self, rank: int, method: str, *args: Any) -> Any:
        return await self._children[rank].ask("call", method, *args)

    async def close(self) -> None:
        """Ends the objects, then the processes: dead or hung ones within CLOSE_TIMEOUT."""
        closing = [child.ask("close") for child in self._children]
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await asyncio.gather(*closing)
        except (WorkerError, TimeoutError) as error:
            log.warning("%s workers did not close by themselves: %s", self._children[0].role, error or "no answer")
        finally:
            self._kill()

    def _kill(self) -> None:
        for child in self._children:
            child.kill()


class _Process:
    """One child process: what was asked, and who waits for the answer."""

    def __init__(self, role: str, rank: int, folder: Path | None) -> None:
        self.role, self.rank = role, rank
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._loop = asyncio.get_running_loop()
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self.gone: WorkerError | None = None
        self._output = self._open_output(folder)
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "skyrl_train.runtime.child", str(theirs.fileno()), f"{role}-{rank}"]
            self._process = subprocess.Popen(
                [*command, "" if folder is None else str(folder)], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT, env=_environment(),
            )  # fmt: skip
        self._pipe = Connection(ours.detach())
        threads = [threading.Thread(target=work, daemon=True) for work in (self._write, self._read)]
        for thread in threads:
            thread.start()
        self._reader = threads[-1]

    def _open_output(self, folder: Path | None) -> Any:
        if folder is None:
            return tempfile.TemporaryFile()
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        return (folder / "logs" / f"{self.role}-{self.rank}.out").open("w+b")

    def ask(self, kind: str, *args: Any) -> asyncio.Future[Any]:
        """Sends a request; requests arrive in the order in which they were made. The answer is awaited."""
        return self.ask_packed(kind, pack(args))

    def ask_packed(self, kind: str, args: bytes) -> asyncio.Future[Any]:
        """``ask`` with arguments that were pickled already, once for all workers."""
        number, answer = next(self._numbers), self._loop.create_future()
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # not everyone's is awaited
        if self.gone is not None:
            answer.set_exception(self.gone)
            return answer
        self._waiting[number] = answer
        self._outbox.put(pack((number, kind)))
        self._outbox.put(args)
        return answer

    def _write(self) -> None:
        """On a thread of its own, as a large batch takes a while."""
        with suppress(OSError):  # a broken pipe is met by the reader too, which tells everyone
            while (message := self._outbox.get()) is not None:
                self._pipe.send_bytes(message)

    def _read(self) -> None:
        """On a thread of its own: answers, until the process is gone."""
        with suppress(EOFError, OSError):
            while True:
                number, good, value = pickle.loads(self._pipe.recv_bytes())
                self._tell(self._settle, number, good, value)
        self._process.wait()
        self._outbox.put(None)
        gone = WorkerError(self._obituary())
        self._output.close()
        self._pipe.close()
        self._tell(self._give_up, gone)

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody waits any more
            self._loop.call_soon_threadsafe(function, *args)

    def _settle(self, number: int, good: bool, value: Any) -> None:
        answer = self._waiting.pop(number, None)
        if answer is None or answer.done():
            return
        if good:
            answer.set_result(value)
        else:
            answer.set_exception(value)

    def _give_up(self, gone: WorkerError) -> None:
        self.gone = gone
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(self.gone)

    def _obituary(self) -> str:
        code = self._process.returncode
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with status {code}"
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - TAIL))
        lines = [line for line in self._output.read().decode(errors="replace").splitlines() if line.strip()]
        words = "\n  ".join(lines[-LINES:])
        return (
            f"{self.role} worker, rank {self.rank}, died: its process {self._process.pid} on {platform.node()} ended "
            f"{how}." + (f" Its last lines:\n  {words}" if words else "")
        )

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        with suppress(OSError):
            self._process.kill()
        self._process.wait()
        self._reader.join(timeout=1.0)


def pack(value: Any) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def _environment() -> dict[str, str]:
    """This process's environment, with our package to be found by the children wherever they start."""
    ours = str(Path(__file__).resolve().parents[2])
    known = [p for p in sys.path if p]
    path = os.pathsep.join(dict.fromkeys([ours, *known]))
    return {**os.environ, "PYTHONPATH": path}
