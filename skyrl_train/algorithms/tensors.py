"""What every function of this folder needs: checks that name the tensor, and sums that masked positions cannot enter.

B sequences, T response tokens. A mask is bool; where it is False a tensor may hold anything, NaN and inf included.
Masked values are replaced (``torch.where``) before any non-linear step, never multiplied by 0: ``0 * nan`` is ``nan``,
forwards and in the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_train.errors import SkyRLError

LOG_RATIO_LIMIT = 20.0
"""Differences of log-probs are clamped to plus or minus this before ``exp``, as SkyRL does: ``exp(20)`` is 4.9e8."""


class TensorError(SkyRLError, ValueError):
    """A tensor of the wrong shape, dtype or device; the message names the tensor and what was expected."""


def require(mask: Tensor, **tensors: Tensor | None) -> None:
    """Checks that ``mask`` is bool ``[B, T]`` and that every tensor is floating, of its shape, and on its device.

    A tensor that is None is skipped.

    Raises:
        TensorError: names the tensor that is not.
    """
    if mask.dtype != torch.bool:
        raise TensorError(f"mask: dtype {mask.dtype}, expected torch.bool. Compare it: mask > 0.")
    if mask.dim() != 2:
        raise TensorError(f"mask: shape {list(mask.shape)}, expected [B, T].")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != mask.shape:
            raise TensorError(f"{name}: shape {list(tensor.shape)}, expected that of the mask, {list(mask.shape)}.")
        if not tensor.is_floating_point():
            raise TensorError(f"{name}: dtype {tensor.dtype}, expected a floating one.")
        if tensor.device != mask.device:
            raise TensorError(f"{name}: on device {tensor.device}, the mask is on {mask.device}.")


def require_group(group: Tensor, mask: Tensor) -> None:
    """Checks that ``group`` is an integer ``[B]`` on the mask's device.

    Raises:
        TensorError: it is not.
    """
    if group.shape != mask.shape[:1]:
        raise TensorError(f"group: shape {list(group.shape)}, expected [B] = {list(mask.shape[:1])}.")
    if group.is_floating_point() or group.dtype == torch.bool:
        raise TensorError(f"group: dtype {group.dtype}, expected an integer one: it numbers the prompts.")
    if group.device != mask.device:
        raise TensorError(f"group: on device {group.device}, the mask is on {mask.device}.")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision is widened; float32 and float64 stay."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def masked_difference(left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """``left - right`` where the mask is True, else an exact 0 through which no gradient flows.

    The subtraction is linear, so what its masked positions hold cannot come back as a NaN gradient.
    """
    return torch.where(mask, at_least_float32(left) - at_least_float32(right), 0.0)


def count(mask: Tensor) -> Tensor:
    """How many positions are True, int64, 0-d. (``mask.sum()`` says the same, several times slower on a CPU.)"""
    return mask.count_nonzero()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over True positions, a 0-d tensor; 0 if there is none."""
    return torch.where(mask, values, 0.0).sum() / count(mask).clamp(min=1)


def masked_max(values: Tensor, mask: Tensor) -> Tensor:
    """Largest value at a True position, a 0-d tensor; 0 if there is none."""
    if not mask.numel():
        return values.new_zeros(())
    largest = torch.where(mask, values, -torch.inf).max()
    return torch.where(mask.any(), largest, 0.0)  # to look at the mask from Python is to wait for the GPU


def masked_min(values: Tensor, mask: Tensor) -> Tensor:
    """Smallest value at a True position, a 0-d tensor; 0 if there is none."""
    return -masked_max(-values, mask)


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row over its True positions, ``[B, 1]``; 0 for a row without one."""
    return torch.where(mask, values, 0.0).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all True positions, ``[B, T]``; 0 elsewhere, and 0 for a single value.

    As SkyRL, verl and TRL do it: the variance is the unbiased one, and 1e-8 is added to it. Equal values give 0.
    """
    centred = centre(at_least_float32(values), mask)
    variance = centred.square().sum(dtype=torch.float64) / (count(mask) - 1).clamp(min=1)
    return centred * (variance + 1e-8).rsqrt().to(centred.dtype)


def centre(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` minus their mean over all True positions, 0 elsewhere; exactly 0 for equal values."""
    above = torch.where(mask, values - masked_min(values, mask), 0.0)
    mean = above.sum(dtype=torch.float64) / count(mask).clamp(min=1)
    return torch.where(mask, above - mean.to(values.dtype), 0.0)
