"""A tensor in one piece, whether this rank holds all of it or a shard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is one that workers share (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded (a DTensor); a plain one is returned as it is.

    For a sharded one it is a collective: every rank of its mesh calls it, in the same order. A shard that was moved to
    the CPU is gathered on the mesh's own device.
    """
    if not is_shard(tensor):
        return tensor
    sharded: Any = tensor
    home = sharded.device_mesh.device_type
    return (sharded if sharded.device.type == home else sharded.to(home)).full_tensor()


def own_part(tensor: Tensor) -> Tensor:
    """Without a gradient, and a plain tensor where this rank holds all of it: work on DTensors takes much longer.

    It takes microseconds where gradients are off already.
    """
    sharded: Any = tensor
    if is_shard(tensor) and sharded.device_mesh.size() == 1:
        return sharded.to_local().detach()
    return tensor.detach()


@torch.no_grad()
def in_place(parts: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Whether each pair's first, once ``own_part`` of the second, still has its memory."""
    return all(
        part.data_ptr() == (whole.to_local() if is_shard(whole) else whole).data_ptr()  # pyright: ignore
        for part, whole in parts
    )


@torch.no_grad()
def copy_whole(targets: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """``targets[i].copy_(full_tensor(tensors[i]))`` for all, with one collective for those that are sharded by rows.

    They travel in the targets' types; what is gathered at a time is as large as the targets. Every rank calls it with
    tensors of the same names, in the same order.
    """
    plain: list[tuple[Tensor, Tensor]] = []
    sharded: dict[Any, list[tuple[Tensor, Any]]] = {}
    for target, tensor in zip(targets, tensors, strict=True):
        if _by_rows(tensor):
            mesh: Any = tensor.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
            sharded.setdefault((mesh, target.dtype), []).append((target, tensor))
        else:
            plain.append((target, full_tensor(tensor)))
    _copy(plain)
    for (mesh, dtype), pairs in sharded.items():
        _gather(mesh, dtype, pairs)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """``targets[i].copy_(sources[i])`` for all, which are plain and have no gradient, in as few kernels as it takes."""
    if targets:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def _by_rows(tensor: Any) -> bool:
    """Whether the last dimension of the mesh holds shards of rows, and any other holds copies."""
    if not is_shard(tensor):
        return False
    *others, last = tensor.placements
    return last.is_shard(0) and all(place.is_replicate() for place in others)


def _gather(mesh: Any, dtype: torch.dtype, pairs: list[tuple[Tensor, Any]]) -> None:
    """Ranks hold equal numbers of rows, those at the end fewer or none: each sends as many as the first has."""
    group = mesh.get_group(mesh.ndim - 1)
    size, home = group.size(), mesh.device_type
    rows = [-(-target.shape[0] // size) for target, _ in pairs]
    counts = [n * target[:1].numel() for n, (target, _) in zip(rows, pairs, strict=True)]
    mine = torch.empty(sum(counts), dtype=dtype, device=home)
    everyones = torch.empty(size, len(mine), dtype=dtype, device=home)
    locals_ = [tensor.to_local() for _, tensor in pairs]
    _copy([(to[: own.numel()], own.flatten()) for to, own in zip(mine.split(counts), locals_, strict=True)])
    torch.distributed.all_gather_into_tensor(everyones.view(-1), mine, group=group)
    parts = []
    for rank, received in enumerate(everyones):
        for (target, _), each, part in zip(pairs, rows, received.split(counts), strict=True):
            there = target[rank * each : (rank + 1) * each]
            parts.append((there, part[: there.numel()].view(there.shape)))
    _copy(parts)


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    filled = [(to, source.detach()) for to, source in pairs if to.numel()]
    copy_all([to for to, _ in filled], [source for _, source in filled])
