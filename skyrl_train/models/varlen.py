"""Packed attention on a GPU: PyTorch's own variable-length kernel, and its fastest dense one for long sequences.

    row          p p p | a a | b b b | q q | c          (see ``packing.py``)
    queries      0 1 2   3 4   5 6 7   8 9   10         runs: [p a] [b] [q c]; each is contiguous in the row
    keys         p p p a a | p p p b b b | q q c        a run that comes behind its prompt needs no copy of it

A run's last query sees all of its keys, the one before it all but the last, and so on: causal attention aligned at the
end. Keys are gathered only where a prompt is shared by several responses. A long run is attended densely by itself,
its length rounded up (what is appended comes after every real token, so no real query sees it): kernels for dense
attention are faster, and the rounding bounds how many shapes they are prepared for.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from skyrl_train.batch import onto
from skyrl_train.models.recompute import kept

log = logging.getLogger("skyrl.models")

LONG = 4096
"""Tokens from which a run is attended densely."""
ROUND = 1024
HALF = (torch.bfloat16, torch.float16)

Kernel = Callable[..., Tensor]
"""``(q [N, heads, d], k, v [K, kv_heads, d], cu_q, cu_k, max_q, max_k, scale=, window=)`` to ``[N, heads, d]``."""


@dataclass(frozen=True, slots=True)
class Run:
    """``start:start + length`` in the row; before its own tokens it sees those of ``prefix`` (start, length)."""

    start: int
    length: int
    prefix: tuple[int, int] = (0, 0)


class VarlenPlan:
    """The attention of one packed row.

    Args:
        runs: they cover the row, in its order.
        kernel: for runs of unequal length.
        long: tokens from which a run without a prefix is attended densely.
    """

    def __init__(self, runs: list[Run], device: torch.device | str, kernel: Kernel, *, long: int = LONG) -> None:
        self._kernel, self._device = kernel, device
        self._runs = _joined(runs)
        dense = [r.length >= long and not r.prefix[1] for r in self._runs]
        self._parts: list[_Dense | _Short] = []
        first = 0
        for i, is_dense in enumerate(dense):
            if is_dense:
                self._add(self._runs[first:i])
                self._parts.append(_Dense(self._runs[i]))
                first = i + 1
        self._add(self._runs[first:])

    def _add(self, runs: list[Run]) -> None:
        if runs:
            self._parts.append(_Short(runs, self._device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        """See ``models.attention.AttentionPlan``."""
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]  # [N, heads, d]
        outputs = [part.attend(self._kernel, *rows, scale=scale, window=window) for part in self._parts]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]


class _Dense:
    """One long run."""

    def __init__(self, run: Run) -> None:
        self.start, self.length = run.start, run.length

    def attend(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        own = slice(self.start, self.start + self.length)
        if window is not None and window < self.length:
            ends = torch.tensor([0, self.length], dtype=torch.int32, device=q.device)
            parts = [x[own].contiguous() for x in (q, k, v)]
            places = ends, ends, self.length, self.length
            return kept(lambda q, k, v: kernel(q, k, v, *places, scale=scale, window=window), *parts)
        more = -self.length % ROUND
        q, k, v = (x[own].transpose(0, 1)[None] for x in (q, k, v))
        if more:
            q, k, v = (pad(x, (0, 0, 0, more)) for x in (q, k, v))
        out = kept(lambda q, k, v: _dense(q, k, v, scale), q, k, v)
        return out[0, :, : self.length].transpose(0, 1)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    ]  # fmt: skip
    with sdpa_kernel(order, set_priority=True):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


class _Short:
    """Neighbouring runs, attended together."""

    def __init__(self, runs: list[Run], device: torch.device | str) -> None:
        self.queries = slice(runs[0].start, runs[-1].start + runs[-1].length)
        seen = [r.prefix[1] + r.length for r in runs]
        self.max_q, self.max_k = max(r.length for r in runs), max(seen)
        self.cu_q, self.cu_k = (
            onto(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
            for lengths in ([r.length for r in runs], seen)
        )
        self.keys = onto(self._places(runs), device) if any(r.prefix[1] for r in runs) else None

    @staticmethod
    def _places(runs: list[Run]) -> Tensor:
        """Where each key lies in the row."""
        spans = [span for r in runs for span in (r.prefix, (r.start, r.length)) if span[1]]
        return torch.cat([torch.arange(start, start + length) for start, length in spans])

    def attend(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        q = q[self.queries].contiguous()
        if self.keys is None:
            k, v = (x[self.queries].contiguous() for x in (k, v))
        else:
            k, v = (_Gather.apply(x, self.keys) for x in (k, v))  # pyright: ignore[reportAssignmentType]
        places = self.cu_q, self.cu_k, self.max_q, self.max_k
        return kept(lambda q, k, v: kernel(q, k, v, *places, scale=scale, window=window), q, k, v)


class _Gather(torch.autograd.Function):
    """Rows by their places. The gradients of a shared prompt's keys are added up in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.length = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        total = torch.zeros(ctx.length, *grad.shape[1:], dtype=torch.float32, device=grad.device)
        return total.index_add_(0, places, grad.float()).to(grad.dtype), None


def _joined(runs: list[Run]) -> list[Run]:
    """A response directly behind its prompt, which nothing has joined yet, makes one run with it."""
    joined: list[Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last and run.prefix[1] and run.prefix == (last.start, last.length) and not last.prefix[1]:
            joined[-1] = Run(last.start, last.length + run.length)
        else:
            joined.append(run)
    return joined


@functools.cache
def gpu_kernel() -> Kernel | None:
    """PyTorch's variable-length attention, or None where this PyTorch (below 2.10) has none that we can use."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        log.warning("this PyTorch has no variable-length attention; packed sequences use masked attention")
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known and "is_causal" not in known:
        return None

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, scale: float,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        options: dict[str, Any] = {}
        if "enable_gqa" in known:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        if "scale" in known:
            options["scale"] = scale
        else:
            q = q * (scale * q.shape[-1] ** 0.5)  # the kernel's own scale is 1 / sqrt(d)
        if "window_size" in known:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            assert window is None, "takes() leaves windows to others"
            options["is_causal"] = True
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options)  # pyright: ignore[reportReturnType]

    kernel.windows = "window_size" in known  # pyright: ignore[reportFunctionMemberAccess]
    return kernel


def takes(q: Tensor, window: int | None) -> bool:
    """Whether the GPU's kernel can attend these queries: half precision, heads of up to 256."""
    kernel = gpu_kernel() if q.is_cuda and q.dtype in HALF and q.shape[-1] <= 256 else None
    return kernel is not None and (window is None or getattr(kernel, "windows", False))
