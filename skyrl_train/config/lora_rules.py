"""Rules between the keys of the policy's adapter and others."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_train.config.backend import resolve_backend
from skyrl_train.config.schema import Config, tree, value_of
from skyrl_train.errors import ConfigError

SECTION = "trainer.policy.model.lora"
SMALL_RATE = 1e-6
"""The default rate, made for all weights. An adapter starts at zero and learns with 10 to 100 times that."""


def broken(config: Config) -> Iterator[ConfigError]:
    """Combinations that cannot work."""
    lora = config.trainer.policy.model.lora
    if lora.init_method == "orthogonal" and lora.rank % 2:
        yield ConfigError(
            f"{SECTION}.rank", lora.rank, f"{SECTION}.init_method=orthogonal needs an even rank.",
            f"Set {lora.rank + 1}.",
        )  # fmt: skip
    generator = config.generator
    served = generator.engine_init_kwargs.get("max_lora_rank")
    if generator.enable_lora and isinstance(served, int) and lora.rank > served:
        yield ConfigError(
            f"{SECTION}.rank", lora.rank, f"the engines take adapters up to rank {served} "
            "(generator.engine_init_kwargs.max_lora_rank).", f"Set max_lora_rank={lora.rank}, or remove it.",
        )  # fmt: skip
    for name in ("sampling_params", "eval_sampling_params"):
        wanted = getattr(generator, name).lora_name
        if wanted is None or resolve_backend(config) != "sglang":
            continue
        if not generator.enable_lora:
            reason, remedy = "the engines serve no adapters: generator.enable_lora=false.", "Set it to true."
        elif lora.rank:
            reason = f"the policy trains an adapter of its own ({SECTION}.rank={lora.rank}), and that one is used."
            remedy = "Remove the key."
        else:
            continue
        yield ConfigError(f"generator.{name}.lora_name", wanted, reason, remedy)


def doubtful(config: Config) -> Iterator[str]:
    """Combinations that work and are probably not meant."""
    rank, rate = config.trainer.policy.model.lora.rank, config.trainer.policy.optimizer_config.lr
    if rank and rate <= SMALL_RATE:
        yield (
            f"{SECTION}.rank={rank} with trainer.policy.optimizer_config.lr={rate:g}: an adapter needs a larger rate "
            "than all weights do, such as 1e-5 to 1e-4."
        )
    for leaf in () if rank else tree().values():
        value = value_of(config, leaf.name)
        if leaf.name.startswith(f"{SECTION}.") and value != leaf.default:
            yield f"{leaf.name}={value} has no effect while {SECTION}.rank=0."
