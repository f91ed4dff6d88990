"""Policy losses: the loss of every token. How they become one number is ``reductions.py``'s business.

Every loss has the signature of ``regular``. With ``r = exp(logprobs - old_logprobs)`` and ``sg`` for no gradient:

    here                 regular, dual_clip                        the ratio clipped
    losses_bounded       gspo, sapo, dppo, decoupled               the ratio bounded otherwise
    losses_weighted      cispo, rollout_is, importance_sampling,   weights on log-probs, or none
                         reinforce, cross_entropy
    losses_covariance    clip_cov, kl_cov                          single tokens chosen from the whole mini-batch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.tensors import (
    LOG_RATIO_LIMIT,
    at_least_float32,
    count,
    masked_difference,
    masked_max,
    masked_mean,
    masked_min,
    require,
)

if TYPE_CHECKING:
    from skyrl_train.config.algorithm import AlgorithmConfig

SILENT = frozenset({
    "regular", "dual_clip", "gspo", "sapo", "dppo", "decoupled", "cispo", "rollout_is", "importance_sampling",
    "reinforce",
})  # fmt: skip
"""Losses whose gradient is 0 where the advantage is 0, so that such a sequence need not be computed."""


@dataclass(slots=True, kw_only=True)
class PolicyLoss:
    """What a policy loss returns."""

    per_token: Tensor
    """``[B, T]`` with gradient; 0 where the mask is False."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """0-d tensors without gradient: the mean over the tokens given, or the extreme if the name ends in ``_max`` or
    ``_min``. ``merge_metrics`` puts those of several micro-batches together by these rules."""


def regular(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    rollout_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate, https://arxiv.org/abs/1707.06347, equation 7, with a bound for each side.

    ``-min(r A, clip(r, 1 - eps_clip_low, 1 + eps_clip_high) A)`` with ``r = exp(logprobs - old_logprobs)``. Unequal
    bounds are DAPO's clip-higher, https://arxiv.org/abs/2503.14476, equation 10.

    Args:
        logprobs: ``[B, T]``, at this gradient step.
        old_logprobs: ``[B, T]``, at the start of the step.
        advantages: ``[B, T]``.
        mask: ``[B, T]`` bool, the tokens that are trained.
        config: reads ``eps_clip_low`` and ``eps_clip_high``.
        rollout_logprobs: not used.

    Returns:
        The loss of every token; metrics ``ratio_mean``, ``ratio_max``, ``ratio_min``, ``clip_fraction_low`` (negative
        advantage, ratio under the lower bound), ``clip_fraction_high`` (positive advantage, ratio over the upper one)
        and ``old_kl`` (k3 estimate of how far the policy is from the start of the step, nats a token).

    Raises:
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio = log_ratio_to(old_logprobs, logprobs, mask)
    ratio, advantages = log_ratio.exp(), masked_advantages(advantages, mask)
    per_token, metrics = clipped_surrogate(ratio, advantages, mask, config)
    return PolicyLoss(per_token=per_token, metrics=ratio_metrics(log_ratio, mask) | metrics)


def dual_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    rollout_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """Dual-clip PPO, https://arxiv.org/abs/1912.09729, equation 5: ``regular``, but at most ``-c A`` for negative A.

    ``c`` is ``clip_ratio_c``. Arguments, result and errors as ``regular``; one metric more, ``clip_fraction_dual``.
    """
    require(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio = log_ratio_to(old_logprobs, logprobs, mask)
    ratio, advantages = log_ratio.exp(), masked_advantages(advantages, mask)
    clipped, metrics = clipped_surrogate(ratio, advantages, mask, config)
    bound = -config.clip_ratio_c * advantages
    metrics["clip_fraction_dual"] = share((clipped > bound) & (advantages < 0), mask)
    per_token = torch.where(advantages < 0, torch.minimum(clipped, bound), clipped)
    return PolicyLoss(per_token=per_token, metrics=ratio_metrics(log_ratio, mask) | metrics)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, mask: Tensor, config: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-min(ratio A, clip(ratio) A)`` of every token, and the clip fractions by side."""
    low, high = 1 - config.eps_clip_low, 1 + config.eps_clip_high
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    metrics = {
        "clip_fraction_low": share((ratio < low) & (advantages < 0), mask),
        "clip_fraction_high": share((ratio > high) & (advantages > 0), mask),
    }
    return per_token, metrics


def log_ratio_to(behaviour: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    """``logprobs - behaviour`` within plus and minus 20, 0 where the mask is False; no gradient to ``behaviour``."""
    return masked_difference(logprobs, behaviour.detach(), mask).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def masked_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages without gradient, 0 where the mask is False."""
    return torch.where(mask, at_least_float32(advantages.detach()), 0.0)


@torch.no_grad()
def ratio_metrics(log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Mean and extremes of the ratio, and the k3 estimate of the KL from whom it is relative to."""
    ratio = log_ratio.exp()
    return {
        "ratio_mean": masked_mean(ratio, mask),
        "ratio_max": masked_max(ratio, mask),
        "ratio_min": masked_min(ratio, mask),
        "old_kl": masked_mean(ratio - log_ratio - 1, mask),
    }


@torch.no_grad()
def share(chosen: Tensor, mask: Tensor) -> Tensor:
    """Which part of the True positions is chosen, 0-d."""
    return count(chosen & mask) / count(mask).clamp(min=1)


def merge_metrics(parts: Sequence[Mapping[str, float]], tokens: Sequence[float]) -> dict[str, float]:
    """Metrics of a mini-batch from those of its micro-batches, as if it had not been split.

    Args:
        parts: the metrics of each micro-batch, as numbers; all have the same names.
        tokens: the trained tokens in each micro-batch.
    """
    total = sum(tokens)
    merged: dict[str, float] = {}
    for name in parts[0] if parts else ():
        # a micro-batch without tokens has no extreme: its 0 stands for nothing
        present = [(part[name], n) for part, n in zip(parts, tokens, strict=True) if n]
        if name.endswith("_max"):
            merged[name] = max((value for value, _ in present), default=0.0)
        elif name.endswith("_min"):
            merged[name] = min((value for value, _ in present), default=0.0)
        else:
            merged[name] = sum(value * n for value, n in present) / max(total, 1)
    return merged


def merge_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a step from those of its updates: the mean, or the extreme where the name says so."""
    names = dict.fromkeys(name for update in updates for name in update)
    found = {name: [{name: update[name]} for update in updates if name in update] for name in names}
    return {name: merge_metrics(each, [1.0] * len(each))[name] for name, each in found.items()}
