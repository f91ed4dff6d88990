"""The critic's loss, and how good its values were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.tensors import at_least_float32, masked_difference, masked_mean, require

if TYPE_CHECKING:
    from skyrl_train.config.algorithm import AlgorithmConfig


@dataclass(slots=True, kw_only=True)
class ValueLoss:
    """What a value loss returns."""

    per_token: Tensor
    """``[B, T]`` with gradient; 0 where the mask is False."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """As ``PolicyLoss.metrics``."""


def clipped(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, config: AlgorithmConfig) -> ValueLoss:
    """``max((v - R)^2, (old + clip(v - old, -c, c) - R)^2) / 2``, the form of PPO's reference implementation.

    ``c`` is ``value_clip``; None leaves the clip out.

    Args:
        values: ``[B, T]``, the critic's at this gradient step.
        old_values: ``[B, T]``, at the start of the step.
        returns: ``[B, T]``.
        mask: ``[B, T]`` bool, the tokens whose value is learned.
        config: reads ``value_clip``.

    Returns:
        The loss of every token; metrics ``clip_fraction`` (tokens where the clipped error is the larger one), ``mean``
        and ``error`` (mean absolute difference to the return).

    Raises:
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(mask, values=values, old_values=old_values, returns=returns)
    returns = torch.where(mask, at_least_float32(returns.detach()), 0.0)
    new = torch.where(mask, at_least_float32(values), 0.0)
    squares, bounded = (new - returns).square(), None
    if config.value_clip is not None:
        moved = masked_difference(values, old_values.detach(), mask).clamp(-config.value_clip, config.value_clip)
        bounded = (torch.where(mask, at_least_float32(old_values.detach()), 0.0) + moved - returns).square()
    loss = squares if bounded is None else torch.maximum(squares, bounded)
    with torch.no_grad():
        cut = torch.zeros_like(mask) if bounded is None else bounded > squares
        metrics = {
            "clip_fraction": masked_mean(cut.float(), mask),
            "mean": masked_mean(new, mask),
            "error": masked_mean((new - returns).abs(), mask),
        }
    return ValueLoss(per_token=torch.where(mask, 0.5 * loss, 0.0), metrics=metrics)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """``1 - var(returns - values) / var(returns)`` over True positions, 0-d.

    1 is perfect, 0 no better than a constant; 0 too where the returns do not vary.

    Raises:
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(mask, values=values, returns=returns)
    spread = _variance(torch.where(mask, returns, 0.0).double(), mask)
    rest = _variance(masked_difference(returns, values, mask).double(), mask)
    return torch.where(spread > 0, 1 - rest / torch.where(spread > 0, spread, 1.0), 0.0)


def _variance(values: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((values - masked_mean(values, mask)).square(), mask)
