"""A whole copy of a sharded model, for what needs all of the parameters in one piece."""

from __future__ import annotations

import copy

import torch
from torch import nn

from skyrl_train.models.gather import full_tensor


class Mirror:
    """Made of a model before that is sharded.

    Args:
        model: whole; the copy has its structure (adapter included) and its numbers as they are now.
        device: of the copy.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = copy.deepcopy(model).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Takes the numbers of the model, which is sharded by now. A collective: every worker calls it."""
        now = model.state_dict()
        for name, mine in self.model.state_dict().items():
            mine.copy_(full_tensor(now[name]))
