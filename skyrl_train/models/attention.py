"""One attention function for every transformers model, whose layout is chosen per call.

A model loaded with ``attn_implementation=NAME`` computes ordinary attention, unless its forward is called with
``plan=``: then the plan decides which token sees which. That lets the learner run packed sequences, and the embedded
engine run a KV cache, through the model's own modules and parameters, whatever the architecture.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "skyrl"


class AttentionPlan(Protocol):
    """Which token attends to which, for one forward pass over tokens laid out as ``[1, N]`` or ``[rows, 1]``."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        """Attention of one layer.

        Args:
            layer: index of the layer.
            q: ``[batch, heads, tokens, head_dim]``, rotary embedding applied.
            k, v: ``[batch, kv_heads, tokens, head_dim]``; kv_heads divides heads.
            scale: factor of the scores before the softmax.
            window: sliding window in tokens, or None.

        Returns:
            ``[batch, tokens, heads, head_dim]``.
        """
        ...


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if plan is None:
        return sdpa_attention_forward(  # pyright: ignore[reportReturnType]
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with soft-capping or sinks has no packed form here")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _follow(plan, module, query, key, value, scale, sliding_window), None


@torch.compiler.disable()
def _follow(
    plan: AttentionPlan, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """A plan is another one for every batch: what is compiled stops before it and goes on after it."""
    return plan.attend(module.layer_idx, q, k, v, scale=scale, window=window)


def no_mask(like: Tensor) -> Tensor:
    """Passed as ``attention_mask`` with a plan: transformers hands a 4-D mask through instead of building its own."""
    return torch.zeros(1, 1, 1, 1, device=like.device)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
