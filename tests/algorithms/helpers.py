"""Shared by the tests of this folder: random cases, calls of any function by its name, and functions of users."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skyrl_train.algorithms.cases import Case, Subject, random_case, tensor_of
from skyrl_train.algorithms.losses import PolicyLoss
from skyrl_train.algorithms.off_policy import Correction
from skyrl_train.algorithms.table import FAMILIES
from skyrl_train.algorithms.values import ValueLoss
from skyrl_train.batch import TrainBatch
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.algorithm_sections import (
    CispoConfig,
    ClipCovConfig,
    DppoConfig,
    KLCovConfig,
    OffPolicyCorrectionConfig,
)

__all__ = ["random_case", "tensor_of"]

BAD = (float("nan"), float("inf"), float("-inf"))
BUILT_IN = [(family, name) for family, facts in FAMILIES.items() for name in facts.functions]


def named(*families: str) -> list[tuple[str, str]]:
    """(family, name) of every built-in function of these families."""
    return [(family, name) for family, name in BUILT_IN if family in families]


def busy_config(**changes: Any) -> AlgorithmConfig:
    """A config in which every option does something to a random case."""
    settings: dict[str, Any] = {
        "gamma": 0.9, "lambd": 0.8, "max_seq_len": 8, "eps_clip_low": 0.2, "eps_clip_high": 0.3,
        "overlong_penalty": "soft", "overlong_buffer_len": 2, "overlong_max_len": 4, "reward_scale": 2.0,
        "reward_clip": [-1.5, 1.5],
        "clip_cov": ClipCovConfig(clip_ratio=0.3, clip_cov_lb=-0.5, clip_cov_ub=2.0),
        "kl_cov": KLCovConfig(kl_cov_frac=0.3),
        "cispo": CispoConfig(cispo_eps_clip_low=0.2, cispo_eps_clip_high=0.3),
        "dppo": DppoConfig(delta_low=0.05, delta_high=0.05),
        "off_policy_correction": OffPolicyCorrectionConfig(
            tis_ratio_type="sequence", sequence_tis_ratio_clip_high=1.5, sequence_mask_metric="geometric",
            geo_mask_low=0.8, geo_mask_high=1.2, outlier_token_is_threshold_high=1.9, token_mask_is_threshold_low=0.7,
        ),
    }  # fmt: skip
    return AlgorithmConfig(**(settings | changes))


def call(family: str, name: str, case: Case, config: AlgorithmConfig | None = None, **extra: Any) -> Any:
    """Calls a function with a case's tensors, by the names of its parameters."""
    return Subject(family, name, config or busy_config()).call(case, **extra)


def batch(rewards: Tensor, response_mask: Tensor, group: list[int], loss_mask: Tensor | None = None) -> TrainBatch:
    """A batch with the fields that credit reads."""
    rows, width = rewards.shape
    return TrainBatch(
        prompt_ids=torch.zeros(rows, 1, dtype=torch.long),
        prompt_lengths=torch.ones(rows, dtype=torch.long),
        response_ids=torch.zeros(rows, width, dtype=torch.long),
        response_mask=response_mask,
        loss_mask=response_mask.clone() if loss_mask is None else loss_mask,
        rollout_logprobs=torch.zeros(rows, width),
        rewards=rewards,
        group=torch.tensor(group),
    )


def my_estimator(rewards, mask, group, config, values=None):
    """Every token's own reward is its advantage."""
    return rewards * 2, rewards


def my_loss(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None, strength=1.0):
    return PolicyLoss(per_token=-strength * advantages * logprobs, metrics={"mine": logprobs.mean()})


def my_value_loss(values, old_values, returns, mask, config):
    return ValueLoss(per_token=(values - returns).abs(), metrics={"mine": values.mean()})


def my_kl(logprobs, ref_logprobs, mask):
    return (logprobs - ref_logprobs) ** 4


def my_weights(mask, group, config):
    return torch.full(mask.shape, 0.25)


def my_correction(old_logprobs, rollout_logprobs, mask, config):
    return Correction(weights=torch.full(mask.shape, 0.5), metrics={"mine": old_logprobs.mean()})


def my_rewards(rewards, mask, group, config):
    return rewards - 1


def skyrl_style_loss(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None):
    return (-advantages * log_probs).mean(), {}


def reduces_itself(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    return (-advantages * logprobs)[mask].mean()


def reduced_field(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    return PolicyLoss(per_token=logprobs.mean())


def metric_number(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    return PolicyLoss(per_token=logprobs, metrics={"mine": 0.5})  # pyright: ignore[reportArgumentType]


def one_tensor(rewards, mask, group, config, values=None):
    return rewards


def per_sequence(rewards, mask, group, config, values=None):
    return rewards.sum(1), rewards.sum(1)


def wants_more(mask, group, config, temperature):
    return mask


def bool_weights(mask, group, config):
    return mask


def bare_weights(old_logprobs, rollout_logprobs, mask, config):
    return old_logprobs - rollout_logprobs


not_a_function = 3
