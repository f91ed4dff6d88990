"""What is done to a batch before credit is assigned: what a reward is worth, and which sequences stay in the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.groups import EQUAL, group_stats, scores
from skyrl_train.algorithms.tensors import at_least_float32, require, require_group
from skyrl_train.errors import ConfigError

if TYPE_CHECKING:
    from skyrl_train.config.algorithm import AlgorithmConfig


@torch.no_grad()
def standard(rewards: Tensor, mask: Tensor, group: Tensor, config: AlgorithmConfig) -> Tensor:
    """What the config describes, in this order: overlong penalty, ``reward_scale``, ``reward_clip``, ``reward_level``.

    Args:
        rewards: ``[B, T]``, the env's.
        mask: ``[B, T]`` bool, the tokens that the policy wrote.
        group: ``[B]`` integers.
        config: the section ``trainer.algorithm``.

    Returns:
        New rewards ``[B, T]``, 0 where the mask is False.

    Raises:
        ConfigError: an overlong penalty without a maximum.
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(mask, rewards=rewards)
    require_group(group, mask)
    rewards = torch.where(mask, at_least_float32(rewards), 0.0)
    if config.overlong_penalty is not None:
        rewards = overlong_penalty(rewards, mask, config)
    rewards = rewards * config.reward_scale
    if config.reward_clip is not None:
        rewards = torch.where(mask, rewards.clamp(*config.reward_clip), 0.0)
    if config.reward_level == "trajectory":
        total = scores(rewards, mask).to(rewards.dtype)
        rewards = torch.where(last_true(mask), total[:, None], 0.0)
    return rewards


@torch.no_grad()
def overlong_penalty(rewards: Tensor, mask: Tensor, config: AlgorithmConfig) -> Tensor:
    """DAPO's overlong reward shaping, https://arxiv.org/abs/2503.14476, section 3.4, on the row's last True position.

    With L the maximum (``overlong_max_len``), C the buffer, f the factor, and n the True positions of the row::

        soft    0 up to L - C, then f (n - (L - C)) / C taken off, f beyond L          (equation 13)
        hard    f taken off from L on
        zero    as soft up to L; beyond L the row's rewards become 0                   (SkyRL's example)

    (The third way of that paper, leaving cut responses out of the loss, is ``generator.apply_overlong_filtering``.)

    Returns:
        ``[B, T]``.

    Raises:
        ConfigError: there is no maximum.
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(mask, rewards=rewards)
    longest, kind = config.overlong_max_len, config.overlong_penalty
    if longest is None:
        raise ConfigError(
            "trainer.algorithm.overlong_max_len", None, "the overlong penalty needs the maximum.",
            "Set it to the most tokens that the policy may write.",
        )  # fmt: skip
    length = mask.sum(dim=1)
    if kind == "hard":
        part = (length >= longest).to(rewards.dtype)
    else:
        buffer = config.overlong_buffer_len
        part = ((length - (longest - buffer)) / buffer).clamp(0, 1).to(rewards.dtype)
    penalty = config.overlong_buffer_penalty_factor * part
    shaped = rewards - torch.where(last_true(mask), penalty[:, None], 0.0)
    return torch.where((length > longest)[:, None], 0.0, shaped) if kind == "zero" else shaped


def last_true(mask: Tensor) -> Tensor:
    """``[B, T]`` bool: the last True position of each row, if it has one."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


@torch.no_grad()
def zero_variance_filter(
    rewards: Tensor, mask: Tensor, group: Tensor, live: Tensor | None = None, tolerance: float = EQUAL
) -> Tensor:
    """Which rows to keep: all but those of a group whose scores are all equal, which has nothing to teach.

    As in SkyRL, the rows stay in the batch and their loss mask becomes 0, so ``token_mean`` no longer counts their
    tokens; only live rows are compared; and a group with one live row is kept.

    Args:
        rewards: ``[B, T]``, before any KL penalty.
        mask: ``[B, T]`` bool, the response's tokens.
        group: ``[B]`` integers.
        live: ``[B]`` bool, rows that have a trained token; None: all.
        tolerance: scores within this of each other count as equal.

    Returns:
        ``[B]`` bool.

    Raises:
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(mask, rewards=rewards)
    require_group(group, mask)
    live = torch.ones_like(group, dtype=torch.bool) if live is None else live
    stats = group_stats(scores(rewards, mask)[live], group[live])
    keep = torch.ones_like(live)
    keep[live] = (stats.spread > tolerance) | (stats.size == 1)
    return keep
