"""The memory report of a phase, and what is said when there is too little."""

from __future__ import annotations

import pytest
import torch

from skyrl_train.errors import WorkerError
from skyrl_train.learner.memory import GIB, MemoryLog


def test_the_larger_peak_of_a_phase_stays() -> None:
    log = MemoryLog(torch.device("cpu"))
    for predicted in (2 * GIB, GIB):
        with log.phase("update", predicted):
            pass
    assert log.phases["update"]["predicted_GiB"] == 2.0 and log.phases["update"]["measured_GiB"] > 0


def test_too_little_memory_names_the_phase_and_what_to_set() -> None:
    log = MemoryLog(torch.device("cpu"))
    with pytest.raises(WorkerError) as caught, log.phase("update", 3 * GIB):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    said = str(caught.value)
    assert said.startswith(
        "cpu, update: CUDA out of memory. Tried to allocate 2.00 GiB. (predicted for this phase: 3.0 GiB"
    )
    for key in ("max_tokens_per_microbatch", "gradient_checkpointing", "cpu_offload", "gpu_memory_utilization"):
        assert key in said
