"""``torch.compile`` where it pays: the parts of a layer around attention, which are many small kernels otherwise.

Each part (a norm, the attention block, the MLP) is compiled by itself. So sharding and recomputation, which surround a
layer, and the attention plan, which changes with every batch, stay outside of what is compiled, and all layers share
the same kernels.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from skyrl_train.models.sharding import layers_of

log = logging.getLogger("skyrl.models")

VARIANTS = 64
"""Compiled forms of one part at most: with and without gradients, training or not, lengths fixed and free."""


def compile_layers(model: Any) -> int:
    """Compiles the parts of every layer, in place; they are built when they first run. Returns how many.

    A part that cannot be compiled runs as it is, and PyTorch logs why.
    """
    import torch._dynamo.config as settings

    changes: Any = settings
    for name in ("recompile_limit", "cache_size_limit"):  # the same thing, by its newer and its older name
        if hasattr(changes, name):
            setattr(changes, name, max(VARIANTS, getattr(changes, name)))
            break
    changes.suppress_errors = True
    parts = [part for layer in layers_of(model) for part in layer.children()]
    for part in parts:
        part.forward = torch.compile(part.forward)
    log.info("%d parts of %s are compiled when they first run", len(parts), type(model).__name__)
    return len(parts)
