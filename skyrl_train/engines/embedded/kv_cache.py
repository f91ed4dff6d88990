"""The keys and values of the running rows, one dense block per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LENGTH_STEP = 64
"""Lengths are reserved in multiples of this many tokens, so that a growing row rarely asks for new memory."""


class LayerCache(NamedTuple):
    """Keys and values of one layer, ``[rows, kv_heads, length, head_dim]``; the same memory as a list of vectors."""

    keys: Tensor
    values: Tensor
    flat_keys: Tensor
    flat_values: Tensor


class KVCache:
    """Row ``r`` holds the tokens ``0 .. n-1`` of one running sample, from the left.

    The live rows are always the first ones: when one ends, the last move into the holes, so a decoding step reads one
    slice and no list of pages. Memory is taken when it is first needed and grows by doubling, up to ``max_rows``
    rows of ``max_length`` tokens. Every element is finite at all times, because a masked position has weight 0 and
    0 x NaN would carry one request's fault into another's answer.
    """

    def __init__(self, max_rows: int, max_length: int) -> None:
        self.max_rows, self.max_length = max_rows, max_length
        self.rows = 0
        self.length = 0
        self._layers: dict[int, LayerCache] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held over all layers."""
        return sum(c.keys.nbytes + c.values.nbytes for c in self._layers.values())

    @property
    def layers(self) -> list[int]:
        """The layers that have written so far."""
        return sorted(self._layers)

    def reserve(self, rows: int, length: int) -> None:
        """Makes room for ``rows`` rows of ``length`` tokens; what is stored stays where it is."""
        if rows <= self.rows and length <= self.length:
            return
        if rows > self.rows:
            self.rows = min(self.max_rows, max(rows, 2 * self.rows))
        if length > self.length:
            rounded = -(-length // LENGTH_STEP) * LENGTH_STEP
            self.length = min(self.max_length, max(rounded, 2 * self.length))
        for index, old in self._layers.items():
            self._layers[index] = self._regrown(old)

    def layer(self, index: int, keys: Tensor, values: Tensor) -> LayerCache:
        """The store of one layer; made at first use in the shape and type of ``keys``/``values``."""
        found = self._layers.get(index)
        if found is None:
            found = self._layers[index] = self._zeros(keys, values)
        return found

    @torch.inference_mode()  # an abort may come while nothing is computed
    def move(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """Copies the first ``length`` tokens of the rows ``source`` over the rows ``target``."""
        if not source:
            return
        for cache in self._layers.values():
            for store in (cache.keys, cache.values):
                live = store[:, :, :length]
                if len(source) == 1:
                    live[target[0]] = live[source[0]]
                else:
                    at, to = (torch.tensor(rows, device=store.device) for rows in (source, target))
                    live.index_copy_(0, to, live.index_select(0, at))

    @torch.inference_mode()
    def wipe(self, rows: Sequence[int]) -> None:
        """Zeroes rows that may hold a NaN or an infinity."""
        for cache in self._layers.values():
            cache.keys[list(rows)] = 0
            cache.values[list(rows)] = 0

    def release(self) -> None:
        """Gives the memory back. The size reached is remembered, so the next step reserves it at once."""
        self._layers.clear()

    def _zeros(self, keys: Tensor, values: Tensor) -> LayerCache:
        return _with_flat(
            keys.new_zeros((self.rows, keys.shape[1], self.length, keys.shape[-1])),
            values.new_zeros((self.rows, values.shape[1], self.length, values.shape[-1])),
        )

    def _regrown(self, old: LayerCache) -> LayerCache:
        new = self._zeros(old.keys, old.values)
        rows, length = old.keys.shape[0], old.keys.shape[2]
        new.keys[:rows, :, :length] = old.keys
        new.values[:rows, :, :length] = old.values
        return new


def _with_flat(keys: Tensor, values: Tensor) -> LayerCache:
    return LayerCache(keys, values, keys.view(-1, keys.shape[-1]), values.view(-1, values.shape[-1]))


def row_vectors(rows: int, heads: int, length: int, positions: Tensor) -> Tensor:
    """Indices into ``flat_keys`` of the vectors of ``rows`` rows at ``positions`` (``[rows]``): ``[rows * heads]``."""
    starts = torch.arange(0, rows * heads * length, length, device=positions.device)
    return starts + positions.repeat_interleave(heads)
