"""Policy losses that keep the policy near by other means than clipping each token's ratio.

Every loss has the signature of ``losses.regular``; what is not said here is as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.losses import (
    PolicyLoss,
    clipped_surrogate,
    log_ratio_to,
    masked_advantages,
    ratio_metrics,
    share,
)
from skyrl_train.algorithms.tensors import (
    at_least_float32,
    masked_difference,
    masked_max,
    masked_mean,
    require,
    row_mean,
)
from skyrl_train.errors import ConfigError

if TYPE_CHECKING:
    from skyrl_train.config.algorithm import AlgorithmConfig

GSPO_LIMIT = 10.0
"""Largest log of GSPO's ratio, as in SkyRL and verl."""
BINARY_EPSILON = 1e-8
"""Keeps the logarithm of DPPO's binary KL finite, as in SkyRL."""


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    rollout_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """GSPO, https://arxiv.org/abs/2507.18071, in its token form (equations 14 and 15).

    Every token of a sequence has the ratio ``s = exp(mean over its tokens of logprobs - old_logprobs)``, clipped as in
    ``regular``; the gradient goes through the token's own log-prob. It is defined with
    ``loss_reduction=sequence_mean``. The ratio metrics are those of ``s``.
    """
    require(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    difference = masked_difference(logprobs, old_logprobs.detach(), mask)
    sequence = row_mean(difference, mask).detach()
    log_ratio = torch.where(mask, sequence + difference - difference.detach(), 0.0).clamp(max=GSPO_LIMIT)
    per_token, metrics = clipped_surrogate(log_ratio.exp(), masked_advantages(advantages, mask), mask, config)
    return PolicyLoss(per_token=per_token, metrics=ratio_metrics(log_ratio, mask) | metrics)


def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    rollout_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """SAPO, https://arxiv.org/abs/2511.20347, equations 5 and 6: a soft gate in place of the clip.

    ``-4 / tau sigmoid(tau (r - 1)) A``, with ``tau`` ``sapo.tau_pos`` for positive advantages and ``sapo.tau_neg`` for
    the others. It is defined with ``loss_reduction=sequence_mean``. One metric more: ``gate_mean``, the mean derivative
    of the gate, 1 at ratio 1.
    """
    require(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio, advantages = log_ratio_to(old_logprobs, logprobs, mask), masked_advantages(advantages, mask)
    tau = torch.where(advantages > 0, config.sapo.tau_pos, config.sapo.tau_neg).to(log_ratio.dtype)
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1))
    slope = masked_mean((4 * gate * (1 - gate)).detach(), mask)
    per_token = torch.where(mask, -4 / tau * gate * advantages, 0.0)
    return PolicyLoss(per_token=per_token, metrics=ratio_metrics(log_ratio, mask) | {"gate_mean": slope})


def dppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    rollout_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """DPPO, https://arxiv.org/abs/2602.04879, equations 12 to 14: a bound on the divergence, not on the ratio.

    ``-r A``, and 0 for tokens that moved too far in the direction of their advantage. With ``p`` the probability of the
    token then and ``q`` now, far is ``|q - p| > delta`` (``binary_tv``) or a KL between the two-point distributions
    above delta (``binary_kl``); delta is ``dppo.delta_high`` for positive advantages, ``dppo.delta_low`` for negative.

    Then is when the engine sampled (``rollout_logprobs``), or the start of the step where that is not given. Metrics
    ``clip_fraction_low`` and ``clip_fraction_high``: tokens left out, by side.
    """
    require(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, rollout_logprobs=rollout_logprobs
    )
    behaviour = old_logprobs if rollout_logprobs is None else rollout_logprobs
    log_ratio, advantages = log_ratio_to(behaviour, logprobs, mask), masked_advantages(advantages, mask)
    with torch.no_grad():
        then = torch.where(mask, at_least_float32(behaviour), 0.0)
        moved = torch.where(mask, at_least_float32(logprobs), 0.0).exp() - then.exp()
        far = moved.abs() if config.dppo.dppo_type == "binary_tv" else _binary_kl(then, log_ratio)
        out_high = (advantages > 0) & (moved > 0) & (far > config.dppo.delta_high)
        out_low = (advantages < 0) & (moved < 0) & (far > config.dppo.delta_low)
    per_token = torch.where(mask & ~(out_high | out_low), -log_ratio.exp() * advantages, 0.0)
    metrics = {"clip_fraction_low": share(out_low, mask), "clip_fraction_high": share(out_high, mask)}
    return PolicyLoss(per_token=per_token, metrics=ratio_metrics(log_ratio, mask) | metrics)


def decoupled(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    rollout_logprobs: Tensor | None = None,
) -> PolicyLoss:
    """Decoupled PPO, https://arxiv.org/abs/2110.00641, equation 4: behaviour, proximal and current policy are three.

    ``-(proximal / behaviour) min(r A, clip(r) A)`` with ``r`` = current / proximal. Behaviour is who sampled
    (``rollout_logprobs``), proximal the policy at the start of the step (``old_logprobs``). It equals ``regular`` with
    ``off_policy_correction.tis_ratio_type=token`` and no cap. Metric ``behaviour_weight_mean`` and its ``_max``.

    Raises:
        ConfigError: ``rollout_logprobs`` is not given.
    """
    require(
        mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, rollout_logprobs=rollout_logprobs
    )
    behaviour = needs_rollout("decoupled", rollout_logprobs)
    log_ratio, advantages = log_ratio_to(old_logprobs, logprobs, mask), masked_advantages(advantages, mask)
    weight = log_ratio_to(behaviour, old_logprobs.detach(), mask).exp()
    clipped, metrics = clipped_surrogate(log_ratio.exp(), advantages, mask, config)
    metrics["behaviour_weight_mean"] = masked_mean(weight, mask)
    metrics["behaviour_weight_max"] = masked_max(weight, mask)
    return PolicyLoss(per_token=weight * clipped, metrics=ratio_metrics(log_ratio, mask) | metrics)


def needs_rollout(name: str, rollout_logprobs: Tensor | None) -> Tensor:
    """``rollout_logprobs``.

    Raises:
        ConfigError: it is None.
    """
    if rollout_logprobs is None:
        raise ConfigError(
            "trainer.algorithm.policy_loss_type", name, "needs the engine's log-probs.", "Pass rollout_logprobs."
        )
    return rollout_logprobs


def _binary_kl(then: Tensor, log_ratio: Tensor) -> Tensor:
    """KL from (p, 1 - p) to (q, 1 - q), where ``then`` is log p and ``log_ratio`` is log q - log p."""
    p, q = then.exp(), (then + log_ratio).exp()
    rest = ((1 - p + BINARY_EPSILON) / (1 - q + BINARY_EPSILON).clamp(min=BINARY_EPSILON)).log()
    return p * -log_ratio + (1 - p) * rest
