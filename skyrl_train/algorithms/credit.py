"""``assign_credit``: from a scored batch to advantages.

rewards ── shaping ── zero-variance filter ── KL penalty ── estimator ── batch normalisation ──> advantages, returns
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms import credit_metrics
from skyrl_train.algorithms.advantages import batch_normalize
from skyrl_train.algorithms.groups import scores
from skyrl_train.algorithms.kl import apply_kl_to_rewards
from skyrl_train.algorithms.shaping import zero_variance_filter
from skyrl_train.algorithms.table import only_accepted, resolve
from skyrl_train.algorithms.tensors import masked_max, masked_mean, require, require_group
from skyrl_train.batch import TrainBatch
from skyrl_train.errors import ConfigError, EnvError

if TYPE_CHECKING:
    from skyrl_train.config.algorithm import AlgorithmConfig


@torch.no_grad()
def assign_credit(batch: TrainBatch, config: AlgorithmConfig, kl_coef: float | None = None) -> dict[str, float]:
    """Sets ``batch.advantages`` and ``batch.returns``; narrows ``batch.loss_mask`` if ``zero_variance_filter`` is on.

    ``batch.rewards`` stay the env's.

    Args:
        batch: with ``old_logprobs`` and ``ref_logprobs`` where ``use_kl_in_reward`` is on, and ``values`` and
            ``baselines`` where the estimator needs them.
        config: the section ``trainer.algorithm``.
        kl_coef: strength of the KL penalty; None: ``kl_loss_coef``.

    Returns:
        Metrics of the step: ``reward/*`` over sequences, ``groups/*`` over prompts, ``advantage/*`` and ``return/*``
        over trained tokens, ``kl/*`` where there is a KL penalty, ``value/*`` where there is a critic.

    Raises:
        EnvError: a reward is not finite.
        ConfigError: a function is not known, breaks its signature, or lacks what it needs.
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(batch.response_mask, rewards=batch.rewards)
    require_group(batch.group, batch.response_mask)
    _require_finite(batch)
    metrics = credit_metrics.of_rewards(batch)
    written = written_mask(batch)
    rewards = resolve("reward_shaping", config.reward_shaping)(batch.rewards, written, batch.group, config)
    metrics["reward/shaped_mean"] = scores(rewards, written).mean().item()
    if config.zero_variance_filter:
        live = batch.loss_mask.any(dim=1)
        keep = zero_variance_filter(rewards, written, batch.group, live, config.zero_variance_filter_tol)
        batch.loss_mask = batch.loss_mask & keep[:, None]
        metrics["groups/filtered_sequences"] = float((~keep).sum())
    rewards, kl_metrics = _penalised(batch, rewards, config, config.kl_loss_coef if kl_coef is None else kl_coef)
    mask = estimator_mask(batch, written, config)
    estimator = resolve("advantage_estimator", config.advantage_estimator)
    extra = only_accepted(estimator, baseline=batch.baselines)
    advantages, returns = estimator(rewards, mask, batch.group, config, batch.values, **extra)
    if config.advantage_batch_normalize:
        advantages = batch_normalize(advantages, batch.loss_mask)
    batch.advantages = torch.where(batch.response_mask, advantages, 0.0)
    batch.returns = torch.where(batch.response_mask, returns, 0.0)
    metrics |= kl_metrics | credit_metrics.of_advantages(batch.advantages, batch.loss_mask)
    return metrics | credit_metrics.of_returns(batch.returns, batch.values, batch.loss_mask)


def written_mask(batch: TrainBatch) -> Tensor:
    """``[B, T]`` bool: tokens that the policy wrote, or that carry a reward; of sequences left out of the loss, all."""
    paid = batch.response_mask & (batch.rewards != 0)
    return torch.where(batch.loss_mask.any(dim=1, keepdim=True), batch.loss_mask | paid, batch.response_mask)


def estimator_mask(batch: TrainBatch, written: Tensor, config: AlgorithmConfig) -> Tensor:
    """``[B, T]`` bool: the tokens that exist for the estimator and for the critic (``observation_tokens``)."""
    return batch.response_mask if config.observation_tokens == "count" else written


def _require_finite(batch: TrainBatch) -> None:
    bad = (batch.response_mask & ~torch.isfinite(batch.rewards)).any(dim=1).nonzero().squeeze(1).tolist()
    if bad:
        value = scores(batch.rewards, batch.response_mask)[bad[0]].item()
        raise EnvError(
            f"rewards: sequence {bad[0]} of the batch (prompt {int(batch.group[bad[0]])} of the step) has the reward "
            f"{value}, and {len(bad)} of {len(batch)} sequences are like it. An env returns finite rewards."
        )


def _penalised(
    batch: TrainBatch, rewards: Tensor, config: AlgorithmConfig, coef: float
) -> tuple[Tensor, dict[str, float]]:
    """The rewards that the estimator sees. The penalty covers the tokens that are trained."""
    if not config.use_kl_in_reward:
        return rewards, {}
    if batch.ref_logprobs is None or batch.old_logprobs is None:
        missing = "ref_logprobs" if batch.ref_logprobs is None else "old_logprobs"
        raise ConfigError(
            "trainer.algorithm.use_kl_in_reward", True, f"the KL penalty needs {missing}, and the batch has none.",
            "Load a reference model, or set it to false.",
        )  # fmt: skip
    estimator = resolve("kl_estimator", config.kl_estimator_type)
    rewards, kl = apply_kl_to_rewards(rewards, batch.old_logprobs, batch.ref_logprobs, batch.loss_mask, estimator, coef)
    metrics = {
        "kl/reward_mean": masked_mean(kl, batch.loss_mask).item(),
        "kl/reward_max": masked_max(kl, batch.loss_mask).item(),
        "kl/reward_coef": float(coef),
    }
    return rewards, metrics
