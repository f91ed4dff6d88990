"""A function of a user's own for each family, named by import path: ``integration.toy_losses:likelihood``."""

from __future__ import annotations

import torch

from skyrl_train.algorithms.advantages import grpo
from skyrl_train.algorithms.losses import PolicyLoss
from skyrl_train.algorithms.off_policy import Correction
from skyrl_train.algorithms.values import ValueLoss


def likelihood(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None) -> PolicyLoss:
    """Advantage-weighted log-likelihood."""
    return PolicyLoss(per_token=-logprobs * advantages, metrics={"mark": torch.tensor(7.0)})


def doubled(rewards, mask, group, config, values=None):
    """GRPO's advantages, times two."""
    advantages, returns = grpo(rewards, mask, group, config)
    return 2 * advantages, returns


def half(mask, group, config):
    """Half the token mean."""
    return mask.float() / mask.sum().clamp(min=1) / 2


def squared(logprobs, ref_logprobs, mask):
    """Twice k2."""
    return torch.where(mask, (logprobs - ref_logprobs).square(), 0.0)


def shifted(rewards, mask, group, config):
    """Every score is 1 more, at the last token."""
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return rewards + last


def evens(old_logprobs, rollout_logprobs, mask, config):
    """Every second token counts."""
    weights = torch.zeros(mask.shape)
    weights[:, ::2] = 1.0
    return Correction(weights=weights, metrics={"mark": torch.tensor(5.0)})


def plain(values, old_values, returns, mask, config):
    """The squared error."""
    return ValueLoss(per_token=torch.where(mask, (values - returns).square(), 0.0), metrics={"mark": torch.tensor(3.0)})
