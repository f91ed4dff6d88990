"""Rules between the keys that say how many workers a model has and how they share their work."""

from __future__ import annotations

import math
from collections.abc import Iterator

from skyrl_train.config.backend import resolve_backend
from skyrl_train.config.schema import Config, tree, value_of
from skyrl_train.config.sizes import workers_of
from skyrl_train.errors import ConfigError

BUDGET = "trainer.max_tokens_per_microbatch"


def broken(config: Config) -> Iterator[ConfigError]:
    """Combinations that cannot work."""
    trainer = config.trainer
    for role in ("policy", "ref", "critic"):
        yield from _divisions(config, role)
    if trainer.max_tokens_per_microbatch is not None:
        for name in ("micro_train_batch_size_per_gpu", "micro_forward_batch_size_per_gpu"):
            value = getattr(trainer, name)
            if value is not None:
                yield ConfigError(
                    f"trainer.{name}", value, f"{BUDGET}={trainer.max_tokens_per_microbatch} counts tokens instead.",
                    "Remove one of the two.",
                )  # fmt: skip
        if trainer.algorithm.loss_reduction == "token_mean_legacy":
            yield ConfigError(
                BUDGET, trainer.max_tokens_per_microbatch,
                "trainer.algorithm.loss_reduction=token_mean_legacy averages over micro-batches of equal counts.",
                "Use trainer.algorithm.loss_reduction=token_mean, or remove the key.",
            )  # fmt: skip


def _divisions(config: Config, role: str) -> Iterator[ConfigError]:
    section, workers = getattr(config.trainer, role), math.prod(workers_of(config, role))
    sizes = {"fsdp_config.fsdp_size": section.fsdp_config.fsdp_size}
    sizes["sequence_parallel_size"] = section.sequence_parallel_size
    for name, size in sizes.items():
        if size == -1:
            continue
        if size < 1 or workers % size:
            yield ConfigError(
                f"trainer.{role}.{name}", size,
                f"does not divide the {workers} worker(s) of the model (trainer.placement.{role}_num_nodes x "
                f"{role}_num_gpus_per_node).",
                f"Set it to one of {', '.join(str(n) for n in range(1, workers + 1) if workers % n == 0)}.",
            )  # fmt: skip


def doubtful(config: Config) -> Iterator[str]:
    """Keys of models that are not there, or not sharded."""
    trainer = config.trainer
    alone = resolve_backend(config) == "embedded" and workers_of(config, "policy") == (1, 1)
    for leaf in tree().values():
        value = value_of(config, leaf.name)
        if value == leaf.default or leaf.key.follows:
            continue
        if leaf.name.startswith("trainer.critic.") and trainer.critic.model.path is None:
            yield f"{leaf.name}={value} has no effect: there is no critic (trainer.critic.model.path=null)."
        if leaf.name.startswith("trainer.policy.fsdp_config.") and alone:
            yield (
                f"{leaf.name}={value} has no effect: with one worker, the embedded engine samples from the policy's "
                "own parameters, which stay whole."
            )
