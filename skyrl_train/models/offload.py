"""Moves the memory of tensors to the host and back, in place.

The tensors stay the objects that they are: only the memory behind them is given back, and later taken again and filled.
So parameters, their shards and views, and an optimizer's state need not know. Copies go through page-locked memory at
the speed of the bus; it is kept, since locking pages takes longer than a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

PIECE = 1 << 28
"""Bytes of one page-locked piece. PyTorch rounds such allocations up to a power of two, so one large one could take
twice the memory."""


class Offload:
    """The host memory for one set of tensors, and what of it is away now."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self._away: list[tuple[torch.UntypedStorage, int]] = []

    @property
    def away(self) -> bool:
        """Whether the tensors' memory is on the host."""
        return bool(self._away)

    @torch.no_grad()
    def out(self, tensors: Iterable[Tensor]) -> int:
        """Copies the tensors' memory to the host and frees it. Returns the bytes moved; 0 if they are away already."""
        if self._away:
            return 0
        storages = _storages(tensors)
        total = sum(s.nbytes() for s in storages)
        pinned = bool(storages) and storages[0].device.type == "cuda"
        while len(self._pieces) * PIECE < total:
            self._pieces.append(torch.empty(PIECE, dtype=torch.uint8, pin_memory=pinned))
        place = 0
        for storage in storages:
            size = storage.nbytes()
            for mine, kept in self._spans(place, size):
                kept.copy_(_bytes(storage)[mine], non_blocking=True)
            self._away.append((storage, size))
            place += size
        _wait(storages)
        for storage in storages:
            storage.resize_(0)
        return total

    @torch.no_grad()
    def back(self) -> int:
        """Takes memory again and fills it with what was there. Returns the bytes moved; 0 if nothing is away."""
        place = 0
        for storage, size in self._away:
            storage.resize_(size)
            for mine, kept in self._spans(place, size):
                _bytes(storage)[mine].copy_(kept, non_blocking=True)
            place += size
        _wait([storage for storage, _ in self._away])
        self._away = []
        return place

    def _spans(self, place: int, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Parts of a storage beside the host memory for them: a storage may lie across pieces."""
        done = 0
        while done < size:
            piece, start = divmod(place + done, PIECE)
            count = min(size - done, PIECE - start)
            yield slice(done, done + count), self._pieces[piece][start : start + count]
            done += count


def parameters_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers; of a sharded model this worker's shards."""
    return [*module.parameters(), *module.buffers()]


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer remembers."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The memory behind tensors, each once. What is on a CPU while others are on a GPU stays."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore
        storage = local.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage
    on_gpu = [s for s in found.values() if s.device.type == "cuda"]
    return on_gpu or [s for s in found.values() if s.device.type == "cpu"]


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _wait(storages: list[torch.UntypedStorage]) -> None:
    if storages and storages[0].device.type == "cuda":
        torch.cuda.synchronize(storages[0].device)
