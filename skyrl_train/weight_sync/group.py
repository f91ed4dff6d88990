"""A process group with servers: this side is rank 0, which broadcasts; their ranks follow.

The servers make their side with torch's own helper and the group's name; here the backend is made directly, over the
store keys which that helper uses, so that nothing of it shows up in this process's default group.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from threading import Event
from typing import Any

import torch
from torch import Tensor

from skyrl_train.errors import WeightSyncError

NCCL_OF_SERVERS = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
"""What SGLang sets in its processes. NCCL reads this once in a process; where the two sides of a group differ, a
broadcast between GPUs of one host fails with "invalid argument"."""
POLL = 0.0005
"""Seconds between two looks at a collective."""


class EngineGroup:
    """Rank 0 of a group, in the process that holds the weights.

    ``open`` makes the store that the servers are then told of; ``join`` meets them there.

    Args:
        name: of the group; the servers must be told the same.
        backend: "nccl" or "gloo".
        world_size: all ranks of all servers, and this one.
        timeout: seconds for each wait.
    """

    def __init__(self, name: str, backend: str, world_size: int, timeout: float) -> None:
        self.name, self.backend, self.world_size, self.timeout = name, backend, world_size, timeout
        self._address = ""
        self._store: Any = None
        self._keys = 0
        self._group: Any = None
        self._given_up = Event()

    def open(self, address: str) -> int:
        """Makes the store, reachable by the servers at ``address``; returns its port."""
        from torch._C._distributed_c10d import TCPStore

        self._address = address
        try:
            self._store = TCPStore(
                address, 0, self.world_size, is_master=True, wait_for_workers=False, use_libuv=True,
                timeout=timedelta(seconds=self.timeout),
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise WeightSyncError(f"weight sync failed in phase join: no store at {address}: {error}") from error
        self._keys = self._store.num_keys()
        return int(self._store.port)

    def join(self) -> None:
        """Meets the servers. With NCCL the first broadcast does.

        Raises:
            WeightSyncError: they did not come within the timeout.
        """
        import torch.distributed as distributed

        self._await_servers()
        dist: Any = distributed
        device = "cuda" if self.backend == "nccl" else "cpu"
        keys = self._store
        for prefix in (self.name, f"{self.name}/", f"{device}/"):
            keys = dist.PrefixStore(prefix, keys)
        timeout = timedelta(seconds=self.timeout)
        try:
            if self.backend == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._group = dist.ProcessGroupNCCL(keys, 0, self.world_size, options)
            else:
                options = dist.ProcessGroupGloo._Options()
                options._timeout = timeout
                options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._address)]
                self._group = dist.ProcessGroupGloo(keys, 0, self.world_size, options)
        except RuntimeError as error:
            raise WeightSyncError(
                f"Weight sync timed out in phase join: {self.world_size - 1} engine ranks were to meet at port "
                f"{self._store.port} by {self.backend} within generator.weight_sync_timeout={self.timeout:g} s: "
                f"{_first_line(error)}"
            ) from error

    def _await_servers(self) -> None:
        """Waits until a server has come to the store. The group's own wait could not be given up."""
        until = time.monotonic() + self.timeout
        while not self._given_up.is_set() and time.monotonic() < until:
            if self._store.num_keys() > self._keys:
                return
            time.sleep(POLL * 10)
        why = "an engine had failed" if self._given_up.is_set() else "it never came to the store"
        raise WeightSyncError(
            f"{'' if self._given_up.is_set() else 'Weight sync timed out: '}the engine did not join the group at port "
            f"{self._store.port} within generator.weight_sync_timeout={self.timeout:g} s: {why}."
        )

    def broadcast(self, tensor: Tensor) -> None:
        """Sends ``tensor`` to every rank of the servers.

        Raises:
            WeightSyncError: a server is gone, ``give_up`` was called, or it took too long.
        """
        import torch.distributed as dist

        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            work = self._group.broadcast([tensor], options)
            self._wait(work)
        except RuntimeError as error:
            raise WeightSyncError(f"the {self.backend} broadcast failed: {_first_line(error)}") from error

    def _wait(self, work: Any) -> None:
        until = time.monotonic() + self.timeout
        while not work.is_completed():
            if self._given_up.is_set():
                raise WeightSyncError("the broadcast was given up: an engine had failed.")
            if time.monotonic() > until:
                raise WeightSyncError(
                    f"Weight sync timed out: a {self.backend} broadcast did not end within "
                    f"generator.weight_sync_timeout={self.timeout:g} s."
                )
            time.sleep(POLL)
        work.wait()
        if self.backend == "nccl":
            torch.cuda.current_stream().synchronize()

    def give_up(self) -> None:
        """Makes a broadcast that is waiting raise. May be called from any thread."""
        self._given_up.set()

    def close(self) -> None:
        """Leaves the group, whatever state it is in; the servers' side of a broken one then ends too."""
        group, self._group, self._store = self._group, None, None
        if group is not None:
            with suppress(RuntimeError, AttributeError):  # gloo of older torch has no abort: dropping it closes it
                group.abort()
        del group


def agree_with_servers() -> None:
    """Sets NCCL in this process, and in those that it starts, as in the servers. What the user has set stays."""
    for name, value in NCCL_OF_SERVERS.items():
        os.environ.setdefault(name, value)


def address_towards(url_host: str, port: int) -> str:
    """This machine's address as a server at ``url_host`` sees it. Sends nothing."""
    with socket.socket(socket.AF_INET6 if ":" in url_host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((url_host, port))
        return str(probe.getsockname()[0])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
