"""How many workers a model has, and how many engines there are, by the config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config


def workers_of(config: Config, role: str) -> tuple[int, int]:
    """Nodes of "policy", "ref" or "critic", and its workers on each."""
    placement = config.trainer.placement
    return getattr(placement, f"{role}_num_nodes"), getattr(placement, f"{role}_num_gpus_per_node") or 1


def engines_of(config: Config) -> tuple[int, int]:
    """Engines that we start (copies of the model are engines of their own), and GPUs of each."""
    generator = config.generator
    each = generator.inference_engine_tensor_parallel_size * generator.inference_engine_pipeline_parallel_size
    return generator.num_inference_engines * generator.inference_engine_data_parallel_size, each
