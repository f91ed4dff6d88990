"""Looks into the tensors of a checkpoint, and changes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from skyrl_train.learner import shard_files


def tensors(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Those whose name begins with the prefix, without it."""
    held = shard_files._reader(str(folder)).read_metadata().state_dict_metadata
    found = {name: torch.empty(tuple(about.size), dtype=about.properties.dtype) for name, about in held.items()}  # type: ignore[union-attr]
    shard_files.read(str(folder), found, alone=True)
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def replace(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Puts other tensors there."""
    facts = (folder / "state.json").read_text()
    shutil.rmtree(folder)
    shard_files.write(str(folder), state, alone=True)
    (folder / "state.json").write_text(facts)
