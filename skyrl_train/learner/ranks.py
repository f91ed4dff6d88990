"""What the workers of one model do together: who they are, how they are dealt out, and sums over all of them.

With 8 workers, ``fsdp_size=4`` and ``sequence_parallel_size=2``:

    rank                 0 1 2 3 4 5 6 7
    group of shards      0 0 0 0 1 1 1 1      parameters are split over 4, and held twice
    data-parallel rank   0 0 1 1 2 2 3 3      workers of one number get the same rows ...
    part of a sequence   0 1 0 1 0 1 0 1      ... and work on different tokens of them
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from skyrl_train.errors import ConfigError, WorkerError
from skyrl_train.runtime.place import Place, join_meeting


class Ranks:
    """The workers of one model, seen from one of them.

    Args:
        place: which one this is.
        device: of this worker.
        timeout: seconds that a collective may take before it is given up.
        saving_timeout: the same while checkpoints and exports are written; None: ``timeout``.
        fsdp_size: workers in one group of shards; -1: all.
        sequence_parallel: workers that split each sequence.
        key: section of the config, for errors.

    Raises:
        ConfigError: sizes that do not divide the number of workers.
        WorkerError: the others did not come to the meeting in time.
    """

    def __init__(
        self,
        place: Place,
        device: torch.device,
        *,
        timeout: float,
        saving_timeout: float | None = None,
        fsdp_size: int = -1,
        sequence_parallel: int = 1,
        key: str = "trainer.policy",
    ) -> None:
        self.rank, self.size, self.device = place.rank, place.size, device
        self.shards = self.size if fsdp_size == -1 else fsdp_size
        _require_division(self.size, self.shards, f"{key}.fsdp_config.fsdp_size")
        _require_division(self.size, sequence_parallel, f"{key}.sequence_parallel_size")
        self.sequence_parallel = sequence_parallel
        self.data_size = self.size // sequence_parallel
        self.data_rank = self.rank // sequence_parallel
        self.part = self.rank % sequence_parallel
        if self.size > 1:
            _meet(place, device, timeout)
        self._mesh: Any = None
        self._timeout = timedelta(seconds=timeout)
        self.sequence_group = self._sequence_group()
        patient = timedelta(seconds=max(timeout, saving_timeout or 0.0))
        self.saving_group = distributed.new_group(backend="gloo", timeout=patient) if self.size > 1 else None
        """For collectives of checkpoints that are written while the workers go on."""

    @property
    def mesh(self) -> Any:
        """The device mesh for ``fully_shard``: ``[shards]``, or ``[copies, shards]`` where shards are held twice."""
        from torch.distributed.device_mesh import init_device_mesh

        if self._mesh is None:
            _meet_alone(self.device)
            copies, kind = self.size // self.shards, self.device.type
            if copies == 1:
                self._mesh = init_device_mesh(kind, (self.size,), mesh_dim_names=("shards",))
            else:
                self._mesh = init_device_mesh(kind, (copies, self.shards), mesh_dim_names=("copies", "shards"))
                for group in self._mesh.get_all_groups():
                    distributed.distributed_c10d._set_pg_timeout(self._timeout, group)
        return self._mesh

    def everyones(self, values: Sequence[float]) -> list[list[float]]:
        """The values of each data-parallel rank, in float64, in their order. Every worker gets them."""
        if self.size == 1:
            return [list(values)]
        whole = torch.zeros(self.data_size, len(values), dtype=torch.float64, device=self.device)
        if self.part == 0:
            whole[self.data_rank] = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(whole)
        return whole.tolist()

    def max(self, values: Sequence[float]) -> list[float]:
        """The largest of each over all workers."""
        if self.size == 1:
            return list(values)
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(mine, op=distributed.ReduceOp.MAX)
        return mine.tolist()

    def gather(self, rows: Tensor, count: int, mine: Tensor) -> Tensor:
        """``[count, ...]`` on the CPU from what each data-parallel rank has of it.

        Args:
            rows: which rows ``mine`` are; together the ranks have each row once.
        """
        whole = torch.zeros(count, *mine.shape[1:], dtype=mine.dtype)
        if self.part == 0:
            whole[rows] = mine
        if self.size == 1:
            return whole
        whole = whole.to(self.device)
        distributed.all_reduce(whole)
        return whole.cpu()

    def barrier(self, group: Any = None) -> None:
        """Returns when every worker has come here. ``group`` may be ``saving_group``, on another thread."""
        if self.size == 1:
            return
        here = torch.zeros(1, device="cpu" if group is not None else self.device)
        distributed.all_reduce(here, group=group)

    def close(self) -> None:
        """Leaves the group; the process ends soon after."""
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    def _sequence_group(self) -> Any:
        """The workers that split this one's sequences; every worker makes every group, in one order."""
        found = None
        if self.sequence_parallel > 1:
            for first in range(0, self.size, self.sequence_parallel):
                members = list(range(first, first + self.sequence_parallel))
                group = distributed.new_group(members, timeout=self._timeout)
                found = group if self.rank in members else found
        return found


def _require_division(workers: int, size: int, key: str) -> None:
    if size < 1 or workers % size:
        raise ConfigError(
            key, size, f"does not divide the {workers} workers of the model.",
            f"Set it to one of {', '.join(str(n) for n in range(1, workers + 1) if workers % n == 0)}.",
        )  # fmt: skip


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _meet(place: Place, device: torch.device, timeout: float) -> None:
    if distributed.is_initialized():  # somebody has put this process into a group already
        return
    assert place.meeting is not None, "the runtime opens a meeting for more than one worker"
    wait = timedelta(seconds=timeout)
    host, port = place.meeting
    try:
        store = join_meeting(host, port, timeout)
        distributed.init_process_group(
            _backend(device), store=store, rank=place.rank, world_size=place.size, timeout=wait,
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
    except (distributed.DistError, RuntimeError) as error:
        raise WorkerError(
            f"rank {place.rank} of {place.size} did not find the others at {host}:{port} within {timeout:g} s "
            f"(trainer.collective_timeout): {str(error).splitlines()[0]}"
        ) from error


def _meet_alone(device: torch.device) -> None:
    """A group of one, for a model that is sharded over one GPU: roles in one process share it."""
    if not distributed.is_initialized():
        lonely: Any = distributed
        distributed.init_process_group(_backend(device), store=lonely.HashStore(), rank=0, world_size=1)
