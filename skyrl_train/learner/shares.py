"""Which worker computes which sequences, and in which micro-batches: pure functions of the sequences' lengths.

A sequence that is computed elsewhere, or beside others, has the same log-probs and gradients. So all of this decides
time and memory, and no result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skyrl_train.batch import TrainBatch

UNEVEN = 1.05
"""The samples of a prompt stay on one worker, where their prompt is computed once, unless that makes the slowest
worker slower than the mean by more than this."""
QUADRATIC = 32768
"""Tokens at which attention costs a sequence about as much as everything else."""


def token_counts(batch: TrainBatch) -> Tensor:
    """``[B]``: tokens of prompt and response."""
    return batch.prompt_lengths + batch.response_mask.sum(1)


def deal(batch: TrainBatch, rows: Tensor, ranks: int) -> list[Tensor]:
    """Deals rows out to ``ranks`` such that each has about the same work. Rows keep their order.

    Returns:
        For each rank its rows; some get none where there are fewer rows than ranks.
    """
    if ranks == 1:
        return [rows]
    counts = token_counts(batch)[rows].double()
    costs = (counts * (1 + counts / QUADRATIC)).tolist()
    groups = _runs(batch.group[rows].tolist())
    whole = _spread([sum(costs[i] for i in run) for run in groups], ranks)
    if _unevenness([sum(costs[i] for n in bin for i in groups[n]) for bin in whole]) <= UNEVEN:
        dealt = [[i for n in bin for i in groups[n]] for bin in whole]
    else:
        dealt = _spread(costs, ranks)
    return [rows[torch.tensor(sorted(bin), dtype=torch.long)] for bin in dealt]


def micro_batches(batch: TrainBatch, rows: Tensor, *, sequences: int | None, tokens: int | None) -> list[Tensor]:
    """Cuts rows into runs for one forward pass each.

    Args:
        sequences: of one run at most.
        tokens: of one run at most; a longer sequence is a run of its own.
    """
    if tokens is None:
        assert sequences is not None, "one of the two bounds is given"
        return list(rows.split(sequences)) if len(rows) else []
    runs: list[list[int]] = []
    held = 0
    for row, count in zip(rows.tolist(), token_counts(batch)[rows].tolist(), strict=True):
        if not runs or held + count > tokens:
            runs.append([])
            held = 0
        runs[-1].append(row)
        held += count
    return [torch.tensor(run, dtype=torch.long) for run in runs]


def _runs(values: Sequence[int]) -> list[list[int]]:
    """Places of equal neighbours, together."""
    runs: list[list[int]] = []
    for i, value in enumerate(values):
        if i and value == values[i - 1]:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _spread(costs: Sequence[float], bins: int) -> list[list[int]]:
    """The dearest first, each into the bin that has the least so far."""
    filled: list[list[int]] = [[] for _ in range(bins)]
    sums = [0.0] * bins
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(bins), key=lambda b: (sums[b], b))
        filled[least].append(i)
        sums[least] += costs[i]
    return filled


def _unevenness(sums: Sequence[float]) -> float:
    return max(sums) * len(sums) / total if (total := sum(sums)) else 1.0
