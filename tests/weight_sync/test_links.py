"""Which rank of the policy sends to an engine, and over what."""

from __future__ import annotations

from typing import Any

import pytest

from skyrl_train.weight_sync.surroundings import Surroundings

CPU = [{"host": host, "device": "cpu", "gpu": None} for host in "ab"]
GPUS = [{"host": host, "device": "cuda", "gpu": f"{host}{n}"} for host in "ab" for n in range(2)]
"""Two nodes with two GPUs each: ranks 0 1 | 2 3."""


@pytest.mark.parametrize(
    ("workers", "host", "gpus", "sender", "same_host", "same_gpu"),
    [
        (CPU, "a", (), 0, True, False),
        (CPU, "b", (), 1, True, False),  # shared memory reaches from rank 1 alone
        (CPU, "c", (), 0, False, False),
        (CPU, None, (), 0, False, False),  # somebody else's: wherever it is
        (GPUS, "a", ("a0",), 0, True, True),
        (GPUS, "a", ("a1",), 1, True, True),
        (GPUS, "b", ("b0", "b1"), 2, True, True),  # an engine of two GPUs: the first of the ranks on them
        (GPUS, "b", ("b7",), 2, True, False),  # apart, on a node of the learner
        (GPUS, "b", ("a1",), 2, True, False),  # a GPU of that name on another host is another GPU
        (GPUS, "c", ("c0",), 0, False, False),
    ],
)
def test_the_rank_that_lies_nearest_sends(
    workers: Any, host: str | None, gpus: tuple[str, ...], sender: int, same_host: bool, same_gpu: bool
) -> None:
    found = Surroundings.of(host, gpus, workers)
    assert (found.sender, found.same_host, found.same_gpu) == (sender, same_host, same_gpu)
    assert found.launched == (host is not None) and found.learner_device == workers[0]["device"]
