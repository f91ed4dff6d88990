"""SGLang's hash of a tensor by tiles, for both sides: the learner's, and ``skyrl_loader`` inside SGLang's processes.

Two halves of 32 bits are computed side by side. ``kernel.py`` needs Triton, this file torch alone.
"""

import torch

RUN = 8192
SEED = 0x243F6A88
SEEDS = (SEED, ((SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
PLACE = (0x27D4EB2D, 0x165667B1)
TURN = (15, 13)
MIX = (0x85EBCA6B, 0xC2B2AE35)


def words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes as 32-bit words, the last filled up with zeros."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    missing = -len(flat) % 4
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(torch.int32)
