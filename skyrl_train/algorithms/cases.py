"""Random cases for the functions of every family, and what a function makes of one: value, gradient, metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skyrl_train.algorithms.losses import PolicyLoss
from skyrl_train.algorithms.losses_covariance import chooser_of
from skyrl_train.algorithms.off_policy import Correction
from skyrl_train.algorithms.table import FAMILIES, only_accepted, resolve
from skyrl_train.algorithms.values import ValueLoss
from skyrl_train.config.algorithm import AlgorithmConfig

Case = dict[str, Tensor]
"""Tensors by the names of parameters."""
LEARNED = {"policy_loss": "logprobs", "value_loss": "values", "kl_estimator": "logprobs"}
"""The parameter that gradients flow to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a function made of a case."""

    tensor: Tensor
    """``[B, T]``: the per-token loss, the advantages, the weights, the rewards."""
    gradient: Tensor | None
    """Of the tensor's sum, by what is learned; None in families that learn nothing."""
    metrics: dict[str, float]


def random_case(seed: int, rows: int = 6, width: int = 5, dtype: torch.dtype = torch.float64) -> Case:
    """Tensors for every family, and a mask of which every row keeps a different number of tokens, possibly none."""
    draw = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(rows, width, generator=draw, dtype=dtype)

    logprobs = -torch.rand(rows, width, generator=draw, dtype=dtype) * 2
    case = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + normal(0.4),
        "ref_logprobs": logprobs + normal(0.4),
        "advantages": normal(),
        "mask": torch.rand(rows, width, generator=draw) < 0.6,
        "group": torch.randint(0, 3, (rows,), generator=draw),
    }
    case |= {"rollout_logprobs": case["old_logprobs"] + normal(0.3), "rewards": normal(), "returns": normal()}
    case |= {"values": normal(), "old_values": normal()}
    for name in ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs"):
        case[name] = case[name].clamp(max=-1e-3)
    return case | {"baseline": torch.randn(rows, generator=draw, dtype=dtype)}


class Subject:
    """A function of a family, called with cases."""

    def __init__(self, family: str, name: str, config: AlgorithmConfig) -> None:
        self.family, self.name, self.config = family, name, config

    def call(self, case: Case, **extra: Any) -> Any:
        """What the function returns for the case's tensors, given by the names of its parameters."""
        function = resolve(self.family, self.name)
        given = case | {"config": self.config}
        optional = {"micro_batch_size": 2, "baseline": case["baseline"]} | extra
        return function(*(given[p] for p in FAMILIES[self.family].parameters), **only_accepted(function, **optional))

    def run(self, case: Case, **extra: Any) -> Outcome:
        """The outcome, with the gradient of its sum."""
        case, learned = dict(case), LEARNED.get(self.family)
        if learned:
            case[learned] = case[learned].detach().clone().requires_grad_()
        result = self.call(case, **extra)
        tensor = tensor_of(result)
        gradient = torch.zeros_like(case[learned]) if learned else None
        if learned and tensor.requires_grad:
            (found,) = torch.autograd.grad(tensor.sum(), case[learned], allow_unused=True)
            gradient = gradient if found is None else found
        metrics = {name: value.item() for name, value in getattr(result, "metrics", {}).items()}
        return Outcome(tensor=tensor.detach(), gradient=gradient, metrics=metrics)

    def chosen(self, case: Case) -> dict[str, Tensor]:
        """What a loss that looks at the whole mini-batch is told of it."""
        chooser = chooser_of(resolve(self.family, self.name)) if self.family == "policy_loss" else None
        if chooser is None:
            return {}
        tensors = (case[name] for name in ("logprobs", "old_logprobs", "advantages", "mask"))
        return {"chosen": chooser(*tensors, self.config)}


def tensor_of(result: Any) -> Tensor:
    """The ``[B, T]`` tensor that a result is about."""
    if isinstance(result, PolicyLoss | ValueLoss):
        return result.per_token
    if isinstance(result, Correction):
        return result.weights
    return result[0] if isinstance(result, tuple) else result
