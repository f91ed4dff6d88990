"""``SyncSettings``: the keys ``generator.weight_*`` as the weight sync reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skyrl_train.engines.sglang.control import PauseMode


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncSettings:
    """How weights are brought to engines, and what is to be known afterwards."""

    backend: str = "auto"
    timeout: float = 120.0
    """Seconds for each wait."""
    bucket_bytes: int = 1 << 30
    own_memory: bool = True
    """Engines that can read the learner's own memory do; else buckets are packed for them too."""
    pause_mode: PauseMode = "abort"
    proof: str = "both"
    """ "digest", "probe", "both" or "off"."""
    on_proof_failure: str = "quarantine"
    """ "quarantine": go on with the other engines; "stop": end the run."""
    probe_tolerance: float | None = None
    folder: str = "weights"
    """For a sync by disk."""
    override_group: str = "auto"
    sleep: bool = False
    """Engines sleep while the learner learns."""
    sleep_level: Literal[1, 2] = 2
    adapters: bool = False
    """The policy's adapter is synced, and the base model only once."""
    adapter_folder: str = "adapter"
    """For an engine that takes adapters from disk only."""
