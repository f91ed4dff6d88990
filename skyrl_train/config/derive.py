"""Values that follow from others, filled in once so that every reader finds a number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from skyrl_train.config.backend import on_gpu, resolve_backend
from skyrl_train.config.sizes import engines_of

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config

TRAIN_TOKENS, FORWARD_TOKENS = 8192, 16384


def derive(config: Config) -> None:
    """Fills in micro-batch sizes and lengths that follow from others; writes "off", and older names, in one way."""
    trainer, sampling = config.trainer, config.generator.sampling_params
    _workers(config)
    longest = config.generator.max_input_length + sampling.max_generate_length
    update = trainer.policy_mini_batch_size * config.generator.n_samples_per_prompt
    by_count = trainer.max_tokens_per_microbatch is None
    if by_count and trainer.micro_train_batch_size_per_gpu is None:
        trainer.micro_train_batch_size_per_gpu = largest_divisor(update, max(1, TRAIN_TOKENS // longest))
    if by_count and trainer.micro_forward_batch_size_per_gpu is None:
        trainer.micro_forward_batch_size_per_gpu = max(1, FORWARD_TOKENS // longest)
    if trainer.algorithm.max_seq_len is None and trainer.algorithm.loss_reduction == "seq_mean_token_sum_norm":
        trainer.algorithm.max_seq_len = longest
    _algorithm(config)
    for name in ("eval_interval", "ckpt_interval", "hf_save_interval"):
        if getattr(trainer, name) == 0:
            setattr(trainer, name, -1)
    for params in (sampling, config.generator.eval_sampling_params):
        params.top_k = params.top_k or -1


def _workers(config: Config) -> None:
    """Engines that share the policy's GPUs have whole ones, so there must be enough."""
    placement, generator = config.trainer.placement, config.generator
    if placement.policy_num_gpus_per_node is None:
        started = generator.run_engines_locally and resolve_backend(config) != "embedded"
        shared = placement.colocate_all and started and on_gpu(config)
        needed = math.prod(engines_of(config)) if shared else 1
        placement.policy_num_gpus_per_node = math.ceil(needed / placement.policy_num_nodes)
    for role in ("critic", "ref"):
        if getattr(placement, f"{role}_num_gpus_per_node") is None:
            setattr(placement, f"{role}_num_gpus_per_node", placement.policy_num_gpus_per_node)


def _algorithm(config: Config) -> None:
    algorithm = config.trainer.algorithm
    if algorithm.overlong_penalty and algorithm.overlong_max_len is None and config.generator.max_turns == 1:
        algorithm.overlong_max_len = config.generator.sampling_params.max_generate_length
    correction = algorithm.off_policy_correction
    if algorithm.use_tis and correction.tis_ratio_type is None:
        correction.tis_ratio_type = "token"
        if algorithm.tis_imp_ratio_cap > 0:
            correction.token_tis_ratio_clip_high = algorithm.tis_imp_ratio_cap


def largest_divisor(number: int, bound: int) -> int:
    """The largest divisor of ``number`` that is at most ``bound``; both at least 1."""
    return next(size for size in range(min(number, bound), 0, -1) if number % size == 0)
