"""The entropy bonus: a loss that falls when the policy's next-token distribution gets wider."""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_train.algorithms.tensors import at_least_float32, require


def entropy_loss(entropy: Tensor, mask: Tensor) -> Tensor:
    """Minus the entropy of every trained token, to be reduced like the policy loss and weighed by a coefficient.

    Args:
        entropy: ``[B, T]`` with gradient: the entropy in nats of the distribution that each token was drawn from.
        mask: ``[B, T]`` bool.

    Returns:
        ``[B, T]``, 0 where the mask is False.

    Raises:
        TensorError: a tensor has the wrong shape, dtype or device.
    """
    require(mask, entropy=entropy)
    return torch.where(mask, -at_least_float32(entropy), 0.0)
