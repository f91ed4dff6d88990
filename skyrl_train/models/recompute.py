"""Gradient checkpointing: what a backward pass recomputes, and what it keeps.

full        of each layer its input is kept, and the layer runs again
selective   the output of attention is kept too, so that all but attention runs again. That is the dearest part of a
            layer for long sequences, and its output one of the smaller tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skyrl_train.models.lora import has_adapter

ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_flash_attention_forward",
    "torch_attn::_varlen_attn",
)
"""The operators whose results ``selective`` keeps."""


def recompute_activations(model: Any, *, mode: str, use_reentrant: bool) -> None:
    """Turns gradient checkpointing on; its method got another name in transformers 5.2x, and the old one warns.

    Args:
        mode: "full" or "selective".
        use_reentrant: the older implementation, which knows "full" alone.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    options: dict[str, Any] = {"use_reentrant": use_reentrant}
    if mode == "selective" and not use_reentrant:
        options["context_fn"] = _contexts
    enable(options)
    if use_reentrant and has_adapter(model):
        model.get_input_embeddings().register_forward_hook(_start_gradient)


def _contexts() -> Any:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    kept = isinstance(operator, torch._ops.OpOverload) and operator.name().partition(".")[0] in ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _start_gradient(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """Reentrant checkpointing keeps no gradient if its input has none, as behind a frozen embedding."""
    return output.requires_grad_() if torch.is_grad_enabled() else output
