"""The parent of a launched server: ends the server's whole process group when its own parent is gone, or asks.

Run as a script by the driver, with the standard library alone::

    python -I -S supervisor.py DRIVER_PID GRACE COMMAND ...

A server in a session of its own does not get the terminal's Ctrl-C, and its children form one group with it. The
supervisor sits between: SIGTERM, or the driver's end (SIGKILL included), makes it send TERM to the group, and KILL
after GRACE seconds. Its exit status is the server's (128 + the signal that ended it). If the supervisor itself is
killed, the kernel ends the server.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType

PR_SET_PDEATHSIG = 1
INTERVAL = 0.2
"""Seconds between two looks at the driver."""


def main(driver: int, grace: float, command: list[str]) -> int:
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent)
    while server.poll() is None:
        if asked or os.getppid() != driver:
            end_group(server, grace)
            break
        with suppress(subprocess.TimeoutExpired):
            server.wait(INTERVAL)
    _signal(server.pid, signal.SIGKILL)  # what the server may have left behind in its group
    code = server.wait()
    return code if code >= 0 else 128 - code


def end_group(server: subprocess.Popen[bytes], grace: float) -> None:
    """TERM to the whole group, and KILL to what is left of it after ``grace`` seconds."""
    _signal(server.pid, signal.SIGTERM)
    _signal(server.pid, signal.SIGCONT)  # a stopped process cannot end
    until = time.monotonic() + grace
    while time.monotonic() < until and server.poll() is None:
        time.sleep(0.02)
    _signal(server.pid, signal.SIGKILL)


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
