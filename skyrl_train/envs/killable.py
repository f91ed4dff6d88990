"""Calls that can be killed: a function runs in a helper process with a deadline.

A thread cannot be ended, and code that holds the interpreter's lock (a regular expression, a power of a large integer)
stops every other thread as well. Checking a response may take that path, because the policy wrote it. So such checks
run in a few helper processes, which are killed and replaced. A helper is a fresh interpreter: it inherits nothing of
this process, imports torch only if the function does, and starts as quickly as the function's module is imported.

The helper ends by itself when this process is gone: at the end of its pipe, or by the kernel's limit on CPU time.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from skyrl_train.errors import EnvError, EnvTimeoutError

START_TIMEOUT = 120.0
"""Seconds for a helper to import its function; on a busy machine imports are slow."""
QUEUE_FACTOR = 20
"""A call waits for a free helper for as long as so many calls may take."""
MEMORY = 4 * 2**30
"""Bytes of address space of a helper; beyond it allocations fail there, and nothing is taken from the run."""
_MAIN = "import sys; from skyrl_train.envs.helper import main; main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))"
_pools: dict[str, KillablePool] = {}
_pools_lock = threading.Lock()


class CallKilledError(EnvTimeoutError):
    """A call ran over its deadline, and its helper was killed."""


def shared_pool(function: str) -> KillablePool:
    """The one pool of this process for ``function``."""
    with _pools_lock:
        if function not in _pools:
            _pools[function] = KillablePool(function, size=max(2, min(8, os.cpu_count() or 1)))
        return _pools[function]


def close_shared_pools() -> None:
    """Ends the helpers of all shared pools; a later call starts new ones."""
    with _pools_lock:
        pools = list(_pools.values())
        _pools.clear()
    for pool in pools:
        pool.close()


class KillablePool:
    """A few processes that call one function of plain JSON data, whose result is plain JSON data.

    Args:
        function: its import path, ``module:function``.
        size: most helpers, and so most calls at the same time. They start when they are needed.
    """

    def __init__(self, function: str, size: int) -> None:
        self.function = function
        self._slots: queue.LifoQueue[_Helper | None] = queue.LifoQueue()  # a helper at hand goes first
        for _ in range(size):
            self._slots.put(None)
        self._lock = threading.Lock()
        self._running: set[_Helper] = set()
        self._closed = False
        atexit.register(self.close)

    def call(self, *args: Any, timeout: float) -> Any:
        """The function's result. Blocks: call it from a thread, as a plain method of an env is.

        Args:
            timeout: seconds for the call itself, without the start of a helper and without waiting for a free one.

        Raises:
            CallKilledError: the call took longer and was killed.
            EnvTimeoutError: no helper was free in time.
            EnvError: the function raised, the helper died, or it cannot start.
        """
        try:
            helper = self._slots.get(timeout=QUEUE_FACTOR * timeout)
        except queue.Empty:
            raise EnvTimeoutError(f"{self.function}: no helper was free in {QUEUE_FACTOR * timeout:g} s.") from None
        try:
            if helper is None or not helper.alive():
                self._discard(helper)
                helper = None
                helper = self._start()
            return helper.call(args, timeout)
        finally:
            if helper is not None and not helper.idle:
                self._discard(helper)
                helper = None
            self._slots.put(helper)

    def close(self) -> None:
        """Kills the helpers. Calls that are under way fail."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for helper in running:
            self._discard(helper)
        atexit.unregister(self.close)

    def _start(self) -> _Helper:
        with self._lock:
            if self._closed:
                raise EnvError(f"{self.function}: the helpers are closed.")
            helper = _Helper(self.function)
            self._running.add(helper)
        try:
            helper.wait_until_ready()
        except BaseException:
            self._discard(helper)
            raise
        return helper

    def _discard(self, helper: _Helper | None) -> None:
        if helper is not None:
            helper.kill()
            with self._lock:
                self._running.discard(helper)


class _Helper:
    """One process. ``idle`` is false while it owes an answer."""

    def __init__(self, function: str) -> None:
        ours, theirs = socket.socketpair()
        self.function, self.idle = function, False
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _MAIN, str(theirs.fileno()), function, str(MEMORY)]
        with theirs:
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the run, which then ends its helpers
            )
        self.pipe = Connection(ours.detach())

    def wait_until_ready(self) -> None:
        """Raises EnvError if the function cannot be imported there."""
        if not self._answers_within(START_TIMEOUT):
            raise EnvError(f"{self.function}: the helper did not start within {START_TIMEOUT:g} s.")
        self._answer()

    def call(self, args: tuple[Any, ...], timeout: float) -> Any:
        self.idle = False
        try:
            self.pipe.send_bytes(json.dumps({"timeout": timeout, "args": args}).encode())
        except OSError as error:
            raise EnvError(f"{self.function}: the helper died, {self._how_it_ended()}.") from error
        if not self._answers_within(timeout):
            raise CallKilledError(f"{self.function}: a call took over {timeout:g} s and was killed.")
        return self._answer()

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.idle = False
        self.process.kill()
        self.process.wait()
        self.pipe.close()

    def _answers_within(self, timeout: float) -> bool:
        try:
            return self.pipe.poll(timeout)
        except OSError as error:
            raise EnvError(f"{self.function}: the helpers were closed during a call.") from error

    def _answer(self) -> Any:
        try:
            answer = json.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise EnvError(f"{self.function}: the helper died, {self._how_it_ended()}.") from error
        except OSError as error:
            raise EnvError(f"{self.function}: the helpers were closed during a call.") from error
        self.idle = True
        if "error" in answer:
            raise EnvError(f"{self.function}: {answer['error']}")
        return answer["result"]

    def _how_it_ended(self) -> str:
        deadline = time.monotonic() + 5
        while (code := self.process.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
