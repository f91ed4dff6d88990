"""Gradient checkpointing: what a backward pass recomputes, and what it keeps.

full        of each layer its input is kept, and the layer runs again
selective   the output of attention over packed sequences is kept too, so that all else runs again. That is the dearest
            part of a layer for long sequences, and its output one of the smaller tensors.

PyTorch's own selective checkpointing watches every operator of a layer from Python, which takes longer than launching
it. Here attention alone is watched, through the hooks for saved tensors: what it saves beside its inputs is kept, and
its inputs are saved again, in the same order, when the layer runs again and attention does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skyrl_train.models.lora import has_adapter
from skyrl_train.models.sharding import layers_of

Attention = Callable[..., Tensor]
_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]


def recompute_activations(model: Any, *, mode: str, use_reentrant: bool) -> None:
    """Turns gradient checkpointing on, for every layer: what is around a layer's forward pass (FSDP2's hooks) stays
    outside, and what was compiled before (``compiled.py``) inside.

    Args:
        mode: "full" or "selective".
        use_reentrant: the older implementation, which knows "full" alone.
    """
    options: dict[str, Any] = {"use_reentrant": use_reentrant, "preserve_rng_state": _is_random(model)}
    if mode == "selective" and not use_reentrant:
        options["context_fn"] = _contexts
    for layer in layers_of(model):
        layer.forward = Recomputed(layer, options)
    if use_reentrant and has_adapter(model):
        model.get_input_embeddings().register_forward_hook(_start_gradient)


class Recomputed:
    """A layer's forward pass whose activations are computed again when gradients are asked for, in training."""

    def __init__(self, layer: nn.Module, options: dict[str, Any]) -> None:
        self.layer, self.forward, self.options = layer, layer.forward, options

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        if self.layer.training and torch.is_grad_enabled():
            return checkpoint(partial(self.forward, **more), *inputs, **self.options)
        return self.forward(*inputs, **more)


def _is_random(model: Any) -> bool:
    """Whether a layer draws numbers, which must then be the same when it runs again; to see to that takes time."""
    drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    return drops or bool(getattr(model.config.get_text_config(), "attention_dropout", 0))


def kept(attention: Attention, *inputs: Tensor) -> Tensor:
    """``attention(*inputs)``; where a layer runs again for its gradients, what was computed the first time.

    Args:
        attention: a kernel that saves its inputs as they are, and whatever else it needs, for its backward pass.
    """
    layer = _layer.get()
    if layer is None or not torch.is_grad_enabled():
        return attention(*inputs)
    return layer.again(inputs) if layer.runs_again else layer.first(attention, inputs)


@dataclass(slots=True)
class _Layer:
    """What is kept of one layer's attention, from its first run to its second."""

    runs_again: bool = False
    outputs: list[tuple[Tensor, list[int]]] = field(default_factory=list)
    """Of each call its output, and which of its inputs it saved, in order."""

    def first(self, attention: Attention, inputs: tuple[Tensor, ...]) -> Tensor:
        give_up, fetch = _hooks(False)  # those of the checkpoint, which drops what is saved
        places = {_place(tensor): index for index, tensor in enumerate(inputs)}
        saved: list[int] = []

        def pack(tensor: Tensor) -> tuple[bool, Any]:
            index = places.get(_place(tensor))
            if index is None:
                return True, tensor
            saved.append(index)
            return False, give_up(tensor)

        def unpack(held: tuple[bool, Any]) -> Tensor:
            return held[1] if held[0] else fetch(held[1])

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            output = attention(*inputs)
        self.outputs.append((output.detach(), saved))
        return output

    def again(self, inputs: tuple[Tensor, ...]) -> Tensor:
        output, saved = self.outputs.pop(0)
        save, _ = _hooks(False)
        for index in saved:
            save(inputs[index])
        return output.requires_grad_(any(tensor.requires_grad for tensor in inputs))

    @contextmanager
    def running(self, *, again: bool) -> Iterator[None]:
        self.runs_again = again
        token = _layer.set(self)
        try:
            yield
        finally:
            _layer.reset(token)


_layer: ContextVar[_Layer | None] = ContextVar("layer", default=None)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    layer = _Layer()
    return layer.running(again=False), layer.running(again=True)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _start_gradient(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """Reentrant checkpointing keeps no gradient if its input has none, as behind a frozen embedding."""
    return output.requires_grad_() if torch.is_grad_enabled() else output
