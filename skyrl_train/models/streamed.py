"""Forward passes without gradients, past FSDP2, where one worker holds all of a sharded model.

FSDP2 gathers each layer before it runs and gives it back after it, from Python. On one GPU, for a few short sequences,
that takes longer than the kernels. Here a second body, the same modules with no memory of their own, uses that of the
parameters; what has to be converted to the compute format is, a layer at a time, into memory that all layers share.
On a GPU the layers of a dense model can be recorded as CUDA graphs for inputs that come again (``replayed.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skyrl_train.models.gather import copy_all, in_place, own_part
from skyrl_train.models.replayed import Replayed
from skyrl_train.models.sharding import layers_of, reshard

ALIGNED = 128
"""Elements: where a tensor may begin in shared memory."""


class Streamed:
    """Made of a model before that is sharded.

    Args:
        model: on any device; its structure is copied, adapter included, and none of its parameters.
        device: where it will run.
        dtype: in which it computes; None: as the parameters are stored.
        graphs: record layers for inputs that come again.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype | None, *, graphs: bool = False
    ) -> None:
        self._dtype = dtype
        empty = {n: nn.Parameter(p.detach().to("meta"), requires_grad=False) for n, p in model.named_parameters()}
        self._body = copy.deepcopy(model, {id(p): empty[n] for n, p in model.named_parameters()}).eval()
        for module in self._body.modules():
            module._buffers = {n: b if b is None else b.to(device) for n, b in module._buffers.items()}
        self._memory: list[tuple[torch.UntypedStorage, int]] = []
        """What is taken while the body is used, and its bytes."""
        self._outside: tuple[list[Tensor], list[Tensor]] = [], []
        """Copies of what lies outside of the layers, and what they are copies of."""
        self._bound: list[tuple[Tensor, Tensor]] = []
        """What is used, and whose it is."""
        self._hooks: list[Any] = []
        self._replayed = Replayed(layers_of(self._body)) if graphs and _is_dense(model) else None
        self._between: Tensor | None = None
        """What layers are converted into. It stays where graphs read it."""
        self._fixed: list[Tensor] = []
        """What layers use as it is."""

    @contextmanager
    def of(self, model: nn.Module, inputs: Hashable | None = None) -> Iterator[Any]:
        """The body, with the parameters that ``model``, by now sharded, has: they must stay as they are meanwhile.

        Args:
            inputs: a name; passes of one name have the same inputs. None: any.
        """
        if not self._bound or not in_place(self._bound):
            self._bind(model)
        for storage, size in self._memory:
            storage.resize_(size)
        try:
            copy_all(*self._outside)
            with nullcontext() if self._replayed is None else self._replayed.inputs(inputs, self._fixed):
                yield self._body
        finally:
            for storage, _ in self._memory:
                storage.resize_(0)

    def _bind(self, model: nn.Module) -> None:
        """Once: of an offloaded parameter the tensor stays, and only the memory behind it comes and goes."""
        reshard(model)
        whole = dict(model.named_parameters())
        held = {name: own_part(parameter) for name, parameter in whole.items()}
        self._bound = [(held[name], whole[name]) for name in held]
        for hook in self._hooks:
            hook.remove()
        used = dict(held)
        names = {id(parameter): name for name, parameter in self._body.named_parameters()}
        layers = [(m, [names.pop(id(p)) for p in m.parameters() if id(p) in names]) for m in layers_of(self._body)]
        layers.append((self._body, list(names.values())))
        changed = [[name for name in members if self._converts(held[name])] for _, members in layers]
        sizes = [sum(_room(held[name]) for name in members) for members in changed]
        like = next(iter(held.values()))
        outside = like.new_empty(sizes[-1], dtype=self._dtype)
        between = self._between
        if between is None or between.numel() < max(sizes[:-1]):
            between = like.new_empty(max(sizes[:-1]), dtype=self._dtype)
        self._hooks = []
        for (module, _), members in zip(layers, changed, strict=True):
            sources = [held[name] for name in members]
            targets = _cut(outside if module is self._body else between, sources)
            used.update(zip(members, targets, strict=True))
            if module is self._body:
                self._outside = targets, sources
            else:
                self._hooks.append(module.register_forward_pre_hook(partial(_before, targets, sources)))
        self._use(used)
        self._fixed = [used[name] for _, members in layers[:-1] for name in members if used[name] is held[name]]
        self._memory = [(outside.untyped_storage(), outside.nbytes)]
        if self._replayed is None:
            self._memory.insert(0, (between.untyped_storage(), between.nbytes))
        else:
            self._replayed.forget()
            self._between = between

    def _use(self, tensors: dict[str, Tensor]) -> None:
        """Gives the body its parameters; tied ones are in several places."""
        made = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        by_place = {id(parameter): made[name] for name, parameter in self._body.named_parameters()}
        for module in self._body.modules():
            module._parameters = {n: p if p is None else by_place[id(p)] for n, p in module._parameters.items()}

    def _converts(self, tensor: Tensor) -> bool:
        return self._dtype is not None and tensor.is_floating_point() and tensor.dtype != self._dtype


def _is_dense(model: Any) -> bool:
    """Whether no layer chooses its kernels by its inputs, as routed experts do."""
    config = model.config.get_text_config()
    return not any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _before(targets: list[Tensor], sources: list[Tensor], *_: Any) -> None:
    """A hook, which must return nothing."""
    copy_all(targets, sources)


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() // ALIGNED) * ALIGNED


def _cut(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of these shapes, one after the other in the same memory."""
    pieces = memory[: sum(map(_room, like))].split([_room(tensor) for tensor in like]) if like else ()
    return [piece[: tensor.numel()].view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]
