"""A sharded model's parameters in a few long runs of memory, where each had its own.

Another process can then read all of them by a few handles, and moving them to the host takes a few copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from skyrl_train.models.gather import is_shard

ARENA = 8 << 30
"""Bytes of a run at most; while it is filled, as much is held twice."""
ALIGNED = 16
"""Bytes: where a tensor may start, as in the buckets of a weight sync."""


@torch.no_grad()
def into_arenas(module: nn.Module, limit: int = ARENA) -> int:
    """Moves this worker's shards, which stay the same parameters. For a module that has not run yet.

    Args:
        limit: bytes of a run, less where memory is short; a larger tensor has one of its own.

    Returns:
        How many runs there are.
    """
    places = _plan(module, _affordable(module, limit))
    sizes: dict[int, int] = {}
    for run, start, size in places.values():
        sizes[run] = max(sizes.get(run, 0), start + size)
    arenas: dict[int, Tensor] = {}
    homes: dict[int, Tensor] = {}

    def move(parameter: Any) -> Any:
        key = id(parameter)
        if key not in places:
            return parameter
        if key not in homes:  # a tied one comes twice
            run, start, _ = places[key]
            local = parameter.to_local()
            if run not in arenas:
                arenas[run] = torch.empty(sizes[run], dtype=torch.uint8, device=local.device)
            here = arenas[run][start : start + local.nbytes].view(local.dtype).view(local.shape)
            homes[key] = here.copy_(local)
        return _same(parameter, homes[key])

    module._apply(move)
    if arenas and arenas[0].is_cuda:
        torch.cuda.empty_cache()
    return len(sizes)


def _affordable(module: nn.Module, limit: int) -> int:
    """At most half of what is free on a GPU: a run is filled before what was there is given back."""
    device = next(module.parameters()).device
    return limit if device.type != "cuda" else min(limit, torch.cuda.mem_get_info(device)[0] // 2)


def _plan(module: nn.Module, limit: int) -> dict[int, tuple[int, int, int]]:
    """By parameter its run, its first byte there, and the bytes that it takes."""
    places: dict[int, tuple[int, int, int]] = {}
    run, used = -1, limit
    for parameter in _in_turn(module):
        if not is_shard(parameter) or id(parameter) in places:
            continue
        local: Any = parameter.to_local()  # pyright: ignore[reportAttributeAccessIssue]
        size = -(-local.nbytes // ALIGNED) * ALIGNED
        if used + size > limit:
            run, used = run + 1, 0
        places[id(parameter)] = run, used, size
        used += size
    return places


def _in_turn(module: nn.Module) -> Iterator[Tensor]:
    """Parameters in the order in which ``_apply`` takes them, so that one run is filled after the other."""
    for child in module.children():
        yield from _in_turn(child)
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)


def _same(shard: Any, local: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, shard.device_mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
    )
