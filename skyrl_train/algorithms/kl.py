"""Estimates of the KL divergence from the policy to the reference, token by token, and the KL penalty in the reward.

With ``x = logprobs - ref_logprobs`` of a token that the policy sampled (http://joschu.net/blog/kl-approx.html):

    k1   x                  unbiased; its gradient as a loss is 0 on average, so it belongs in the reward
    k2   x^2 / 2            biased, low variance; its gradient as a loss is the KL's
    k3   exp(-x) - 1 + x    unbiased, never negative
    abs  |x|                a distance, not a KL

A name with ``+`` (``k1+``) stands for the straight-through form: the number of the estimator, and the gradient of k2,
which is that of the KL on average.

Every estimator has the signature of ``k1`` and carries a gradient to ``logprobs``; under ``torch.no_grad`` it does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from skyrl_train.algorithms.tensors import LOG_RATIO_LIMIT, at_least_float32, masked_difference, require

K3_LIMIT = 10.0
"""k3 of a token is at most this, as in SkyRL and verl (TRL has no bound). Beyond it, at ``x < -2.6`` or ``x > 11``, the
term is constant: a token that the policy all but gave up does not blow up the loss, and is not pulled back by it."""


def k1(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``logprobs - ref_logprobs``.

    Args:
        logprobs: ``[B, T]``, the policy's.
        ref_logprobs: ``[B, T]``, the reference's; no gradient flows to it.
        mask: ``[B, T]`` bool.

    Returns:
        ``[B, T]`` in nats, 0 where the mask is False.

    Raises:
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    return _log_ratio(logprobs, ref_logprobs, mask)


def k2(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``(logprobs - ref_logprobs)^2 / 2``. Arguments, result and errors as ``k1``."""
    return 0.5 * _log_ratio(logprobs, ref_logprobs, mask).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``exp(-x) - 1 + x``, at most 10. Arguments, result and errors as ``k1``."""
    x = _log_ratio(logprobs, ref_logprobs, mask).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (torch.expm1(-x) + x).clamp(max=K3_LIMIT)  # expm1: exact near 0, where the first update is


def absolute(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``|logprobs - ref_logprobs|``; ``abs`` in the config. Arguments, result and errors as ``k1``."""
    return _log_ratio(logprobs, ref_logprobs, mask).abs()


def k1_straight(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``k1+``: k1 with the gradient of k2. Arguments, result and errors as ``k1``."""
    return _straight_through(k1, logprobs, ref_logprobs, mask)


def k3_straight(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``k3+``: k3 with the gradient of k2, without a bound on it. Arguments, result and errors as ``k1``."""
    return _straight_through(k3, logprobs, ref_logprobs, mask)


def absolute_straight(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``abs+``: the distance with the gradient of k2. Arguments, result and errors as ``k1``."""
    return _straight_through(absolute, logprobs, ref_logprobs, mask)


@torch.no_grad()
def apply_kl_to_rewards(
    rewards: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    estimator: Callable[[Tensor, Tensor, Tensor], Tensor],
    coef: float,
) -> tuple[Tensor, Tensor]:
    """Takes ``coef`` times the KL off the reward of every token that the policy wrote.

    Args:
        rewards: ``[B, T]``; kept as they are where the mask is False.
        logprobs: ``[B, T]``, the policy's at the start of the step.
        ref_logprobs: ``[B, T]``.
        mask: ``[B, T]`` bool, the tokens that are trained.
        estimator: one of this file's, or a user's.
        coef: strength (``kl_loss_coef``, or what the controller has made of it).

    Returns:
        New rewards ``[B, T]``, and the KL ``[B, T]`` in nats, 0 where the mask is False.

    Raises:
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(mask, rewards=rewards)
    kl = estimator(logprobs, ref_logprobs, mask)
    return torch.where(mask, at_least_float32(rewards) - coef * kl, rewards), kl


def _straight_through(
    estimator: Callable[[Tensor, Tensor, Tensor], Tensor], logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor
) -> Tensor:
    with torch.no_grad():
        value = estimator(logprobs, ref_logprobs, mask)
    slope = k2(logprobs, ref_logprobs, mask)
    return value + (slope - slope.detach())


def _log_ratio(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    require(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    return masked_difference(logprobs, ref_logprobs.detach(), mask)
