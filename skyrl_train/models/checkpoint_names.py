"""A model's tensors under the names that its checkpoint files give them, whatever is kept in memory.

Engines load by checkpoint names. transformers 5 holds some tensors fused (the experts of a layer in one), an adapter
sits inside the layers it changes, and a sharded model holds a part of each tensor. Here all of that is undone, one
tensor at a time, so that no second copy of the model is ever held.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.models.gather import full_tensor, is_shard, own_part
from skyrl_train.models.lora import adapted_layers, merged_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = re.compile(r".*?\.\d+(?=\.)")
"""The part of a name that tells the layer: ``model.layers.3``."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor before it is computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in this type."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class CheckpointTensors(Mapping[str, Tensor]):
    """Every tensor that a checkpoint of this model holds, by its name there, in the order of the layers.

    Names are known at once, and ``spec`` tells shapes without computing. A value is made when it is asked for:

    - a parameter as it is: shares the model's memory, and is a DTensor where several workers share it;
    - the weight of a layer with an adapter: merged, in one piece;
    - a part of a fused tensor: cut from it, in one piece; a layer's parts are kept until another layer's are asked for.

    Making a value of a sharded model is a collective, so every rank goes through them in the same order. Nothing has a
    gradient. A tied output embedding is left out, as in a checkpoint: engines take it from the input embedding.
    """

    def __init__(self, model: PreTrainedModel, *, merged: bool = True) -> None:
        self._model = model
        self._state = _state(model)
        layers = adapted_layers(model) if merged else {}
        self._layers = {f"{name}.weight": layer for name, layer in layers.items()}
        self._sources: dict[str, str] = {}
        """Checkpoint name to the name in memory, for tensors that are only renamed."""
        self._blocks: dict[str, str] = {}
        """Checkpoint name to the block of fused tensors that it is cut from."""
        self._fused: dict[str, list[str]] = {}
        """The names in memory of a block's fused tensors."""
        self._specs = self._plan()
        self._open: tuple[str, dict[str, Tensor]] = ("", {})

    def release(self) -> None:
        """Lets go of what was computed; the parameters themselves, names and specs stay."""
        self._open = ("", {})

    def __getitem__(self, name: str) -> Tensor:
        if name in self._sources:
            return self._value(self._sources[name])
        block = self._blocks[name]
        if self._open[0] != block:
            self._open = ("", {})  # the last block's parts go before the next one's come
            whole = {source: full_tensor(self._value(source)) for source in self._fused[block]}
            self._open = (block, _revert(self._model, whole))
        return self._open[1][name]

    def parameter(self, name: str) -> Tensor | None:
        """The parameter itself, if its own part (``gather.own_part``) is the value and is all of it on this worker."""
        source = self._sources.get(name)
        if source is None or source in self._layers or is_shard(own_part(self._state[source])):
            return None
        return self._state[source]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Shape, in one piece, and type of a tensor."""
        return self._specs[name]

    def _value(self, source: str) -> Tensor:
        return merged_weight(self._layers[source]) if source in self._layers else own_part(self._state[source])

    def _plan(self) -> dict[str, TensorSpec]:
        """Finds the names by a conversion of tensors without memory; what comes out as it went in was only renamed."""
        empty = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in self._state.items()}
        made = _revert(self._model, dict(empty))
        origin = {id(tensor): name for name, tensor in empty.items()}
        self._sources = {name: origin[id(tensor)] for name, tensor in made.items() if id(tensor) in origin}
        renamed = {source: name for name, source in self._sources.items()}
        for name in self._state:
            if name not in renamed:
                found = _BLOCK.match(name)
                self._fused.setdefault(found.group() if found else "", []).append(name)
        parts = {b: list(_revert(self._model, {n: empty[n] for n in names})) for b, names in self._fused.items()}
        self._blocks = {part: block for block, names in parts.items() for part in names}
        assert self._blocks.keys() | self._sources.keys() == made.keys(), "a fused tensor spans several layers"
        order: dict[str, None] = {}
        for name in self._state:
            found = _BLOCK.match(name)
            after = [renamed[name]] if name in renamed else parts[found.group() if found else ""]
            order.update(dict.fromkeys(after))
        return {name: TensorSpec(tuple(made[name].shape), made[name].dtype) for name in order}


def checkpoint_tensors(model: PreTrainedModel, *, merged: bool = True) -> CheckpointTensors:
    """The model's tensors by their checkpoint names: merged with its adapter if it has one, or those of its base."""
    return CheckpointTensors(model, merged=merged)


@torch.no_grad()
def whole_state_dict(model: PreTrainedModel, *, keep: bool = True) -> dict[str, Tensor]:
    """The state dict that the model would have if it were not sharded and its adapter's work were in its weights.

    What was gathered or merged is on the CPU; tied tensors stay one tensor. A collective where the model is sharded.

    Args:
        keep: whether this worker wants the result; if not it is empty.
    """
    layers = {f"{name}.weight": layer for name, layer in adapted_layers(model).items()}
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    found: dict[str, Tensor] = {}
    for name, tensor in _without_adapter(model).items():
        if name in layers:
            value = merged_weight(layers[name]).cpu()
        elif not hasattr(tensor, "full_tensor"):
            value = tensor.detach()
        elif name in tied:
            continue
        else:
            value = full_tensor(tensor).cpu()
        if keep:
            found[name] = value
    return found | {name: found[source] for name, source in tied.items() if name not in found and source in found}


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and buffers themselves; of a sharded model, the shards."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor for name, tensor in _without_adapter(model).items() if name not in tied}


def _without_adapter(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict by the names of the base model; the adapter's own tensors are left out."""
    layers = adapted_layers(model)
    names = {f"{name}.base_layer.": f"{name}." for name in layers}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # to detach is dear where they are sharded
        head, _, last = name.rpartition(".")
        if head.rpartition(".")[0].rpartition(".")[0] in layers:
            continue  # <layer>.lora_A.default.weight
        state[names.get(f"{head}.", f"{head}.") + last if head else name] = tensor
    return state


def _revert(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)
