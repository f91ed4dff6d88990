"""Which tokens top-k, top-p and min-p leave: one function, for the engine that samples and the learner that scores."""

from __future__ import annotations

import torch
from torch import Tensor


def kept(
    probs: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, *, joint: bool = False
) -> Tensor:
    """Which tokens the filters leave, ``[R, V]`` bool; at least the most likely one of each row.

    Args:
        probs: ``[R, V]``, each row sums to 1.
        top_k: ``[R, 1]`` int64 (V is off), or None. Of equally likely tokens the lower id is taken.
        top_p: ``[R, 1]`` (1 is off), or None: the smallest set of the likeliest tokens that holds this share.
        min_p: ``[R, 1]`` (0 is off), or None: at least this fraction of the likeliest token's probability.
        joint: top-p looks at all tokens, as SGLang does it; else at what top-k has left, as transformers and vLLM.
    """
    keep = torch.ones_like(probs, dtype=torch.bool)
    if top_k is not None or top_p is not None:
        ordered, index = torch.sort(probs, stable=True, dim=-1, descending=True)
        left = torch.ones_like(keep)
        if top_k is not None:
            left &= torch.arange(probs.shape[1], device=probs.device) < top_k
            ordered = ordered if joint else ordered * left
        if top_p is not None:
            before = ordered.cumsum(-1) - ordered
            left &= (before < top_p * ordered.sum(-1, keepdim=True)) | (top_p >= 1)
        keep = torch.zeros_like(keep).scatter_(1, index, left)
    if min_p is not None:
        keep &= probs >= min_p * probs.amax(-1, keepdim=True)
    return keep
