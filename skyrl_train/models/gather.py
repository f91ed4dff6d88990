"""A tensor in one piece, whether this rank holds all of it or a shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded (a DTensor); a plain one is returned as it is.

    For a sharded one it is a collective: every rank of its mesh calls it, in the same order. A shard that was moved to
    the CPU is gathered on the mesh's own device.
    """
    sharded: Any = tensor
    if not hasattr(sharded, "full_tensor"):
        return tensor
    home = sharded.device_mesh.device_type
    return (sharded if sharded.device.type == home else sharded.to(home)).full_tensor()


def own_part(tensor: Tensor) -> Tensor:
    """Without a gradient, and a plain tensor where this rank holds all of it: work on DTensors takes much longer."""
    sharded: Any = tensor
    with torch.no_grad():
        if hasattr(sharded, "full_tensor") and sharded.device_mesh.size() == 1:
            return sharded.to_local().detach()
        return tensor.detach()
