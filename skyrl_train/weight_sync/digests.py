"""The digests of SGLang's weights checker, computed on our side.

A server on a CPU answers the first 8 bytes of a tensor's SHA-256. One on a GPU answers a sum of mixed 32-bit words:
with x the word at place i, seeds s1 and s2, and all arithmetic modulo 2^32::

    k1 = mix(x ^ ((i * 27D4EB2D + s1) ^ rotl(i, 15)))     k2 = mix(x ^ ((i * 165667B1 + s2) ^ rotl(i, 13)))

Of each run of 8,192 words the sums of k1 and k2, each xor the number of bytes, are mixed once more into the two halves
of a 64-bit number; these are summed modulo 2^64, and the sum is scrambled (splitmix64).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from skyrl_train.engines.sglang.inside.skyrl_tiles import MIX, PLACE, RUN, SEEDS, TURN, words
from skyrl_train.weight_sync.layout import Layout, Rank

Kind = Literal["sha256", "tiles"]
_64 = (1 << 64) - 1


def digest(tensor: Tensor, kind: Kind) -> str:
    """The digest of one tensor, in 16 hexadecimal digits."""
    if kind == "sha256":
        return hashlib.sha256(_bytes(tensor)).digest()[:8].hex()
    (found,) = finish(tiles([tensor]))
    return found


def tiles(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The sum over the runs of each tensor, ``[N]`` int64 on their device: ``finish`` makes digests of them.

    Args:
        dtype: as if they were converted to it first.
    """
    if tensors and tensors[0].is_cuda:
        from skyrl_train.engines.sglang.inside.skyrl_tiles.kernel import sums_of_runs

        if dtype == torch.bfloat16 and all(map(_pairs, tensors)):  # converted as they are read
            return sums_of_runs(tensors, pairs=True)
        return sums_of_runs([_as(tensor, dtype) for tensor in tensors])
    arrays = [words(_as(tensor, dtype)).numpy().view(np.uint32) for tensor in tensors]
    return torch.tensor([_sum_of_runs(each) for each in arrays], dtype=torch.int64)


def finish(sums: Tensor) -> list[str]:
    """The digests that belong to ``[N]`` sums; one copy from the GPU for all of them."""
    return [f"{_scramble(value & _64):016x}" for value in sums.tolist()]


def told(sums: Tensor, kind: Kind) -> list[str] | None:
    """The digests that the loader inside a server has answered, ``[N]`` int64; None: it has not."""
    if not sums.all():
        return None
    return finish(sums) if kind == "tiles" else [f"{value & _64:016x}" for value in sums.tolist()]


