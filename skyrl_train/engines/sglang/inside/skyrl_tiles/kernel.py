"""The GPU form of ``_sum_of_runs`` in ``weight_sync/digests.py``: one program a run, one launch for all tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from . import MIX, PLACE, RUN, SEEDS, TURN

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


@triton.jit
def _rounded(bits):
    """The bits of a float32 to those of the nearest bfloat16, ties to even; of what is no number they mean nothing."""
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def _converted(pair):
    """Two float32, read as one number, as two bfloat16."""
    return _rounded(pair.to(tl.uint32)) | (_rounded((pair >> 32).to(tl.uint32)) << 16)


@triton.jit(do_not_specialize=["tensors"])
def _runs(
    table, owners, out, tensors, PAIRS: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, P1: tl.constexpr,
    P2: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    LENGTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    owner = tl.load(owners + tl.program_id(0))
    address = tl.load(table + owner)
    count = tl.load(table + tensors + owner)
    start = (tl.program_id(0) - tl.load(table + 2 * tensors + owner)) * LENGTH
    one = tl.zeros((), tl.uint32)
    two = tl.zeros((), tl.uint32)
    for offset in tl.static_range(0, LENGTH, STEP):
        place = start + offset + tl.arange(0, STEP)
        inside = place < count
        if PAIRS:
            pair = tl.load(address.to(tl.pointer_type(tl.int64)) + place, mask=inside, other=0)
            x = _converted(pair.to(tl.uint64, bitcast=True))
        else:
            words = tl.load(address.to(tl.pointer_type(tl.int32)) + place, mask=inside, other=0)
            x = words.to(tl.uint32, bitcast=True)
        i = place.to(tl.uint32)
        nothing = tl.zeros((STEP,), tl.uint32)
        one += tl.sum(tl.where(inside, _half(x, i, S1, P1, T1, FIRST, SECOND), nothing), axis=0).to(tl.uint32)
        two += tl.sum(tl.where(inside, _half(x, i, S2, P2, T2, FIRST, SECOND), nothing), axis=0).to(tl.uint32)
    size = (count * 4).to(tl.uint32)
    one = _mix(one ^ size, FIRST, SECOND).to(tl.uint64)
    two = _mix(two ^ size, FIRST, SECOND).to(tl.uint64)
    tl.atomic_add(out + owner, ((one << 32) | two).to(tl.int64, bitcast=True))


def sums_of_runs(tensors: Sequence[Tensor]) -> Tensor:
    """The sum over the runs of each of N tensors, contiguous on one GPU: ``[N]`` int64 there.

    They are int32 words; or float32, pairs of which become words of two bfloat16. The kernel is told of them by a table
    of ``[3, N]`` numbers: address, words, and the number of the first run.
    """
    device, count = tensors[0].device, len(tensors)
    pairs = tensors[0].dtype == torch.float32
    words = [tensor.numel() // 2 if pairs else tensor.numel() for tensor in tensors]
    out = torch.zeros(count, dtype=torch.int64, device=device)
    runs = np.array([-(-number // RUN) for number in words], dtype=np.int64)
    first = np.cumsum(runs) - runs
    rows = [[tensor.data_ptr() for tensor in tensors], words, first]
    table = torch.from_numpy(np.array(rows, dtype=np.int64)).to(device)
    owners = torch.from_numpy(np.repeat(np.arange(count, dtype=np.int32), runs)).to(device)
    if len(owners):
        with torch.cuda.device(device):
            _runs[(len(owners),)](  # pyright: ignore
                table, owners, out, count, pairs, *SEEDS, *PLACE, *TURN, *MIX, RUN, BLOCK, num_warps=8
            )
    return out
