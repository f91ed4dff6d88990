"""Log-probs and entropy straight from hidden states: the logits of all tokens never exist at once.

A chunk of rows is projected onto the vocabulary, reduced to two numbers a row, and forgotten; the backward pass
projects it again. With V = 152k, 16k tokens and bfloat16, that is 0.3 GB in place of 5 GB, for one more product with
the output layer's weight.

    x = h W^T / T (+ b),  z = logsumexp x,  p = exp(x - z),  H = -sum p log p
    d log p_y / d x = 1[y] - p        d H / d x = -p (log p + H)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALL = 1 << 24
"""Logits up to this many (64 MiB in float32) are held in one piece, which saves the second projection."""
CHUNK = {"cuda": 1 << 27, "cpu": 1 << 22}
"""Logits worked on at a time."""


def worth_it(tokens: int, vocabulary: int) -> bool:
    """Whether so many logits should not be held."""
    return tokens * vocabulary > SMALL


def projected_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, *, compiled: bool
) -> tuple[Tensor, Tensor]:
    """``log softmax((hidden W^T + b) / temperature)`` at ``targets``, and the entropy: ``[M]`` float32 each.

    Args:
        hidden: ``[M, H]``.
        weight: ``[V, H]``.
        targets: ``[M]``.
        compiled: the work on logits by kernels of ``torch.compile``.
    """
    return _Projected.apply(hidden, weight, bias, targets, temperature, _computed_in(hidden), compiled)  # pyright: ignore


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        dtype: torch.dtype, compiled: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        numbers = [torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(3)]
        reduce, w = _maybe(_reduce, compiled), weight.to(dtype)
        for rows in _chunks(len(hidden), weight.shape[0], hidden.device):
            logits = _project(hidden[rows].to(dtype), w, bias)
            for whole, part in zip(numbers, reduce(logits, targets[rows], temperature), strict=True):
                whole[rows] = part
        chosen, normalizer, entropy = numbers
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropy)
        ctx.options = temperature, dtype, compiled
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets, normalizer, entropy = ctx.saved_tensors
        temperature, dtype, compiled = ctx.options
        spread, zeros = _maybe(_spread, compiled), torch.zeros_like(normalizer)
        grad, grad_entropy = (zeros if g is None else g.float() for g in (grad, grad_entropy))

        def slope(logits: Tensor, rows: slice) -> Tensor:
            return spread(logits, *(x[rows] for x in (targets, normalizer, entropy, grad, grad_entropy)), temperature)

        return *_gradients(hidden, weight, bias, dtype, ctx.needs_input_grad, slope), None, None, None, None


def numbers_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, numbers: Callable[[Tensor, slice], tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, ...]:
    """``numbers(h W^T + b, all rows)``, computed in chunks: ``numbers`` gets the logits of a slice of rows and tells
    numbers of each, which must not depend on others. In the backward pass it is called again."""
    return _Numbers.apply(hidden, weight, bias, _computed_in(hidden), numbers)  # pyright: ignore[reportReturnType]


class _Numbers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, numbers: Any
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        w = weight.to(dtype)
        chunks = _chunks(len(hidden), weight.shape[0], hidden.device)
        parts = [numbers(_project(hidden[rows].to(dtype), w, bias), rows) for rows in chunks]
        ctx.save_for_backward(hidden, weight, bias)
        ctx.options = dtype, numbers
        return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dtype, numbers = ctx.options
        hidden, weight, bias = ctx.saved_tensors

        def slope(logits: Tensor, rows: slice) -> Tensor:
            with torch.enable_grad():
                x = logits.detach().requires_grad_()
                found = zip(numbers(x, rows), grads, strict=True)
                pairs = [(y, g[rows]) for y, g in found if y is not None and g is not None and y.requires_grad]
                return torch.autograd.grad([y for y, _ in pairs], x, [g for _, g in pairs])[0]

        return *_gradients(hidden, weight, bias, dtype, ctx.needs_input_grad, slope), None, None


def _computed_in(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, needed: tuple[bool, ...],
    slope: Callable[[Tensor, slice], Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """By hidden states, weight and bias, where needed.

    Args:
        slope: the gradient by the logits of some rows, of those logits.
    """
    w = weight.to(dtype)
    to_hidden = torch.empty_like(hidden) if needed[0] else None
    to_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needed[1] else None
    to_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None
    for rows in _chunks(len(hidden), weight.shape[0], hidden.device):
        h = hidden[rows].to(dtype)
        pull = slope(_project(h, w, bias), rows)
        if to_hidden is not None:
            to_hidden[rows] = (pull @ w).to(hidden.dtype)
        if to_weight is not None:
            _add_product(to_weight, pull, h)
        if to_bias is not None:
            to_bias += pull.sum(0, dtype=torch.float32)
    found_weight = None if to_weight is None else to_weight.to(weight.dtype)
    return to_hidden, found_weight, None if to_bias is None or bias is None else to_bias.to(bias.dtype)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))


def _reduce(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """``[M, V]`` logits to log-prob of the target, normalizer and entropy, ``[M]`` float32 each."""
    x = logits.float() / temperature
    normalizer = x.logsumexp(-1)
    lp = x - normalizer[:, None]
    return lp.gather(-1, targets[:, None]).squeeze(-1), normalizer, -(lp.exp() * lp).sum(-1)


def _spread(
    logits: Tensor, targets: Tensor, normalizer: Tensor, entropy: Tensor, grad: Tensor, grad_entropy: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    """The gradient by the logits, ``[M, V]`` in their type."""
    lp = logits.float() / temperature - normalizer[:, None]
    p = lp.exp()
    hit = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    total = torch.where(hit, grad[:, None], 0.0) - p * (grad[:, None] + grad_entropy[:, None] * (lp + entropy[:, None]))
    return (total / temperature).to(logits.dtype)


def _add_product(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """``total += slope^T hidden``, added up in float32."""
    if total.is_cuda and slope.dtype != torch.float32 and _adds_in_float32(total.device):
        torch.addmm(total, slope.T, hidden, out_dtype=torch.float32, out=total)  # pyright: ignore[reportCallIssue]
    else:
        total.add_(slope.T @ hidden)


@functools.cache
def _adds_in_float32(device: torch.device) -> bool:
    """Whether this PyTorch multiplies half-precision matrices into a float32 sum. Tried once."""
    a = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)  # pyright: ignore[reportCallIssue]
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 17).all())


def _chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    size = max(1, CHUNK.get(device.type, CHUNK["cpu"]) // vocabulary)
    return (slice(start, start + size) for start in range(0, rows, size))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _maybe(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return _compiled(function) if compiled else function


@contextmanager
def answering(head: nn.Module, answer: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Iterator[None]:
    """Inside, an output layer gives ``answer(hidden, weight, bias)`` where it would give logits.

    So the answer is computed where the model calls its output layer, while a sharded model has its weight gathered.
    """
    layer: Any = head
    layer.forward = lambda hidden: answer(hidden, layer.weight, getattr(layer, "bias", None))
    try:
        yield
    finally:
        del layer.forward
