"""``torch.compile`` where it pays: the layers around attention, which are many small kernels otherwise.

Each layer's forward pass is compiled, with a break at attention, whose plan changes with every batch. Sharding and
recomputation, which surround a layer, stay outside of what is compiled, and all layers share the same kernels. (Its
parts one by one would do too, and take a third longer to launch.)
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from skyrl_train.models.sharding import layers_of

log = logging.getLogger("skyrl.models")

VARIANTS = 64
"""Compiled forms of a layer at most: with and without gradients, training or not, lengths fixed and free."""


def compile_layers(model: Any, backend: Any = "inductor") -> int:
    """Compiles every layer, in place; they are built when they first run. Returns how many.

    What cannot be compiled runs as it is, and PyTorch logs why.

    Args:
        backend: of ``torch.compile``.
    """
    import torch._dynamo.config as settings

    changes: Any = settings
    for name in ("recompile_limit", "cache_size_limit"):  # the same thing, by its newer and its older name
        if hasattr(changes, name):
            setattr(changes, name, max(VARIANTS, getattr(changes, name)))
            break
    changes.suppress_errors = True
    if hasattr(changes, "nested_graph_breaks"):  # two pieces of a layer, before and after attention, and not four
        changes.nested_graph_breaks = True
    layers = layers_of(model)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=backend)
    log.info("%d layers of %s are compiled when they first run", len(layers), type(model).__name__)
    return len(layers)
