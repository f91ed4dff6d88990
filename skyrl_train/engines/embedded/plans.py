"""How the model's attention reads and writes the KV cache: one plan for prompts, one for the next token.

A plan is handed to the model as ``plan=`` and is asked once a layer (``models/attention.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrl_train.engines.embedded.kv_cache import KVCache, row_vectors


class PrefillPlan:
    """Several prompts side by side in one ``[1, N]`` row, each causal in itself, written to consecutive cache rows.

    ``lengths`` are those of the S distinct prompts; row ``start + i`` gets the keys and values of prompt ``which[i]``,
    so samples of one prompt pay for it once. Inside, prompts are padded on the right to ``[S, M]``: under a causal mask
    no real token sees the padding, which repeats the prompt's own last token and so is as finite as the prompt itself.
    """

    def __init__(
        self, cache: KVCache, start: int, lengths: Sequence[int], which: Sequence[int], device: torch.device
    ) -> None:
        self.cache, self.start, self.count = cache, start, len(which)
        self.prompts, self.longest = len(lengths), max(lengths)
        self.layers_seen: list[int] = []
        sizes = torch.tensor(lengths)
        first = sizes.cumsum(0) - sizes
        column = torch.arange(self.longest)
        real = column < sizes[:, None]
        self.positions = column.expand(self.prompts, -1)[real].to(device)
        """``[N]``: each token's place in its prompt."""
        self.last = (first + sizes - 1).to(device)
        """``[S]``: where each prompt's last token lies in the packed row."""
        self._even = bool(real.all())
        self._spread_index = (first[:, None] + torch.minimum(column, sizes[:, None] - 1)).flatten().to(device)
        self._pack_index = real.flatten().nonzero()[:, 0].to(device)
        identity = list(which) == list(range(self.prompts))
        self._which = None if identity else torch.tensor(which, device=device)
        self._masks: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        """See ``AttentionPlan.attend``; q, k, v are ``[1, heads, N, head_dim]``."""
        self.layers_seen.append(layer)
        q, k, v = self._spread(q), self._spread(k), self._spread(v)
        self._store(layer, k, v)
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if k.dtype != q.dtype or v.dtype != q.dtype:  # under autocast, normalised q and k may be wider than v
            q, k = q.to(v.dtype), k.to(v.dtype)
        if window is None or window >= self.longest:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.longest > 1, scale=scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._band(window, q.device), scale=scale)
        out = out.transpose(1, 2).flatten(0, 1)
        return (out if self._even else out.index_select(0, self._pack_index))[None]

    def _spread(self, x: Tensor) -> Tensor:
        """``[1, heads, N, head_dim]`` to ``[S, heads, M, head_dim]``."""
        if not self._even:
            x = x.index_select(2, self._spread_index)
        return x[0].unflatten(1, (self.prompts, self.longest)).transpose(0, 1)

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        cache = self.cache.layer(layer, k, v)
        if self._which is not None:
            k, v = k.index_select(0, self._which), v.index_select(0, self._which)
        rows = slice(self.start, self.start + self.count)
        cache.keys[rows, :, : self.longest] = k
        cache.values[rows, :, : self.longest] = v

    def _band(self, window: int, device: torch.device) -> Tensor:
        """``[M, M]`` bool: token i sees the ``window`` tokens that end with itself."""
        if window not in self._masks:
            place = torch.arange(self.longest, device=device)
            back = place[:, None] - place
            self._masks[window] = (back >= 0) & (back < window)
        return self._masks[window]


class DecodePlan:
    """One new token for each of the first R rows. ``positions[r]`` tokens of row r are in the cache already.

    The plan lives as long as the rows stay the same: ``advance`` takes it to the next token.
    """

    def __init__(self, cache: KVCache, positions: Sequence[int], device: torch.device) -> None:
        self.cache = cache
        self.rows = len(positions)
        self.span = max(positions) + 1
        """Tokens of the longest row, the new one included: as far as attention reads."""
        self.layers_seen: list[int] = []
        self._shortest = min(positions) + 1
        self.positions = torch.tensor(positions, device=device)
        self._write_at: dict[int, Tensor] = {}
        self._biases: dict[tuple[int, int | None, torch.dtype], Tensor | None] = {}

    def advance(self) -> None:
        """Every row has one token more."""
        self.span += 1
        self._shortest += 1
        self.positions += 1
        for index in self._write_at.values():
            index += 1
        self._biases.clear()

    def relocate(self) -> None:
        """The cache has grown: where to write is found anew."""
        self._write_at.clear()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        """See ``AttentionPlan.attend``; q is ``[R, heads, 1, head_dim]``, k and v ``[R, kv_heads, 1, head_dim]``.

        The heads that share a key are the rows of one small matrix product, so nothing is repeated in memory.
        """
        rows, heads, _, width = q.shape
        kv_heads = k.shape[1]
        cache = self.cache.layer(layer, k, v)
        at = self._write_at.get(kv_heads)
        if at is None:
            at = self._write_at[kv_heads] = row_vectors(rows, kv_heads, self.cache.length, self.positions)
        cache.flat_keys.index_copy_(0, at, _as(k, cache.keys).reshape(-1, width))
        cache.flat_values.index_copy_(0, at, _as(v, cache.values).reshape(-1, v.shape[-1]))
        keys = cache.keys[:rows, :, : self.span].flatten(0, 1).transpose(1, 2)
        values = cache.values[:rows, :, : self.span].flatten(0, 1)
        q = _as(q, cache.keys).reshape(rows * kv_heads, heads // kv_heads, width)
        bias = self._bias(kv_heads, window, q)
        if bias is None:
            scores = torch.baddbmm(q.new_empty((1, 1, 1)), q, keys, beta=0, alpha=scale)
        else:
            scores = torch.baddbmm(bias, q, keys, alpha=scale)
        weights = scores.softmax(-1) if scores.dtype == torch.float32 else scores.softmax(-1, dtype=torch.float32)
        return torch.bmm(_as(weights, values), values).view(rows, 1, heads, -1)

    def _bias(self, kv_heads: int, window: int | None, like: Tensor) -> Tensor | None:
        """``[R * kv_heads, 1, span]``: 0 where a row has a token to see, else -inf; None where all see everything."""
        if window is not None and window >= self.span:
            window = None
        if window is None and self._shortest == self.span:
            return None
        key = (kv_heads, window, like.dtype)
        if key not in self._biases:
            place = torch.arange(self.span, device=like.device)
            newest = self.positions[:, None]
            hidden = place > newest
            if window is not None:
                hidden |= place <= newest - window
            bias = like.new_zeros((self.rows, self.span)).masked_fill_(hidden, float("-inf"))
            self._biases[key] = bias.repeat_interleave(kv_heads, 0)[:, None]
        return self._biases[key]


def _as(x: Tensor, like: Tensor) -> Tensor:
    return x if x.dtype == like.dtype else x.to(like.dtype)