class Digester:
    """Digests of what ranks hold, from checkpoint tensors as they pass by, bucket by bucket.

    A fused tensor is hashed when its last part has come. Parts that wait longer than their bucket lives are copied: at
    most the largest fused tensors that lie across the end of a bucket.
    """

    def __init__(self, layout: Layout, ranks: Sequence[Rank], kind: Kind) -> None:
        self.layout, self.ranks, self.kind = layout, tuple(ranks), kind
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._names: dict[Rank, list[str]] = {rank: [] for rank in self.ranks}
        self._found: dict[Rank, list[Any]] = {rank: [] for rank in self.ranks}
        """Digests in the order of the names; of tiles, ``[N]`` sums of N of them."""

    def add(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Takes one bucket of whole checkpoint tensors, which may be freed afterwards."""
        complete = []
        for name, tensor in named:
            held = self.layout.places[name].held
            parts = self._waiting.setdefault(held, {})
            parts[name] = tensor
            if len(parts) == len(self.layout.parts[held]):
                complete.append((held, self._waiting.pop(held)))
        for rank in self.ranks:
            self._hash(rank, complete)
        for parts in self._waiting.values():
            parts.update({name: tensor.clone() for name, tensor in parts.items()})

    def result(self) -> dict[Rank, dict[str, str]]:
        """By rank, the digest of every tensor that it holds."""
        texts = self._found
        if self.kind == "tiles":
            texts = {rank: finish(torch.cat(sums)) if sums else [] for rank, sums in self._found.items()}
        return {rank: dict(zip(self._names[rank], texts[rank], strict=True)) for rank in self.ranks}

    def _hash(self, rank: Rank, complete: Sequence[tuple[str, dict[str, Tensor]]]) -> None:
        """The digests of fused tensors that are complete: on a GPU, all in one go."""
        held = []
        for name, parts in complete:
            own = [part for part in self.layout.parts[name] if self.layout.holds(part, rank)]
            if own:
                held.append(_join([self.layout.slice(part, parts[part], rank) for part in own]))
                self._names[rank].append(name)
        if self.kind == "sha256":
            self._found[rank] += [digest(tensor, "sha256") for tensor in held]
        elif held:
            self._found[rank].append(tiles(held))


class OwnDigester:
    """Digests of what ranks hold, from checkpoint tensors that stay where they are: all at once, and again each time.

    Args:
        tensors: whole, by their checkpoint names.
        dtype: in which the ranks hold them.
    """

    def __init__(
        self, layout: Layout, ranks: Sequence[Rank], kind: Kind, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        self.kind, self.dtype = kind, dtype
        self._held: dict[Rank, dict[str, Callable[[], Tensor]]] = {rank: {} for rank in ranks}
        self._found: dict[Rank, Any] = {}
        for rank, (held, parts) in product(ranks, layout.parts.items()):
            own = [part for part in parts if layout.holds(part, rank)]
            make = partial(_held_by, layout, rank, {part: tensors[part] for part in own})
            whole = make()
            stays = whole.data_ptr() == tensors[own[0]].data_ptr()
            self._held[rank][held] = partial(_itself, whole) if stays else make

    def add(self, _: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Takes the tensors as they are now."""
        for rank, held in self._held.items():
            tensors = [make() for make in held.values()]
            if self.kind == "sha256":
                self._found[rank] = [digest(_as(tensor, self.dtype), "sha256") for tensor in tensors]
            else:
                self._found[rank] = tiles(tensors, self.dtype)

    def result(self) -> dict[Rank, dict[str, str]]:
        """As ``Digester.result``, once; empty if nothing was taken since."""
        found, self._found = self._found, {}
        texts = found if self.kind == "sha256" else {rank: finish(sums) for rank, sums in found.items()}
        return {rank: dict(zip(self._held[rank], each, strict=True)) for rank, each in texts.items()}


def _held_by(layout: Layout, rank: Rank, parts: Mapping[str, Tensor]) -> Tensor:
    return _join([layout.slice(name, part, rank) for name, part in parts.items()])


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _pairs(tensor: Tensor) -> bool:
    """Whether each word of its bfloat16 form comes of two float32 that can be read at once."""
    even = tensor.numel() % 2 == 0 and tensor.data_ptr() % 8 == 0
    return tensor.dtype == torch.float32 and even and tensor.is_contiguous()


def _join(parts: Sequence[Tensor]) -> Tensor:
    """The parts, one after the other: a view where they lie so in a bucket."""
    first = parts[0]
    if len(parts) == 1:
        return first
    end, bucket = first.data_ptr(), first.untyped_storage().data_ptr()
    for part in parts:
        apart = part.data_ptr() != end or part.untyped_storage().data_ptr() != bucket
        if apart or not part.is_contiguous() or part.dtype != first.dtype:
            return torch.cat([part.flatten() for part in parts])
        end += part.nbytes
    return first.as_strided((sum(part.numel() for part in parts),), (1,))


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> 16)) * np.uint32(MIX[0])
    x = (x ^ (x >> 13)) * np.uint32(MIX[1])
    return x ^ (x >> 16)


def _sum_of_runs(words: np.ndarray) -> int:
    """The plain form of ``skyrl_tiles/kernel.py``, and what it must equal."""
    total, size = 0, np.uint32(len(words) * 4 & 0xFFFFFFFF)
    for start in range(0, len(words), RUN):
        part = words[start : start + RUN]
        i = np.arange(start, start + len(part), dtype=np.uint64).astype(np.uint32)
        halves = []
        for seed, factor, turn in zip(SEEDS, PLACE, TURN, strict=True):
            where = (i * np.uint32(factor) + np.uint32(seed)) ^ ((i << turn) | (i >> (32 - turn)))
            inner = _mix(part ^ where).sum(dtype=np.uint64).astype(np.uint32)
            halves.append(int(_mix(np.atleast_1d(inner ^ size))[0]))
        total += (halves[0] << 32) | halves[1]
    total &= _64
    return total - (1 << 64) if total >> 63 else total


def _scramble(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64
    return x ^ (x >> 31)
