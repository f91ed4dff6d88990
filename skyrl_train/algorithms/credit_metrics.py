"""What a step's credit looks like, as numbers. The names are in ``docs/metrics.md``."""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_train.algorithms.groups import EQUAL, group_stats, scores
from skyrl_train.algorithms.tensors import masked_max, masked_mean
from skyrl_train.algorithms.values import explained_variance
from skyrl_train.batch import TrainBatch


@torch.no_grad()
def of_rewards(batch: TrainBatch) -> dict[str, float]:
    """Over sequences, and over groups of more than one: those of equal scores are dead, their gradient is 0."""
    score = scores(batch.rewards, batch.response_mask)
    stats = group_stats(score, batch.group)
    share = 1 / stats.size  # a row's share of its group, so that sums over rows count groups
    compared = stats.size > 1
    dead = compared & (stats.spread <= EQUAL)
    groups = (share * compared).sum().clamp(min=1).item()
    return {
        "reward/mean": score.mean().item(),
        "reward/std": score.std(correction=0).item(),
        "reward/min": score.min().item(),
        "reward/max": score.max().item(),
        "groups/dead_fraction": (share * dead).sum().item() / groups,
        "groups/std_mean": (share * compared * stats.std).sum().item() / groups,
    }


@torch.no_grad()
def of_advantages(advantages: Tensor, mask: Tensor) -> dict[str, float]:
    """Over the True positions of ``mask``."""
    return _spread("advantage", advantages, mask) | {
        "advantage/abs_mean": masked_mean(advantages.abs(), mask).item(),
        "advantage/abs_max": masked_max(advantages.abs(), mask).item(),
    }


@torch.no_grad()
def of_returns(returns: Tensor, values: Tensor | None, mask: Tensor) -> dict[str, float]:
    """The returns, and where there is a critic its values at the start of the step against them."""
    spread = _spread("return", returns, mask)
    if values is None:
        return spread
    explained = {"value/explained_variance": explained_variance(values, returns, mask).item()}
    return spread | _spread("value", values, mask) | explained


def _spread(name: str, values: Tensor, mask: Tensor) -> dict[str, float]:
    mean = masked_mean(values, mask)
    return {
        f"{name}/mean": mean.item(),
        f"{name}/std": masked_mean((values - mean).square(), mask).sqrt().item(),
    }
