"""The GPU form of ``_sum_of_runs`` in ``weight_sync/digests.py``: one program a run, one launch for all tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from . import MIX, PLACE, RUN, SEEDS, TURN, words

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


def sums_of_runs(tensors: Sequence[Tensor], *, pairs: bool = False) -> Tensor:
    """The sum over the runs of each of N tensors on one GPU: ``[N]`` int64 there.

    Args:
        pairs: they are float32, and pairs of numbers become words of two bfloat16.
    """
    device = tensors[0].device
    kept = [tensor if _as_words(tensor) else words(tensor) for tensor in tensors]
    size = 8 if pairs else 4
    table, owners = _tables(device, tuple((tensor.data_ptr(), tensor.nbytes // size) for tensor in kept))
    out = torch.zeros(len(kept), dtype=torch.int64, device=device)
    if len(owners):
        with torch.cuda.device(device):
            _runs[(len(owners),)](  # pyright: ignore
                table, owners, out, len(kept), pairs, *SEEDS, *PLACE, *TURN, *MIX, RUN, BLOCK, num_warps=8
            )
    return out


def _as_words(tensor: Tensor) -> bool:
    """Whether its memory can be read as 32-bit words where it is."""
    return tensor.is_contiguous() and tensor.nbytes % 4 == 0 and tensor.data_ptr() % 4 == 0


@lru_cache(maxsize=8)
def _tables(device: torch.device, places: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """What the kernel is told: ``[3, N]`` address, words and number of the first run, and each run's tensor.

    Args:
        places: address and words of each tensor.
    """
    addresses, counts = np.array(places, dtype=np.int64).T
    runs = -(-counts // RUN)
    table = torch.from_numpy(np.stack([addresses, counts, np.cumsum(runs) - runs])).to(device)
    return table, torch.from_numpy(np.repeat(np.arange(len(places), dtype=np.int32), runs)).to(device)
