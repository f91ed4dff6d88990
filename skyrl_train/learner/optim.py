"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.optim.lr_scheduler import LambdaLR

from skyrl_train.errors import ConfigError

if TYPE_CHECKING:
    from skyrl_train.config.models import OptimizerConfig


def make_optimizer(parameters: Sequence[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), fused into one kernel."""
    first, second = config.adam_betas
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=(first, second), weight_decay=config.weight_decay, fused=True
    )


def make_scheduler(optimizer: torch.optim.Optimizer, name: str, warmup_updates: int, total_updates: int) -> LambdaLR:
    """A schedule of transformers by its name; ``total_updates`` is where a decaying one ends.

    Raises:
        ConfigError: transformers has no such schedule, or it needs parameters of its own.
    """
    from transformers import get_scheduler

    try:
        made = get_scheduler(name, optimizer, num_warmup_steps=warmup_updates, num_training_steps=total_updates)
    except (ValueError, KeyError, TypeError) as error:
        key = "trainer.policy.optimizer_config.scheduler"
        raise ConfigError(key, name, f"transformers cannot make it ({error}).", "Use constant_with_warmup.") from error
    assert isinstance(made, LambdaLR), "every name that the config admits is a factor of the base rate"
    return made


def go_to(scheduler: LambdaLR, updates: int) -> None:
    """Sets the learning rate to that after ``updates`` updates of this schedule, as if they had been made with it."""
    scheduler.last_epoch = updates
    rates = [base * factor(updates) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
