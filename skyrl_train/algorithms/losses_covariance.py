"""Clip-Cov and KL-Cov, https://arxiv.org/abs/2505.22617: single tokens drive the entropy down, and those are held back.

They are the tokens whose log-prob and advantage are both above, or both below, their means over the batch: the product
of the two deviations is the token's covariance. Which tokens stand out depends on the whole mini-batch, so a chooser
looks at it before it is cut into micro-batches, and the loss gets its answer as ``chosen``. A loss of a user's own
names its chooser with ``@whole_batch(chooser)`` in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

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
from skyrl_train.algorithms.tensors import at_least_float32, masked_mean, require

if TYPE_CHECKING:
    from skyrl_train.config.algorithm import AlgorithmConfig

Loss = TypeVar("Loss", bound=Callable[..., PolicyLoss])


def whole_batch(chooser: Callable[..., Tensor]) -> Callable[[Loss], Loss]:
    """Marks a policy loss that takes ``chosen``, ``[B, T]`` bool.

    Args:
        chooser: ``(logprobs, old_logprobs, advantages, mask, config) -> chosen``, given the whole mini-batch at the
            weights before its update. This costs one more forward pass an update.
    """

    def mark(loss: Loss) -> Loss:
        loss.__dict__["chooser"] = chooser
        return loss

    return mark


def chooser_of(loss: Callable[..., Any]) -> Callable[..., Tensor] | None:
    """The chooser of a policy loss, if it has one."""
    return getattr(loss, "chooser", None)


@torch.no_grad()
def choose_clip_cov(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, config: AlgorithmConfig
) -> Tensor:
    """The tokens that Clip-Cov leaves out (equation 11), ``[B, T]`` bool.

    A share ``clip_cov.clip_ratio`` of the True positions, at least one, drawn from those whose covariance lies between
    ``clip_cov_lb`` and ``clip_cov_ub`` and whose ratio is not clipped anyway. The draw is a function of the tokens' own
    numbers: neither the order of rows, nor padding, nor a random state enters.
    """
    cov, advantages = _covariance(logprobs, advantages, mask), masked_advantages(advantages, mask)
    ratio = log_ratio_to(old_logprobs, logprobs, mask).exp()
    low, high = 1 - config.eps_clip_low, 1 + config.eps_clip_high
    clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    candidates = mask & ~clipped & (cov > config.clip_cov.clip_cov_lb) & (cov < config.clip_cov.clip_cov_ub)
    count = max(int(config.clip_cov.clip_ratio * int(mask.sum())), 1)
    return _drawn(candidates, count, logprobs, old_logprobs, advantages)


@torch.no_grad()
def choose_kl_cov(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, config: AlgorithmConfig
) -> Tensor:
    """The tokens that get KL-Cov's penalty (equation 12), ``[B, T]`` bool: the ``kl_cov_frac`` of highest covariance.

    At least one. Among equals, the tokens' own numbers decide as in ``choose_clip_cov``.
    """
    tokens = int(mask.sum())
    count = min(max(1, int(config.kl_cov.kl_cov_frac * tokens)), tokens)
    cov = torch.where(mask, _covariance(logprobs, advantages, mask), -torch.inf)
    if not count:
        return torch.zeros_like(mask)
    last = cov.flatten().topk(count, sorted=False).values.min()
    above = cov > last
    equal = (cov == last) & mask
    return above | _drawn(equal, count - int(above.sum()), logprobs, old_logprobs, masked_advantages(advantages, mask))


@whole_batch(choose_clip_cov)
def clip_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    rollout_logprobs: Tensor | None = None,
    chosen: Tensor | None = None,
) -> PolicyLoss:
    """Clip-Cov: ``regular``, and 0 for the chosen tokens.

    Args:
        chosen: ``[B, T]`` bool; None: by ``choose_clip_cov`` from the tensors given.

    The others, result and errors as ``losses.regular``; one metric more, ``chosen_fraction``.
    """
    require(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if chosen is None:
        chosen = choose_clip_cov(logprobs, old_logprobs, advantages, mask, config)
    log_ratio = log_ratio_to(old_logprobs, logprobs, mask)
    clipped, metrics = clipped_surrogate(log_ratio.exp(), masked_advantages(advantages, mask), mask, config)
    metrics["chosen_fraction"] = share(chosen, mask)
    per_token = torch.where(chosen, 0.0, clipped)
    return PolicyLoss(per_token=per_token, metrics=ratio_metrics(log_ratio, mask) | metrics)


@whole_batch(choose_kl_cov)
def kl_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: AlgorithmConfig,
    rollout_logprobs: Tensor | None = None,
    chosen: Tensor | None = None,
) -> PolicyLoss:
    """KL-Cov: ``-r A`` without a clip, plus ``kl_cov.ppo_kl_coef |logprobs - old_logprobs|`` for the chosen tokens.

    Args:
        chosen: ``[B, T]`` bool; None: by ``choose_kl_cov`` from the tensors given.

    The others, result and errors as ``losses.regular``; metrics ``chosen_fraction`` and no clip fractions.
    """
    require(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if chosen is None:
        chosen = choose_kl_cov(logprobs, old_logprobs, advantages, mask, config)
    log_ratio = log_ratio_to(old_logprobs, logprobs, mask)
    surrogate = -log_ratio.exp() * masked_advantages(advantages, mask)
    per_token = surrogate + torch.where(chosen & mask, config.kl_cov.ppo_kl_coef * log_ratio.abs(), 0.0)
    metrics = ratio_metrics(log_ratio, mask) | {"chosen_fraction": share(chosen, mask)}
    return PolicyLoss(per_token=per_token, metrics=metrics)


def _covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """``(A - mean A) (log p - mean log p)`` of every token, the means over True positions; ``[B, T]`` float64."""
    a = torch.where(mask, at_least_float32(advantages), 0.0).double()
    x = torch.where(mask, at_least_float32(logprobs), 0.0).double()
    return (a - masked_mean(a, mask)) * (x - masked_mean(x, mask))


def _drawn(mask: Tensor, count: int, *values: Tensor) -> Tensor:
    """``[B, T]`` bool: ``count`` of the True positions (all, if there are fewer), as if drawn at random.

    They are those with the smallest hashes of the numbers that stand there.
    """
    mixed = torch.zeros(int(mask.sum()), dtype=torch.int64, device=mask.device)
    for value in values:
        bits = (value[mask].double() + 0.0).view(torch.int64)  # + 0.0: minus zero is zero
        mixed = (mixed ^ bits) * -7046029254386353131  # 2^64 / golden ratio, odd: a bijection that spreads the bits
        mixed = mixed ^ (mixed >> 29) ^ (mixed >> 47)
    picked = torch.zeros_like(mixed, dtype=torch.bool)
    picked[mixed.topk(min(count, len(mixed)), largest=False, sorted=False).indices] = True
    chosen = torch.zeros_like(mask)
    chosen[mask] = picked
    return chosen
