"""Advantage estimators that compare a trajectory with others of its prompt: one advantage for all of its tokens.

Those that look at when a reward came are in ``returns.py``. Every estimator has the signature of ``grpo``. None of them
carries a gradient. A score is the sum of a trajectory's rewards; equal scores in a group give exactly 0.

    grpo       (score - mean) / std         the group's mean and unbiased deviation
    dr_grpo     score - mean
    rloo        score - mean of the others
    maxrl      (score - mean) / mean
    opo         score - mean weighted by length
    remax       rewards still to come - score of a greedy trajectory
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.groups import GroupStats, group_stats, scores, weighted_baseline
from skyrl_train.algorithms.groups import baseline as group_baseline
from skyrl_train.algorithms.tensors import TensorError, at_least_float32, centre, count, require, require_group
from skyrl_train.errors import ConfigError

if TYPE_CHECKING:
    from skyrl_train.config.algorithm import AlgorithmConfig

STD_EPSILON = 1e-6
"""Added to the group's standard deviation (SkyRL and verl: 1e-6; TRL: 1e-4; OpenRLHF: 1e-9)."""
MEAN_EPSILON = 1e-6
"""Added to the group's mean in MaxRL, as SkyRL does."""


@torch.no_grad()
def grpo(
    rewards: Tensor, mask: Tensor, group: Tensor, config: AlgorithmConfig, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GRPO, https://arxiv.org/abs/2402.03300, equation in 4.1.2: ``(score - mean of the group) / std of the group``.

    A sequence's score is the sum of its rewards, and every token of it gets the same advantage. The deviation is the
    unbiased one. A group of one has nothing to compare with: as in SkyRL and verl its mean counts as 0 and its
    deviation as 1, so the advantage is the score itself. A group of equal scores gets exactly 0. With
    ``grpo_norm_by_std=false`` the division is left out (Dr. GRPO); with ``grpo_std_over=batch`` the deviation is that
    of all scores, as in https://arxiv.org/abs/2508.08221.

    Args:
        rewards: ``[B, T]``.
        mask: ``[B, T]`` bool, the response's tokens. Sequences that are left out of the loss have theirs too, so that
            their score counts in the group.
        group: ``[B]`` integers; rows with the same number answer the same prompt.
        config: reads ``grpo_norm_by_std``, ``grpo_std_over`` and ``leave_one_out_baseline``.
        values: not used.

    Returns:
        Advantages and returns, ``[B, T]`` each, 0 where the mask is False. GRPO's are one and the same tensor.

    Raises:
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    score, stats = _compared(rewards, mask, group)
    advantage = score - group_baseline(score, stats, leave_one_out=config.leave_one_out_baseline)
    if config.grpo_norm_by_std:
        std = stats.std if config.grpo_std_over == "group" else group_stats(score, torch.zeros_like(group)).std
        advantage = advantage / (torch.where(stats.size == 1, 1.0, std) + STD_EPSILON)
    return _on_every_token(advantage, rewards, mask)


@torch.no_grad()
def dr_grpo(
    rewards: Tensor, mask: Tensor, group: Tensor, config: AlgorithmConfig, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.2: ``score - mean of the group``.

    The other half of it is ``loss_reduction=seq_mean_token_sum_norm``. Arguments, result and errors as ``grpo``.
    """
    score, stats = _compared(rewards, mask, group)
    advantage = score - group_baseline(score, stats, leave_one_out=config.leave_one_out_baseline)
    return _on_every_token(advantage, rewards, mask)


@torch.no_grad()
def rloo(
    rewards: Tensor, mask: Tensor, group: Tensor, config: AlgorithmConfig, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RLOO, https://arxiv.org/abs/2402.14740, equation 8: ``score - mean score of the others in the group``.

    A group of one gets 0, as in SkyRL (verl: its score). Arguments, result and errors as ``grpo``.
    """
    score, stats = _compared(rewards, mask, group)
    advantage = score - group_baseline(score, stats, leave_one_out=True)
    return _on_every_token(torch.where(stats.size == 1, 0.0, advantage), rewards, mask)


@torch.no_grad()
def maxrl(
    rewards: Tensor, mask: Tensor, group: Tensor, config: AlgorithmConfig, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """MaxRL, https://arxiv.org/abs/2602.02710: ``(score - mean of the group) / mean of the group``.

    It is meant for rewards of 0 and 1, where the mean is the share of successes. A group of one gets its score. A
    negative mean turns the sign around, as in SkyRL. Arguments, result and errors as ``grpo``.
    """
    score, stats = _compared(rewards, mask, group)
    relative = (score - stats.mean) / (stats.mean + MEAN_EPSILON)
    return _on_every_token(torch.where(stats.size == 1, score, relative), rewards, mask)


@torch.no_grad()
def opo(
    rewards: Tensor, mask: Tensor, group: Tensor, config: AlgorithmConfig, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """OPO, https://arxiv.org/abs/2505.23585, equation 8: ``score - sum(length score) / sum(length)`` of the group.

    Lengths count the True positions of the mask. A group of one gets its score. Arguments, result and errors as
    ``grpo``.
    """
    score, stats = _compared(rewards, mask, group)
    weighted = weighted_baseline(
        score, mask.sum(dim=1), group, stats, leave_one_out=config.leave_one_out_baseline
    )  # fmt: skip
    return _on_every_token(score - weighted, rewards, mask)


@torch.no_grad()
def remax(
    rewards: Tensor,
    mask: Tensor,
    group: Tensor,
    config: AlgorithmConfig,
    values: Tensor | None = None,
    baseline: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ReMax, https://arxiv.org/abs/2310.10505, equation 3: rewards still to come minus a greedy trajectory's score.

    Args:
        baseline: ``[B]``, the score of the prompt's greedy trajectory. An estimator that has this parameter makes the
            generator play one for each prompt.

    The others as ``grpo``. Returns advantages and returns ``[B, T]``; the returns are the rewards still to come.

    Raises:
        ConfigError: there is no baseline.
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(mask, rewards=rewards)
    require_group(group, mask)
    if baseline is None:
        raise ConfigError(
            "trainer.algorithm.advantage_estimator", "remax", "needs the score of a greedy trajectory of each prompt.",
            "Pass baseline.",
        )  # fmt: skip
    if baseline.shape != group.shape or not baseline.is_floating_point():
        shape, dtype = list(baseline.shape), baseline.dtype
        raise TensorError(f"baseline: shape {shape}, dtype {dtype}, expected floating [B] = {list(group.shape)}.")
    rewards = torch.where(mask, at_least_float32(rewards), 0.0)
    to_come = torch.where(mask, rewards.flip(1).cumsum(1).flip(1), 0.0)
    return torch.where(mask, to_come - baseline.to(to_come.dtype)[:, None], 0.0), to_come


@torch.no_grad()
def batch_normalize(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all True tokens of the step (``advantage_batch_normalize``), ``[B, T]``.

    The variance is divided by the number of tokens and is at least 1e-8, as in SkyRL. SkyRL's mean runs over padding
    too, which depends on the longest response of the batch; ours runs over the tokens that are trained.

    Raises:
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(mask, advantages=advantages)
    centred = centre(at_least_float32(advantages), mask)
    variance = centred.square().sum(dtype=torch.float64) / count(mask).clamp(min=1)
    return centred * variance.clamp(min=1e-8).rsqrt().to(centred.dtype)


def _compared(rewards: Tensor, mask: Tensor, group: Tensor) -> tuple[Tensor, GroupStats]:
    """Scores ``[B]`` and their statistics over groups."""
    require(mask, rewards=rewards)
    require_group(group, mask)
    score = scores(rewards, mask)
    return score, group_stats(score, group)


def _on_every_token(advantage: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    per_token = torch.where(mask, advantage.to(at_least_float32(rewards).dtype)[:, None], 0.0)
    return per_token, per_token
