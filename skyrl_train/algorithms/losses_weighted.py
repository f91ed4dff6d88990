"""Policy losses whose weight carries no gradient: what is learned is the log-prob, weighted, or the ratio as it is.

Every loss has the signature of ``losses.regular``; what is not said here is as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.losses import PolicyLoss, log_ratio_to, masked_advantages, ratio_metrics, share
from skyrl_train.algorithms.losses_bounded import needs_rollout
from skyrl_train.algorithms.tensors import at_least_float32, require

if TYPE_CHECKING:
    from skyrl_train.config.algorithm import AlgorithmConfig


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    rollout_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """CISPO, https://arxiv.org/abs/2506.13585, equations 4 and 5: ``-sg(clip(r)) A log p``; every token has a gradient.

    The clip is from ``1 - cispo.cispo_eps_clip_low`` to ``1 + cispo.cispo_eps_clip_high``. With
    ``cispo.cispo_anchor=rollout`` the ratio is relative to the engine's log-probs. Metrics ``clip_fraction_low`` and
    ``clip_fraction_high`` count tokens beyond a bound, whatever their advantage.

    Raises:
        ConfigError: ``cispo_anchor=rollout``, and ``rollout_logprobs`` is not given.
    """
    require(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, rollout_logprobs=rollout_logprobs
    )
    anchored = config.cispo.cispo_anchor == "rollout"
    log_ratio = log_ratio_to(needs_rollout("cispo", rollout_logprobs) if anchored else old_logprobs, logprobs, mask)
    low, high = 1 - config.cispo.cispo_eps_clip_low, 1 + config.cispo.cispo_eps_clip_high
    ratio = log_ratio.detach().exp()
    metrics = {"clip_fraction_low": share(ratio < low, mask), "clip_fraction_high": share(ratio > high, mask)}
    per_token = -ratio.clamp(low, high) * masked_advantages(advantages, mask) * _masked(logprobs, mask)
    return PolicyLoss(per_token=per_token, metrics=ratio_metrics(log_ratio, mask) | metrics)


def rollout_is(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    rollout_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """GLM-5's loss, https://arxiv.org/abs/2602.15763, section 4.1.2: ``-sg(r) A log p`` inside the bounds, else 0.

    ``r`` is relative to the engine's log-probs, so a policy that has moved, or an engine that computes otherwise, is
    corrected for in one. Inside is strictly between ``1 - eps_clip_low`` and ``1 + eps_clip_high``.

    Raises:
        ConfigError: ``rollout_logprobs`` is not given.
    """
    require(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, rollout_logprobs=rollout_logprobs
    )
    log_ratio = log_ratio_to(needs_rollout("rollout_is", rollout_logprobs), logprobs, mask)
    low, high = 1 - config.eps_clip_low, 1 + config.eps_clip_high
    ratio = log_ratio.detach().exp()
    metrics = {"clip_fraction_low": share(ratio <= low, mask), "clip_fraction_high": share(ratio >= high, mask)}
    weight = torch.where((ratio > low) & (ratio < high), ratio, 0.0)
    per_token = -weight * masked_advantages(advantages, mask) * _masked(logprobs, mask)
    return PolicyLoss(per_token=per_token, metrics=ratio_metrics(log_ratio, mask) | metrics)


def importance_sampling(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    rollout_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """The surrogate without a clip: ``-r A``, https://arxiv.org/abs/1707.06347, equation 6."""
    require(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio = log_ratio_to(old_logprobs, logprobs, mask)
    per_token = -log_ratio.exp() * masked_advantages(advantages, mask)
    return PolicyLoss(per_token=per_token, metrics=ratio_metrics(log_ratio, mask))


def reinforce(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    rollout_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """REINFORCE (Williams 1992, https://doi.org/10.1007/BF00992696, equation 11): ``-A log p``.

    ``old_logprobs`` only tell how far the policy has moved: with several updates a step, none is corrected for that.
    """
    require(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    per_token = -masked_advantages(advantages, mask) * _masked(logprobs, mask)
    return PolicyLoss(per_token=per_token, metrics=ratio_metrics(log_ratio_to(old_logprobs, logprobs, mask), mask))


def cross_entropy(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    rollout_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """Imitation: ``-log p`` of every token, whatever its advantage. For trajectories that are worth imitating.

    ``advantages`` are not read.
    """
    require(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    per_token = -_masked(logprobs, mask)
    return PolicyLoss(per_token=per_token, metrics=ratio_metrics(log_ratio_to(old_logprobs, logprobs, mask), mask))


def _masked(logprobs: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, at_least_float32(logprobs), 0.0)
