"""How a step's batch is cut into mini-batches, one optimizer step each.

Prompts are the unit, as in ``trainer.policy_mini_batch_size``: the samples of one prompt stay together, also when
failures made a group smaller. (Micro-batches are runs of rows; they bound memory and change nothing else.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from skyrl_train.batch import TrainBatch


def mini_batches(batch: TrainBatch, prompts: int) -> Iterator[TrainBatch]:
    """Cuts the batch into runs of ``prompts`` groups; the last takes what is left."""
    starts = torch.cat([torch.ones(1, dtype=torch.bool), batch.group[1:] != batch.group[:-1]])
    place = starts.cumsum(0) - 1  # 0, 1, 2, ... for each group, whatever its id
    for first in range(0, int(place[-1]) + 1, prompts):
        yield batch.select(((place >= first) & (place < first + prompts)).nonzero().squeeze(1))
