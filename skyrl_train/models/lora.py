"""A LoRA adapter (Hu et al. 2021, arXiv 2106.09685) in a model's own layers, through PEFT.

    y = W x + (alpha / rank) B A x        W frozen; A [rank, in] and B [out, rank] trained, in float32

PEFT's layers take the place of the linear layers inside the model, which stays the class that transformers made. So
packed scoring, the embedded engine and sharding work on it as on any other. B A starts at zero: the model with a fresh
adapter is the base model, and the base model stays at hand (``adapter_off``) as the reference of a KL term.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from skyrl_train.errors import ConfigError, MissingPackageError
from skyrl_train.models.gather import full_tensor
from skyrl_train.models.lora_targets import as_short_names, find_targets
from skyrl_train.storage.whole_folder import replace_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from skyrl_train.config.models import CriticLoraConfig, LoraConfig

log = logging.getLogger("skyrl.models")

ADAPTER = "default"
"""PEFT's name of the one adapter; it does not appear in what is written or sent."""
PARTS = ("lora_A", "lora_B")
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def add_adapter(model: PreTrainedModel, lora: LoraConfig | CriticLoraConfig, key: str) -> None:
    """Freezes the model and puts an adapter beside the linear layers that the config names.

    Args:
        lora: its ``rank`` is at least 1.
        key: of the section in the config, for errors.

    Raises:
        MissingPackageError: PEFT is not installed.
        ConfigError: a target that the model does not have or that can have no adapter.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingPackageError("peft", f"{key}.rank={lora.rank}", 'pip install "skyrl-train[lora]"') from error
    targets = find_targets(model, lora, key)
    transposed = any(not isinstance(model.get_submodule(name), nn.Linear) for name in targets)
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] - a fraction is as good
        lora_dropout=0.0,
        target_modules=as_short_names(targets, model),
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=transposed,
        init_lora_weights=True if lora.init_method == "kaiming" else lora.init_method,  # pyright: ignore
    )
    training = model.training
    inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    if set(adapted_layers(model)) != set(targets):
        raise ConfigError(
            f"{key}.target_modules", lora.target_modules,
            f"PEFT puts adapters on other parts of {type(model).__name__} than on these linear layers.",
            "Name the attention's layers only, such as [q_proj,k_proj,v_proj,o_proj].",
        )  # fmt: skip
    for layer in adapted_layers(model).values():
        for part in PARTS:
            getattr(layer, part).float()  # PEFT takes the base's type
    model.train(training)
    _tell(model, lora.rank)


def _tell(model: PreTrainedModel, rank: int) -> None:
    """In a model of experts, which are no linear layers, the last number is small."""
    layers = adapted_layers(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters()) - trained
    covered = sum(layer.weight.numel() for layer in layers.values())
    log.info(
        "adapter of rank %d on %d layers (%s): %s parameters are trained beside %s; these layers hold %.0f%% of them",
        rank, len(layers), ", ".join(sorted({n.rpartition(".")[2] for n in layers})), f"{trained:,}", f"{total:,}",
        100 * covered / total,
    )  # fmt: skip


def has_adapter(model: nn.Module) -> bool:
    """Whether ``add_adapter`` was called on the model."""
    return bool(getattr(model, "peft_config", None))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by their names in the model, in its order; empty without an adapter."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")} if has_adapter(model) else {}


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as the base model. Not for passes with gradients."""
    layers = list(adapted_layers(model).values())
    try:
        _switch(layers, on=False)
        yield
    finally:
        _switch(layers, on=True)


def _switch(layers: list[Any], *, on: bool) -> None:
    """PEFT freezes an adapter that it turns off. A sharded parameter must not change so, hence the flags stay."""
    for layer in layers:
        flags = [(p, p.requires_grad) for p in layer.parameters()]
        layer.enable_adapters(on)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The weight that alone does what the layer and its adapter do, in the layer's type; any other layer's own weight.

    A collective where the model is sharded.
    """
    weight = full_tensor(layer.weight.detach())
    if not hasattr(layer, "lora_A"):
        return weight
    a, b = (full_tensor(getattr(layer, part)[ADAPTER].weight.detach()).float() for part in PARTS)
    change = (b @ a) * layer.scaling[ADAPTER]
    return (weight.float() + (change.T if layer.fan_in_fan_out else change)).to(weight.dtype)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by their PEFT names, ``base_model.model.<layer>.lora_A.weight``, in the model's order.

    They share the parameters' memory and have no gradient. Where the model is sharded they are DTensors (see
    ``models.gather.full_tensor``).
    """
    return {
        f"base_model.model.{name}.{part}.weight": getattr(layer, part)[ADAPTER].weight.detach()
        for name, layer in adapted_layers(model).items()
        for part in PARTS
    }


def adapter_config(model: nn.Module, base: str) -> dict[str, Any]:
    """What ``adapter_config.json`` says of the adapter, ready for JSON.

    Args:
        base: folder or hub name of the base model.
    """
    held: Any = model.peft_config[ADAPTER]  # pyright: ignore
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": held.r,
        "lora_alpha": held.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(held.target_modules),
        "fan_in_fan_out": held.fan_in_fan_out,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def save_adapter(model: nn.Module, base: str, folder: Path, *, write: bool = True) -> None:
    """Writes a PEFT folder, which ``PeftModel.from_pretrained`` and engines load; an older one gives way.

    Args:
        write: of the workers of a sharded model, who all call this, the one that does.

    Raises:
        ModelError: something other than an adapter's folder is there. It is left alone.
    """
    tensors = {name: full_tensor(tensor).cpu() for name, tensor in adapter_tensors(model).items()}
    if write:
        write_adapter(tensors, adapter_config(model, base), folder)


def write_adapter(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Writes a PEFT folder of what ``adapter_tensors`` and ``adapter_config`` gave. Errors as ``save_adapter``'s."""
    from safetensors.torch import save_file

    def fill(partial: Path) -> None:
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial / WEIGHTS_FILE, {"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True)
        (partial / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    replace_folder(folder, fill, mark=CONFIG_FILE)
