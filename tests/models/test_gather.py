"""Tensors in one piece, out of the shards of two ranks."""

from __future__ import annotations

import pytest
import torch

from skyrl_train.models.gather import copy_whole, full_tensor, own_part

SHAPES = [(5, 3), (4, 2), (1, 4), (7,), (2, 3, 2), (1,), (6, 1)]


def gathered(mesh_shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Runs on each rank: shards by rows, some of them empty, shards by columns, and tensors that are whole."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", mesh_shape)
    whole = [torch.arange(torch.Size(shape).numel()).view(shape) + 100.0 * i for i, shape in enumerate(SHAPES)]
    others = [Replicate()] * (len(mesh_shape) - 1)
    tensors = [distribute_tensor(tensor, mesh, [*others, Shard(0)]) for tensor in whole]
    by_columns = torch.arange(12.0).view(3, 4)
    tensors += [distribute_tensor(by_columns, mesh, [*others, Shard(1)]), torch.ones(3)]
    whole += [by_columns, torch.ones(3)]
    calls = []
    collective = distributed.all_gather_into_tensor
    distributed.all_gather_into_tensor = lambda *args, **more: (calls.append(1), collective(*args, **more))[1]
    try:
        targets = [torch.full_like(tensor, torch.nan, dtype=dtype) for tensor in whole]
        copy_whole(targets, tensors)
    finally:
        distributed.all_gather_into_tensor = collective
    for target, tensor in zip(targets, whole, strict=True):
        assert torch.equal(target, tensor.to(dtype))
    return len(calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mesh_shape", [(2,), (2, 1)])
def test_shards_of_many_tensors_come_in_one_collective(ranks, mesh_shape, dtype) -> None:
    assert ranks(gathered, mesh_shape, dtype) == [1, 1]


def alone() -> bool:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import distribute_tensor

    rank = torch.distributed.get_rank()
    groups = [torch.distributed.new_group([r]) for r in (0, 1)]
    mesh = DeviceMesh.from_group(groups[rank], "cpu")
    sharded = distribute_tensor(torch.arange(6.0).view(3, 2).requires_grad_(), mesh)
    found = own_part(sharded)
    assert type(found) is torch.Tensor and not found.requires_grad
    found += 1
    assert torch.equal(full_tensor(sharded), torch.arange(6.0).view(3, 2) + 1), "the same memory"
    return True


def test_what_one_rank_holds_needs_no_gathering(ranks) -> None:
    assert ranks(alone) == [True, True]
