"""Scores of trajectories, and their statistics over groups: index operations, no loop over rows.

All of it runs in float64 on ``[B]`` tensors, which costs nothing there, and a mean is counted from the smallest score.
So the deviation of equal scores is an exact 0. (The float32 mean of three scores of 0.1 is not 0.1, and GRPO would
divide the residue by a tiny deviation.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EQUAL = 1e-6
"""Scores of a group that lie within this of each other count as equal (SkyRL's ``zero_variance_filter_tol``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """Statistics of a row's group, one entry a row, ``[B]``."""

    size: Tensor
    """int64."""
    mean: Tensor
    std: Tensor
    """Unbiased (divided by ``size - 1``), as ``torch.std``; 0 for a group of one."""
    spread: Tensor
    """Largest score minus smallest."""


def baseline(values: Tensor, stats: GroupStats, *, leave_one_out: bool) -> Tensor:
    """What a row is compared with, ``[B]``: the mean of its group, or of the others in it; 0 for a group of one."""
    n = stats.size
    mean = stats.mean
    if leave_one_out:
        mean = mean - (values.double() - mean) / (n - 1).clamp(min=1)
    return torch.where(n == 1, 0.0, mean)


def weighted_baseline(
    values: Tensor, weights: Tensor, group: Tensor, stats: GroupStats, *, leave_one_out: bool
) -> Tensor:
    """As ``baseline``, with the mean weighted by ``weights`` ``[B]``; the plain mean where all weights are 0."""
    ids, place = torch.unique(group, return_inverse=True)
    weights, deviation = weights.double(), values.double() - stats.mean
    zeros = deviation.new_zeros(len(ids))
    total = zeros.index_add(0, place, weights)[place]
    weighted = zeros.index_add(0, place, weights * deviation)[place]
    if leave_one_out:
        total, weighted = total - weights, weighted - weights * deviation
    mean = stats.mean + torch.where(total > 0, weighted / torch.where(total > 0, total, 1.0), 0.0)
    return torch.where(stats.size == 1, 0.0, mean)


def scores(rewards: Tensor, mask: Tensor) -> Tensor:
    """``[B]`` float64: the sum of a sequence's rewards ``[B, T]`` where the mask is True."""
    return torch.where(mask, rewards, 0.0).sum(dim=1, dtype=torch.float64)


def group_stats(values: Tensor, group: Tensor) -> GroupStats:
    """Statistics of ``values`` ``[B]`` over the rows that share a number in ``group`` ``[B]``.

    The numbers need not be in order, nor without gaps.
    """
    ids, place = torch.unique(group, return_inverse=True)
    values = values.double()
    zeros = values.new_zeros(len(ids))
    size = torch.zeros_like(ids, dtype=torch.long).index_add(0, place, torch.ones_like(place))
    low = zeros.scatter_reduce(0, place, values, "amin", include_self=False)
    mean = low + zeros.index_add(0, place, values - low[place]) / size
    squares = zeros.index_add(0, place, (values - mean[place]).square())
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    high = zeros.scatter_reduce(0, place, values, "amax", include_self=False)
    return GroupStats(size=size[place], mean=mean[place], std=std[place], spread=(high - low)[place])
