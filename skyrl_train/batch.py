"""``TrainBatch``: trajectories as tensors, and ``collate``, which makes one.

B sequences, P prompt tokens (padded on the left), T response tokens (padded on the right).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from skyrl_train.types import Trajectory


@dataclass(slots=True, kw_only=True)
class TrainBatch:
    """What the learner and the algorithms work on. Where ``response_mask`` is 0, ``response_ids`` holds the
    padding token and every other ``[B, T]`` tensor 0.

    Two sequences, one of a two-turn game (the middle token was the env's), one of a single short turn::

        response_ids   7 5 9     loss_mask   1 0 1     response_mask   1 1 1     rewards   0 0 1    group  0
                       4 8 .                 1 1 0                     1 1 0               0 0 0           1
    """

    prompt_ids: Tensor
    """``[B, P]`` int64, padded on the left."""
    prompt_lengths: Tensor
    """``[B]`` int64."""
    response_ids: Tensor
    """``[B, T]`` int64."""
    response_mask: Tensor
    """``[B, T]`` bool: a token is there."""
    loss_mask: Tensor
    """``[B, T]`` bool: the policy wrote it, and it is to be trained on."""
    rollout_logprobs: Tensor
    """``[B, T]`` float32: the engine's, when it sampled."""
    rewards: Tensor
    """``[B, T]`` float32: a turn's reward sits on its last token."""
    group: Tensor
    """``[B]`` int64, ascending: which prompt of the step this is a sample of."""
    old_logprobs: Tensor | None = None
    """``[B, T]``: the learner's at the start of the step."""
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    """``[B, T]``: the critic's at the start of the step, before each token."""
    advantages: Tensor | None = None
    returns: Tensor | None = None
    baselines: Tensor | None = None
    """``[B]``: the score of the prompt's greedy trajectory, where the estimator wants one."""
    correction: Tensor | None = None
    """``[B, T]``: factors of the policy loss, where the gap between engine and learner is corrected."""
    host: TrainBatch | None = None
    """Of a batch that was moved to a GPU, the one it was: reading that waits for nothing."""

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    def select(self, rows: Tensor | Sequence[int]) -> TrainBatch:
        """The given rows, in the given order, as a batch of the same padded widths."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device) -> TrainBatch:
        """The same batch on another device."""
        there = self._map(lambda tensor: onto(tensor, device))
        return there if device.type == "cpu" else replace(there, host=self.host or self)

    def write(self, path: Path) -> None:
        """Writes every tensor into one safetensors file (``trainer.dump_data_batch``)."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = self._tensors()
        # Copies: one tensor may stand under two names (old_logprobs is rollout_logprobs), which safetensors refuses.
        save_file(
            {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items() if t is not None}, path
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> TrainBatch:
        values = {name: None if t is None else function(t) for name, t in self._tensors().items()}
        return replace(self, **values, host=None)

    def _tensors(self) -> dict[str, Tensor | None]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "host"}

    def prompt(self, row: int) -> list[int]:
        """The prompt's tokens without padding."""
        return self.prompt_ids[row, self.prompt_ids.shape[1] - int(self.prompt_lengths[row]) :].tolist()

    def response(self, row: int) -> list[int]:
        """The response's tokens without padding."""
        return self.response_ids[row, : int(self.response_mask[row].sum())].tolist()


def onto(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; to a GPU from page-locked memory, so that nobody waits for what it still has to do."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def collate(trajectories: Sequence[Trajectory], pad_token_id: int) -> TrainBatch:
    """Makes a batch of the usable trajectories, those of one prompt side by side, in the order of the prompts given.

    Raises:
        ValueError: none is usable, or some have a baseline and others not.
    """
    usable = [t for t in trajectories if t.usable]
    if not usable:
        raise ValueError("no usable trajectory to collate")
    order = {uid: i for i, uid in enumerate(dict.fromkeys(t.prompt.uid for t in usable))}
    usable.sort(key=lambda t: (order[t.prompt.uid], t.sample))
    length = max(1, max(len(t.response_ids) for t in usable))
    width = max(len(t.prompt_ids) for t in usable)

    def right(name: str, dtype: type, fill: int = 0) -> Tensor:
        table = np.full((len(usable), length), fill, dtype)
        for row, t in zip(table, usable, strict=True):
            row[: len(t.response_ids)] = getattr(t, name)
        return torch.from_numpy(table)

    prompts = np.full((len(usable), width), pad_token_id, np.int64)
    for row, t in zip(prompts, usable, strict=True):
        row[width - len(t.prompt_ids) :] = t.prompt_ids
    lengths = torch.tensor([len(t.response_ids) for t in usable])
    return TrainBatch(
        prompt_ids=torch.from_numpy(prompts),
        prompt_lengths=torch.tensor([len(t.prompt_ids) for t in usable]),
        response_ids=right("response_ids", np.int64, pad_token_id),
        response_mask=torch.arange(length) < lengths[:, None],
        loss_mask=right("loss_mask", np.bool_),
        rollout_logprobs=right("rollout_logprobs", np.float32),
        rewards=right("rewards", np.float32),
        group=torch.tensor([order[t.prompt.uid] for t in usable]),
        baselines=_baselines(usable),
    )


def _baselines(trajectories: Sequence[Trajectory]) -> Tensor | None:
    """``[B]`` float32, or None where no trajectory has one."""
    found = [t.baseline for t in trajectories if t.baseline is not None]
    if not found:
        return None
    if len(found) < len(trajectories):
        raise ValueError(f"{len(found)} of {len(trajectories)} trajectories have a baseline")
    return torch.tensor(found, dtype=torch.float32)
