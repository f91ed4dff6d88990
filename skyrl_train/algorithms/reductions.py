"""How the losses of tokens become one number: a weight for every token of the whole mini-batch.

The loss of an update is ``sum(per_token * weights)``. The weights come from the whole mini-batch, before it is split,
so adding up the parts gives the same number however the rows are cut into micro-batches or dealt out to ranks. (A mean
for each micro-batch, averaged, is another number whenever the parts hold different token counts.)

With N trained tokens, B sequences, n tokens in the token's own sequence:

    token_mean                 1 / N               every token counts the same
    sequence_mean              1 / (B n)           every sequence counts the same
    prompt_mean                1 / (P n_prompt)    every prompt counts the same
    seq_mean_token_sum_norm    1 / (B max_seq_len) a fixed divisor (Dr. GRPO, https://arxiv.org/abs/2503.20783)
    token_mean_legacy          1 / (M n_micro)     every micro-batch counts the same: results depend on its size

P prompts, n_prompt the tokens in the samples of the token's prompt, M micro-batches, n_micro the tokens in the token's.
B and P count those without a trained token too, as in SkyRL (verl leaves them out). Every reduction has the signature
of ``token_mean``. The same weights reduce the KL and entropy terms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.table import only_accepted, resolve
from skyrl_train.algorithms.tensors import count, require, require_group
from skyrl_train.errors import ConfigError

if TYPE_CHECKING:
    from skyrl_train.config.algorithm import AlgorithmConfig


def token_mean(mask: Tensor, group: Tensor, config: AlgorithmConfig) -> Tensor:
    """Every trained token of the mini-batch counts the same.

    Args:
        mask: ``[B, T]`` bool, the tokens that are trained, of the whole mini-batch.
        group: ``[B]`` integers, the prompt of each sequence.
        config: the section ``trainer.algorithm``.

    Returns:
        Weights ``[B, T]`` float32, 0 where the mask is False.
    """
    return mask.float() / count(mask).clamp(min=1)


def sequence_mean(mask: Tensor, group: Tensor, config: AlgorithmConfig) -> Tensor:
    """The mean over a sequence's tokens, then over sequences. Arguments and result as ``token_mean``."""
    return mask.float() / (mask.sum(dim=1, keepdim=True).clamp(min=1) * max(len(mask), 1))


def seq_mean_token_sum_norm(mask: Tensor, group: Tensor, config: AlgorithmConfig) -> Tensor:
    """The sum over a sequence's tokens divided by ``max_seq_len``, then the mean over sequences.

    Arguments and result as ``token_mean``.

    Raises:
        ConfigError: ``max_seq_len`` is not set.
    """
    if not config.max_seq_len:
        raise ConfigError(
            "trainer.algorithm.max_seq_len", config.max_seq_len, "seq_mean_token_sum_norm divides by it.",
            "Set it to the most tokens a response can have.",
        )  # fmt: skip
    return mask.float() / (config.max_seq_len * max(len(mask), 1))


def prompt_mean(mask: Tensor, group: Tensor, config: AlgorithmConfig) -> Tensor:
    """The mean over all tokens of a prompt's samples, then over prompts. Arguments and result as ``token_mean``."""
    ids, place = torch.unique(group, return_inverse=True)
    tokens = torch.zeros_like(ids).index_add(0, place, mask.sum(dim=1))
    return mask.float() / (tokens.clamp(min=1) * max(len(ids), 1))[place][:, None]


def token_mean_legacy(
    mask: Tensor, group: Tensor, config: AlgorithmConfig, micro_batch_size: int | None = None
) -> Tensor:
    """The mean over a micro-batch's tokens, then over micro-batches: what ``token_mean`` was in older packages.

    Kept for runs that must be repeated. It counts tokens in short micro-batches more, and another micro-batch size is
    another loss.

    Args:
        micro_batch_size: rows in a micro-batch; the last may have fewer.

    The others and the result as ``token_mean``.

    Raises:
        ConfigError: ``micro_batch_size`` is not given.
    """
    if not micro_batch_size:
        raise ConfigError(
            "trainer.algorithm.loss_reduction", "token_mean_legacy", "depends on the micro-batch size.",
            "Pass micro_batch_size, or use token_mean.",
        )  # fmt: skip
    number = torch.arange(len(mask), device=mask.device) // micro_batch_size
    return prompt_mean(mask, number, config)


def token_weights(mask: Tensor, group: Tensor, config: AlgorithmConfig, micro_batch_size: int | None = None) -> Tensor:
    """The weights of the reduction that ``config.loss_reduction`` names, for one whole mini-batch.

    Args:
        mask: ``[B, T]`` bool, the tokens that are trained.
        group: ``[B]`` integers.
        config: the section ``trainer.algorithm``.
        micro_batch_size: rows in a micro-batch, for reductions that depend on it.

    Returns:
        ``[B, T]`` float32, 0 where the mask is False; all 0 if nothing is trained.

    Raises:
        ConfigError: the name is not known, or the reduction needs a key that is not set.
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(mask)
    require_group(group, mask)
    reduction = resolve("loss_reduction", config.loss_reduction)
    extra = only_accepted(reduction, micro_batch_size=micro_batch_size)
    return reduction(mask, group, config, **extra).detach().float()


def weighted_sum(per_token: Tensor, weights: Tensor) -> Tensor:
    """A micro-batch's part of the mini-batch's number, 0-d: ``sum(per_token * weights)`` over ``[B, T]``.

    What stands where the weight is 0 does not enter, NaN included.
    """
    return (torch.where(weights != 0, per_token, 0.0) * weights).sum()


def effective_denominator(weights: Tensor) -> float:
    """What a token's loss is divided by: trained tokens over the sum of their weights. 0 if nothing is trained.

    That is N for ``token_mean``, ``B max_seq_len`` for ``seq_mean_token_sum_norm``, and N over the share of sequences
    that have a trained token for ``sequence_mean``.
    """
    total = weights.sum(dtype=torch.float64).item()
    return (weights != 0).sum().item() / total if total else 0.0
