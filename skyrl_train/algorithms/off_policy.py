"""Off-policy correction: the engine that sampled is not exactly the policy that learns.

It computes in another precision, with other kernels, or with older weights. The ratio of a token,
``exp(old_logprobs - rollout_logprobs)``, says by how much. Both are known before the first update, so the correction is
one weight for every token of the step; policy losses are multiplied by it (the KL and entropy terms are not). Tokens of
weight 0 still count in the denominator of the loss, as in SkyRL.

    token TIS       min(ratio, cap)                             https://fengyao.notion.site/off-policy-rl
    sequence TIS    min(product of the sequence's ratios, cap)
    token mask      0 for tokens outside of bounds              IcePop, https://arxiv.org/abs/2510.18855
    sequence mask   0 for sequences whose product, or geometric mean, is outside of bounds
    outlier mask    0 for sequences of which one token is outside of bounds

Token TIS with PPO's loss is decoupled PPO (``losses_bounded.decoupled``) with a cap.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.tensors import LOG_RATIO_LIMIT, masked_difference, masked_max, masked_mean, masked_min
from skyrl_train.algorithms.tensors import require as require_tensors

if TYPE_CHECKING:
    from skyrl_train.config.algorithm import AlgorithmConfig
    from skyrl_train.config.algorithm_sections import OffPolicyCorrectionConfig


@dataclass(slots=True, kw_only=True)
class Correction:
    """What a correction returns."""

    weights: Tensor
    """``[B, T]`` without gradient: factors of the policy loss; 0 where the mask is False."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """0-d tensors, over the whole batch."""


@torch.no_grad()
def standard(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, config: AlgorithmConfig) -> Correction:
    """What ``off_policy_correction`` describes, in this order: outlier mask, token mask, TIS, sequence mask.

    Each looks at the tokens that those before it have left.

    Args:
        old_logprobs: ``[B, T]``, the learner's at the start of the step.
        rollout_logprobs: ``[B, T]``, the engine's when it sampled.
        mask: ``[B, T]`` bool, the tokens that are trained.
        config: reads ``off_policy_correction``.

    Returns:
        Weights; metrics ``ratio_mean``, ``_std``, ``_max``, ``_min`` over trained tokens, and for each part that is on
        the share of tokens or sequences that it touched.

    Raises:
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require_tensors(mask, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    section = config.off_policy_correction
    log_ratio = masked_difference(old_logprobs, rollout_logprobs, mask)
    ratio = _ratio(log_ratio)
    mean = masked_mean(ratio, mask)
    metrics = {
        "ratio_mean": mean,
        "ratio_std": masked_mean((ratio - mean).square(), mask).sqrt(),
        "ratio_max": masked_max(ratio, mask),
        "ratio_min": masked_min(ratio, mask),
    }
    kept = _without_outliers(ratio, mask, section, metrics)
    kept = _without_stray_tokens(ratio, kept, section, metrics)
    weights = _truncated(log_ratio, ratio, kept, section, metrics)
    kept = _without_stray_sequences(log_ratio, kept, section, metrics)
    metrics["kept_fraction"] = masked_mean(kept.float(), mask)
    return Correction(weights=torch.where(kept, weights, 0.0), metrics=metrics)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _outside(ratio: Tensor, low: float | None, high: float | None) -> tuple[Tensor, Tensor]:
    """Which ratios are under, and over, bounds of which either may be absent."""
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return (never if low is None else ratio < low), (never if high is None else ratio > high)


def _without_outliers(
    ratio: Tensor, mask: Tensor, section: OffPolicyCorrectionConfig, metrics: dict[str, Tensor]
) -> Tensor:
    low, high = section.outlier_token_is_threshold_low, section.outlier_token_is_threshold_high
    if low is None and high is None:
        return mask
    under, over = ((side & mask).any(dim=1) for side in _outside(ratio, low, high))
    live = mask.any(dim=1)
    metrics["outlier_sequences"] = masked_mean((under | over).float(), live)
    metrics["outlier_sequences_low"] = masked_mean(under.float(), live)
    metrics["outlier_sequences_high"] = masked_mean(over.float(), live)
    return mask & ~(under | over)[:, None]


def _without_stray_tokens(
    ratio: Tensor, kept: Tensor, section: OffPolicyCorrectionConfig, metrics: dict[str, Tensor]
) -> Tensor:
    low, high = section.token_mask_is_threshold_low, section.token_mask_is_threshold_high
    if low is None and high is None:
        return kept
    under, over = _outside(ratio, low, high)
    metrics["masked_tokens_low"] = masked_mean(under.float(), kept)
    metrics["masked_tokens_high"] = masked_mean(over.float(), kept)
    return kept & ~(under | over)


def _truncated(
    log_ratio: Tensor, ratio: Tensor, kept: Tensor, section: OffPolicyCorrectionConfig, metrics: dict[str, Tensor]
) -> Tensor:
    if section.tis_ratio_type is None:
        return torch.ones_like(ratio)
    if section.tis_ratio_type == "token":
        cap = section.token_tis_ratio_clip_high
        metrics["capped_tokens"] = masked_mean((ratio > cap).float(), kept)
        return ratio.clamp(max=cap)
    cap = section.sequence_tis_ratio_clip_high
    product = _ratio(torch.where(kept, log_ratio, 0.0).sum(dim=1, keepdim=True))
    metrics["capped_sequences"] = masked_mean((product[:, 0] > cap).float(), kept.any(dim=1))
    return product.clamp(max=cap).expand_as(ratio)


def _without_stray_sequences(
    log_ratio: Tensor, kept: Tensor, section: OffPolicyCorrectionConfig, metrics: dict[str, Tensor]
) -> Tensor:
    if section.sequence_mask_metric is None:
        return kept
    total, live = torch.where(kept, log_ratio, 0.0).sum(dim=1), kept.any(dim=1)
    if section.sequence_mask_metric == "geometric":
        total = total / kept.sum(dim=1).clamp(min=1)
        low, high = section.geo_mask_low, section.geo_mask_high
    else:
        low, high = section.product_mask_low, section.product_mask_high
    under, over = _outside(_ratio(total), low, high)
    metrics["masked_sequences"] = masked_mean((under | over).float(), live)
    metrics["masked_sequences_low"] = masked_mean(under.float(), live)
    metrics["masked_sequences_high"] = masked_mean(over.float(), live)
    return kept & ~(under | over)[:, None]
