"""Advantage estimators that look at when a reward came: the rewards still to come, discounted for each token.

All have the signature of ``advantages.grpo``. Positions where the mask is False do not exist for them: neither their
rewards nor their values enter, and no discount is taken for passing them. Which tokens those are is the caller's choice
(``observation_tokens``): padding always, the env's tokens if they are to be skipped.

    reinforce++            whiten(sum of gamma^k reward)
    reinforce++_baseline   whiten(score - mean of the group)
    gae                    whiten(sum of (gamma lambda)^k delta),  delta = reward + gamma next value - value
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.groups import baseline, group_stats, scores
from skyrl_train.algorithms.tensors import at_least_float32, require, require_group, whiten
from skyrl_train.errors import ConfigError

if TYPE_CHECKING:
    from skyrl_train.config.algorithm import AlgorithmConfig


@torch.no_grad()
def reinforce_plus_plus(
    rewards: Tensor, mask: Tensor, group: Tensor, config: AlgorithmConfig, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """REINFORCE++, https://arxiv.org/abs/2501.03262, equations 2 and 3: discounted returns, whitened over the batch.

    Args:
        rewards: ``[B, T]``.
        mask: ``[B, T]`` bool.
        group: ``[B]`` integers; not used.
        config: reads ``gamma``.
        values: not used.

    Returns:
        Advantages (mean 0 and variance 1 over all True tokens) and returns, ``[B, T]`` each, 0 where the mask is False.

    Raises:
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(mask, rewards=rewards)
    require_group(group, mask)
    returns = backward_sum(at_least_float32(rewards), mask, config.gamma)
    return whiten(returns, mask), returns


@torch.no_grad()
def reinforce_plus_plus_baseline(
    rewards: Tensor, mask: Tensor, group: Tensor, config: AlgorithmConfig, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """REINFORCE++ with a baseline, same paper: ``score - mean of the group``, whitened over the batch.

    As in verl the whitening is over tokens, so that long responses weigh more in it, the returns are the advantages,
    and a group of one is compared with 0. Reads ``leave_one_out_baseline``. Arguments and errors as ``reinforce++``.
    """
    require(mask, rewards=rewards)
    require_group(group, mask)
    score = scores(rewards, mask)
    advantage = score - baseline(score, group_stats(score, group), leave_one_out=config.leave_one_out_baseline)
    advantages = whiten(advantage.to(at_least_float32(rewards).dtype)[:, None].expand(mask.shape), mask)
    return advantages, advantages


@torch.no_grad()
def gae(
    rewards: Tensor, mask: Tensor, group: Tensor, config: AlgorithmConfig, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, https://arxiv.org/abs/1506.02438, equation 16, whitened over the batch.

    The value after the last True token is 0.

    Args:
        rewards: ``[B, T]``.
        mask: ``[B, T]`` bool.
        group: ``[B]`` integers; not used.
        config: reads ``gamma`` and ``lambd``.
        values: ``[B, T]``, the critic's estimate before each token.

    Returns:
        Advantages, whitened as in SkyRL, verl and TRL, and returns (advantages before whitening plus values),
        ``[B, T]`` each, 0 where the mask is False.

    Raises:
        ConfigError: there are no values.
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(mask, rewards=rewards, values=values)
    require_group(group, mask)
    if values is None:
        raise ConfigError(
            "trainer.algorithm.advantage_estimator", "gae", "needs values, and there is no critic.",
            "Set trainer.critic.model.path.",
        )  # fmt: skip
    values = torch.where(mask, at_least_float32(values), 0.0)
    delta = torch.where(mask, at_least_float32(rewards), 0.0) + config.gamma * _next_values(values, mask) - values
    advantages = backward_sum(delta, mask, config.gamma * config.lambd)
    return whiten(advantages, mask), torch.where(mask, advantages + values, 0.0)


def backward_sum(terms: Tensor, mask: Tensor, decay: float) -> Tensor:
    """``x_t = terms_t + decay x_next`` over the True positions of each row, from the last to the first, ``[B, T]``.

    The loop is over time, on whole columns; without decay there is none.
    """
    terms = torch.where(mask, terms, 0.0)
    if decay == 1.0:
        return torch.where(mask, terms.flip(1).cumsum(1).flip(1), 0.0)
    columns, present = terms.t().contiguous(), mask.t().contiguous()  # a column's rows side by side in memory
    running = columns.new_zeros(columns.shape[1:])
    for t in reversed(range(len(columns))):
        running = torch.where(present[t], columns[t] + decay * running, running)
        columns[t] = running
    return torch.where(mask, columns.t(), 0.0)


def _next_values(values: Tensor, mask: Tensor) -> Tensor:
    """The value at the next True position of the row, 0 after the last, ``[B, T]``."""
    rows, width = mask.shape
    place = torch.arange(width, device=mask.device).expand(rows, width)
    first = torch.where(mask, place, width).flip(1).cummin(1).values.flip(1)  # the first True position from here on
    end = torch.full_like(first[:, :1], width)
    following = torch.cat([first[:, 1:], end], dim=1)
    return torch.cat([values, values.new_zeros(rows, 1)], dim=1).gather(1, following)
