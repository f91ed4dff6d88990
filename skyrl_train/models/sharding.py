"""A model split over workers: FSDP2 (``fully_shard``), a layer at a time.

Each layer's parameters are gathered in the compute format just before the layer runs, and given back after it; each
worker keeps its shard in float32, with that shard of the gradient and of the optimizer's state. On one GPU the same
thing saves the memory of a second, lower-precision copy of the model. Frozen parameters (the base of an adapter) keep
the format in which they were loaded.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from skyrl_train.config.models import FSDPConfig


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: the members of its longest list of modules."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def shard(model: nn.Module, mesh: Any, config: FSDPConfig, compute_dtype: torch.dtype | None) -> None:
    """Shards a model in place over a device mesh (see ``learner.ranks``). Parameters become DTensors.

    Args:
        model: whole, on any device; each part moves to the mesh's own as it is sharded.
        compute_dtype: of gathered parameters and activations; None: as stored. Gradients are reduced in float32.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    half = compute_dtype is not None
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
    )
    on_cpu = mesh.device_type == "cpu"
    offload = CPUOffloadPolicy() if config.cpu_offload and not on_cpu else OffloadPolicy()
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
    as_stored = MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False)
    for part in getattr(model, "in_float32", ()):
        stored: dict[str, Any] = options | {"mp_policy": as_stored}
        fully_shard(part, **stored)
    for layer in layers_of(model):
        fully_shard(layer, reshard_after_forward=config.reshard_after_forward, **options)
    fully_shard(model, **options)


def is_sharded(model: nn.Module) -> bool:
    """Whether ``shard`` was called on the model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def is_on_cpu(model: nn.Module) -> bool:
    """Whether the parameters, of a sharded model this worker's shards, lie in the CPU's memory."""
    first: Any = next(model.parameters())
    return (first.to_local() if hasattr(first, "to_local") else first).device.type == "cpu"


def reshard(model: nn.Module) -> None:
    """Gives back what forward passes without a backward pass have left gathered. A plain model has nothing."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules() if is_sharded(model) else ():
        if isinstance(module, FSDPModule):  # a root does not do so for its parts
            module.reshard()


def on_the_host(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory; of a shard a shard, on the same mesh of CPUs. Nothing is exchanged."""
    sharded: Any = tensor
    if not hasattr(sharded, "device_mesh"):
        return tensor.detach().to("cpu", copy=True)
    from torch.distributed.tensor import DTensor

    local = sharded.to_local().detach().to("cpu", copy=True)
    mesh, placements = _cpu_mesh(sharded.device_mesh), sharded.placements
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
    )  # fmt: skip


@functools.cache
def _cpu_mesh(mesh: Any) -> Any:
    """The same workers, as CPUs. The first call is a collective."""
    from torch.distributed.device_mesh import DeviceMesh

    return mesh if mesh.device_type == "cpu" else DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


class Accumulation:
    """How gradients of several micro-batches add up on a sharded model.

    Whole, in float32, on every worker, and reduced to shards once, after the last; or reduced after every micro-batch,
    which keeps them at the size of a shard. Copies of a shard (``fsdp_size`` below the number of workers) are added
    up once in any case.

    Args:
        shards: workers in one group of shards.
        copies: how many such groups there are.
        device: where they would lie.
        whole: None: where the whole gradients are at most ``SMALL`` of the device's memory.
    """

    SMALL = 1 / 20

    def __init__(
        self, model: nn.Module, shards: int, copies: int, device: torch.device, *, whole: bool | None = None
    ) -> None:
        self._model: Any = model if is_sharded(model) else None
        self._copies = copies
        trained = [p for p in model.parameters() if p.requires_grad]
        size = 4 * sum(p.numel() for p in trained)
        fits = whole if whole is not None else size <= self.SMALL * _memory_of(device)
        self.whole_bytes = size if self._model is not None and shards > 1 and fits else 0
        """Of the whole gradients, where they are kept."""

    def before_backward(self, *, last: bool) -> None:
        if self.whole_bytes:
            self._model.set_requires_gradient_sync(last)
        elif self._model is not None and self._copies > 1:
            self._model.set_requires_all_reduce(last)


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
