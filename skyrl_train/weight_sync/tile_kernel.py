"""The GPU form of ``digests._sum_of_runs``: one program a run, one launch a tensor."""

from __future__ import annotations

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


@triton.jit(do_not_specialize=["count"])
def _runs(
    words, out, count, S1: tl.constexpr, S2: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, T1: tl.constexpr,
    T2: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, LENGTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * LENGTH
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
    tl.atomic_add(out, ((one << 32) | two).to(tl.int64, bitcast=True))


def sum_of_runs(words: Tensor) -> Tensor:
    """The sum over the runs of ``[N]`` int32 words on a GPU, an int64 scalar there."""
    out = torch.zeros((), dtype=torch.int64, device=words.device)
    count = words.numel()
    if count:
        grid = (triton.cdiv(count, RUN),)
        with torch.cuda.device(words.device):
            _runs[grid](words, out, count, *SEEDS, *PLACE, *TURN, *MIX, RUN, BLOCK, num_warps=8)  # pyright: ignore
    return out
