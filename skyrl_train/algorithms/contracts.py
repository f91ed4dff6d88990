"""What stands between a run and a user's own function: what goes in is clean, what comes out is checked.

Tensors hold 0 where the mask is False, so nothing that stood there reaches a loss or a gradient, whatever the function
multiplies; and they are copies, so nothing is changed in place. What it returns is compared by type, shape and device
at every call, and an error names the key, the function and what is wrong. All of it costs nothing next to a model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skyrl_train.algorithms.losses import PolicyLoss
from skyrl_train.algorithms.off_policy import Correction
from skyrl_train.algorithms.values import ValueLoss
from skyrl_train.errors import ConfigError


def checked(family: str, key: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of a family of ``table.py``, whose result is checked against the mask that it was given.

    Positions outside the mask are 0 in the tensors that it gets and in those that it returns.
    """
    check = _CHECKS[family]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs["mask"] if "mask" in kwargs else args[_MASK[family]]
        clean = [_clean(value, mask) for value in args]
        result = function(*clean, **{name: _clean(value, mask) for name, value in kwargs.items()})
        return check(_Result(key, name, mask), result)

    return call


def _clean(value: Any, mask: Tensor) -> Any:
    """A ``[B, T]`` tensor with 0 where the mask is False, through which no gradient comes back; else the value."""
    wide = isinstance(value, Tensor) and value.is_floating_point() and value.shape == mask.shape
    return torch.where(mask, value, 0.0) if wide else value


class _Result:
    """Builds the errors for one call."""

    def __init__(self, key: str, name: str, mask: Tensor) -> None:
        self.key, self.name, self.mask = key, name, mask

    def wrong(self, what: str, remedy: str) -> ConfigError:
        return ConfigError(self.key, self.name, what, remedy)

    def per_token(self, what: str, value: Any, remedy: str = "") -> Tensor:
        """``value`` as a ``[B, T]`` tensor, 0 outside the mask."""
        if not isinstance(value, Tensor):
            raise self.wrong(f"{what} is a {type(value).__name__}, expected a tensor [B, T].", remedy)
        if value.shape != self.mask.shape:
            shape, expected = list(value.shape), list(self.mask.shape)
            raise self.wrong(f"{what} has shape {shape}, expected {expected}, one value for every token.", remedy)
        if not value.is_floating_point() or value.device != self.mask.device:
            got = f"{value.dtype} on {value.device}"
            raise self.wrong(f"{what} is {got}, expected floating point on {self.mask.device}.", remedy)
        return torch.where(self.mask, value, 0.0)


def _advantages(result: _Result, value: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise result.wrong(f"it returned a {type(value).__name__}.", "Return (advantages, returns), [B, T] each.")
    return result.per_token("advantages", value[0]), result.per_token("returns", value[1])


def _policy_loss(result: _Result, value: Any) -> PolicyLoss:
    return PolicyLoss(**_per_token(result, value, PolicyLoss))


def _value_loss(result: _Result, value: Any) -> ValueLoss:
    return ValueLoss(**_per_token(result, value, ValueLoss))


def _per_token(result: _Result, value: Any, kind: type[PolicyLoss] | type[ValueLoss]) -> dict[str, Any]:
    how = f"Return {kind.__name__}(per_token=[B, T], metrics={{...}}); loss_reduction makes it one number."
    if not isinstance(value, kind):
        raise result.wrong(f"it returned a {type(value).__name__}.", how)
    per_token = result.per_token("per_token", value.per_token, how)
    return {"per_token": per_token, "metrics": _metrics(result, value.metrics)}


def _correction(result: _Result, value: Any) -> Correction:
    if not isinstance(value, Correction):
        raise result.wrong(
            f"it returned a {type(value).__name__}.", "Return Correction(weights=[B, T], metrics={...})."
        )
    weights = result.per_token("weights", value.weights).detach()
    return Correction(weights=weights, metrics=_metrics(result, value.metrics))


def _metrics(result: _Result, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, metric in metrics.items():
        if not isinstance(metric, Tensor) or metric.numel() != 1:
            raise result.wrong(f"metric {name!r} is not a 0-d tensor.", "Reduce it over the mask, and detach it.")
    return {name: metric.detach().reshape(()) for name, metric in metrics.items()}


def _tensor(result: _Result, value: Any) -> Tensor:
    return result.per_token("the result", value)


def _weights(result: _Result, value: Any) -> Tensor:
    return result.per_token(
        "the result", value, "Return the weight of every token: the loss is sum(per_token * weights)."
    )


_MASK = {
    "advantage_estimator": 1, "policy_loss": 3, "value_loss": 3, "kl_estimator": 2, "loss_reduction": 0,
    "off_policy_correction": 2, "reward_shaping": 1,
}  # fmt: skip
_CHECKS: dict[str, Callable[[_Result, Any], Any]] = {
    "advantage_estimator": _advantages,
    "policy_loss": _policy_loss,
    "value_loss": _value_loss,
    "kl_estimator": _tensor,
    "loss_reduction": _weights,
    "off_policy_correction": _correction,
    "reward_shaping": _tensor,
}
