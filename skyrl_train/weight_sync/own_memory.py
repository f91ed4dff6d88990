"""Buckets that need no packing: the learner's own memory, where its parameters lie one after the other.

On one GPU an engine that has our loader reads a worker's parameters where they are, and converts them as it copies.
That moves three fifths of the bytes of a packed bucket, and takes no memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from skyrl_train.engines.sglang.payloads import Bucket, Spec, aligned

FEW = 16
"""Runs of memory at most: each is opened by the engine."""


def own_runs(parts: Mapping[str, Tensor]) -> list[tuple[Bucket, Tensor]]:
    """What each run of the worker's memory holds, with a tensor that lies there.

    Args:
        parts: whole tensors by their checkpoint names.

    Returns:
        None of them where the tensors do not lie one after the other in a few runs.
    """
    runs: dict[int, list[tuple[str, Tensor]]] = {}
    for name, part in parts.items():
        runs.setdefault(part.untyped_storage().data_ptr(), []).append((name, part))
    if len(runs) > FEW:
        return []
    found = []
    for members in runs.values():
        members.sort(key=lambda member: member[1].data_ptr())
        place = members[0][1].untyped_storage().data_ptr()
        for _, part in members:
            if part.data_ptr() != place or not part.is_contiguous():
                return []
            place += aligned(part.nbytes)
        bucket = tuple(Spec(name=name, shape=tuple(part.shape), dtype=part.dtype) for name, part in members)
        found.append((bucket, members[0][1]))
    return found


def lent(holder: Tensor) -> Tensor:
    """``[N]`` uint8: the memory in which a tensor lies, to be shared.

    torch marks a storage that it shares, each time anew; so it gets one that is made for that, and owns no memory.
    """
    storage = holder.untyped_storage()
    if not holder.is_cuda:
        memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
        return torch.frombuffer(memory, dtype=torch.uint8)
    about = {"shape": (storage.nbytes(),), "typestr": "|u1", "data": (storage.data_ptr(), False), "version": 3}
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=about), device=holder.device)
