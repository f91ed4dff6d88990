"""Sequence parallelism by all-to-all (DeepSpeed-Ulysses, arXiv:2309.14509): workers split the tokens of a row.

    tokens of the row        worker 0: t0 t1 t2 t3      worker 1: t4 t5 t6 t7      each with all heads
    inside attention         worker 0: h0 h1            worker 1: h2 h3            each with all tokens

Everything but attention works token by token. Before attention the workers exchange tokens for heads, and after it
heads for tokens. Log-probs are put together at the end, so that every worker has the whole loss. It follows the
gradient of its own tokens alone; the sum over workers is the whole one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True, slots=True)
class SequenceSplit:
    """One worker's part of every row.

    Args:
        group: the workers that split a row.
        part: which of them this is.
        parts: how many there are.
    """

    group: Any
    part: int
    parts: int

    def tokens(self, length: int) -> slice:
        """This worker's of a row whose length ``parts`` divides."""
        each = length // self.parts
        return slice(self.part * each, (self.part + 1) * each)

    def added(self, values: Tensor) -> Tensor:
        """The sum over the workers, on each of them; the gradient that follows is of this worker's own values."""
        return _Added.apply(values, self.group)  # pyright: ignore[reportReturnType]

    def by_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[1, heads, n, d]`` of this worker's tokens to ``[1, heads / parts, N, d]`` of all.

        Key-value heads are repeated where there are too few to be dealt out.
        """
        kv_heads = k.shape[1]
        times = self.parts // math.gcd(kv_heads, self.parts)
        if times > 1:
            k, v = (x.repeat_interleave(times, dim=1) for x in (k, v))
        return self._exchange(q), self._exchange(k), self._exchange(v)

    def by_tokens(self, outputs: Tensor) -> Tensor:
        """``[1, N, heads / parts, d]`` to ``[1, n, heads, d]``."""
        return self._exchange(outputs)

    def _exchange(self, x: Tensor) -> Tensor:
        return _Exchange.apply(x, self.group, self.parts)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    """Sends each worker its part along dimension 1, and joins what comes along dimension 2. Gradients go back so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, parts: int) -> Tensor:
        ctx.among = group, parts
        return _exchanged(x, 1, 2, group, parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchanged(grad, 2, 1, *ctx.among), None, None


def _exchanged(x: Tensor, cut: int, joined: int, group: Any, parts: int) -> Tensor:
    leaving = torch.stack(x.chunk(parts, dim=cut))
    coming = torch.empty_like(leaving)
    distributed.all_to_all_single(coming, leaving, group=group)
    return torch.cat(coming.unbind(0), dim=joined)


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None
