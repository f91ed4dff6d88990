"""What a run takes where the config leaves the choice: inference backend, runtime, how checkpoints are written."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config


def resolve_backend(config: Config) -> str:
    """The engine's backend. "auto" is sglang where engines run already, or could be started on a GPU; else embedded."""
    generator = config.generator
    if generator.backend != "auto":
        return generator.backend
    if not generator.run_engines_locally:
        return "sglang"
    found = generator.engine_python is not None or find_spec("sglang") is not None
    return "sglang" if found and on_gpu(config) else "embedded"


def on_gpu(config: Config) -> bool:
    """Whether a GPU of this machine is meant. Nothing is started on it."""
    return config.trainer.device != "cpu" and Path("/dev/nvidiactl").exists()


def resolve_runtime(config: Config) -> str:
    """ "local" or "ray". "auto" is Ray where ``RAY_ADDRESS`` names a cluster or a model has several nodes."""
    placement = config.trainer.placement
    if placement.runtime != "auto":
        return placement.runtime
    most = max(placement.policy_num_nodes, placement.ref_num_nodes, placement.critic_num_nodes)
    return "ray" if most > 1 or os.environ.get("RAY_ADDRESS") else "local"


def resolve_background(config: Config, on_gpu: bool) -> bool:
    """Whether checkpoints are written while training goes on; by default, on a GPU."""
    chosen = config.trainer.ckpt_in_background
    return on_gpu if chosen is None else chosen
