"""The GPU form of ``digests._sum_of_runs``: one program a run, one launch for any number of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from skyrl_train.weight_sync.tile_numbers import MIX, PLACE, RUN, SEEDS, TURN

BLOCK = 1024


@triton.jit
def _mix(x, FIRST: tl.constexpr, SECOND: tl.constexpr):
    x = (x ^ (x >> 16)) * tl.full((), FIRST, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full((), SECOND, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _half(
    x, i, seed: tl.constexpr, factor: tl.constexpr, turn: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr
):
    where = i * tl.full((), factor, tl.uint32) + tl.full((), seed, tl.uint32)
    return _mix(x ^ where ^ ((i << turn) | (i >> (32 - turn))), FIRST, SECOND)


@triton.jit(do_not_specialize=["tensors"])
def _runs(
    table, owners, out, tensors, S1: tl.constexpr, S2: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    T1: tl.constexpr, T2: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, LENGTH: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    owner = tl.load(owners + tl.program_id(0))
    words = tl.load(table + owner).to(tl.pointer_type(tl.int32))
    count = tl.load(table + tensors + owner)
    start = (tl.program_id(0) - tl.load(table + 2 * tensors + owner)) * LENGTH
    one = tl.zeros((), tl.uint32)
    two = tl.zeros((), tl.uint32)
    for offset in tl.static_range(0, LENGTH, STEP):
        place = start + offset + tl.arange(0, STEP)
        inside = place < count
        x = tl.load(words + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
        i = place.to(tl.uint32)
        nothing = tl.zeros((STEP,), tl.uint32)
        one += tl.sum(tl.where(inside, _half(x, i, S1, P1, T1, FIRST, SECOND), nothing), axis=0).to(tl.uint32)
        two += tl.sum(tl.where(inside, _half(x, i, S2, P2, T2, FIRST, SECOND), nothing), axis=0).to(tl.uint32)
    size = (count * 4).to(tl.uint32)
    one = _mix(one ^ size, FIRST, SECOND).to(tl.uint64)
    two = _mix(two ^ size, FIRST, SECOND).to(tl.uint64)
    tl.atomic_add(out + owner, ((one << 32) | two).to(tl.int64, bitcast=True))


def sums_of_runs(tensors: Sequence[Tensor]) -> Tensor:
    """The sum over the runs of each of N runs of int32 words, contiguous on one GPU: ``[N]`` int64 there.

    The kernel is told of them by a table of ``[3, N]`` numbers: address, words, and the number of its first run.
    """
    device, count = tensors[0].device, len(tensors)
    out = torch.zeros(count, dtype=torch.int64, device=device)
    runs = np.array([-(-tensor.numel() // RUN) for tensor in tensors], dtype=np.int64)
    first = np.cumsum(runs) - runs
    rows = [[tensor.data_ptr() for tensor in tensors], [tensor.numel() for tensor in tensors], first]
    table = torch.from_numpy(np.array(rows, dtype=np.int64)).to(device)
    owners = torch.from_numpy(np.repeat(np.arange(count, dtype=np.int32), runs)).to(device)
    if len(owners):
        with torch.cuda.device(device):
            _runs[(len(owners),)](  # pyright: ignore
                table, owners, out, count, *SEEDS, *PLACE, *TURN, *MIX, RUN, BLOCK, num_warps=8
            )
    return out
