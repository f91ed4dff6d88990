"""Which of N workers one is, and where the workers of a role meet."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One worker among those of its role. A factory that takes ``place`` is given its own."""

    rank: int = 0
    size: int = 1
    device_index: int = 0
    """Of the GPUs that this process sees, the worker's own."""
    meeting: tuple[str, int] | None = None
    """Host and port of the store where the workers find each other; None for a worker alone."""


def open_meeting(host: str) -> tuple[Any, int]:
    """Opens the store in this process, on a free port: the store, which lives while it is held, and its port.

    Args:
        host: the address of this machine for the other workers.
    """
    store = _tcp_store()(host, 0, is_master=True, wait_for_workers=False)
    return store, int(store.port)


def join_meeting(host: str, port: int, timeout: float) -> Any:
    """The store that another process has opened.

    Args:
        timeout: seconds of each wait for it.
    """
    return _tcp_store()(host, port, is_master=False, timeout=timedelta(seconds=timeout))


def _tcp_store() -> Any:
    from torch import distributed

    exported: Any = distributed  # torch's stubs do not name it
    return exported.TCPStore


def own_address() -> str:
    """The address by which other machines of this network reach this one; 127.0.0.1 where there is no network.

    Nothing is sent: a datagram socket only looks up which way it would go.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def host_identity() -> str:
    """The same for two processes exactly if they can share memory: one machine, one boot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/ipc")
    words = [platform.node()]
    if boot.exists():
        words.append(boot.read_text().strip())
    if namespace.exists():
        words.append(os.readlink(namespace))
    return " ".join(words)
