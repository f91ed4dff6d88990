"""A causal language model with one number for each token in place of a vocabulary: the critic."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from skyrl_train.batch import TrainBatch
from skyrl_train.errors import ModelError
from skyrl_train.models.attention import no_mask
from skyrl_train.models.folders import locate
from skyrl_train.models.packing import pack
from skyrl_train.models.scoring import padded_inputs, sequences
from skyrl_train.models.sequence_parallel import SequenceSplit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("skyrl.models")


class ValueModel(nn.Module):
    """The body of a language model and a linear head.

    Args:
        model: its output layer is left out.
        path: the folder that it came from. A tensor ``<head>.weight`` in it is the head; else the head starts from
            small random numbers (standard deviation 1 / (hidden size + 1), as in SkyRL and OpenRLHF).
        head: name of the head (``trainer.algorithm.value_head_prefix``).
    """

    def __init__(self, model: PreTrainedModel, path: str, head: str) -> None:
        super().__init__()
        self.config: Any = model.config
        self.backbone: Any = model.base_model
        if self.backbone is model:
            raise ModelError(f"'{path}' ({model.config.model_type}) has no body apart from its output layer.")
        hidden = model.config.get_text_config().hidden_size
        self.head_name = head
        linear = nn.Linear(hidden, 1, bias=False, device=model.device, dtype=torch.float32)
        saved = _saved_head(path, f"{head}.weight")
        with torch.no_grad():
            if saved is None:
                linear.weight.normal_(std=1 / (hidden + 1))
            elif saved.shape == linear.weight.shape:
                linear.weight.copy_(saved)
            else:
                raise ModelError(f"{head}.weight in '{path}' has shape {list(saved.shape)}, expected [1, {hidden}].")
        log.info("critic: %s %s", f"{head}.weight", "starts from random numbers" if saved is None else "was loaded")
        self.add_module(head, linear)

    @property
    def in_float32(self) -> list[nn.Module]:
        """What a sharded model does not convert: half precision has too few digits for a value."""
        return [getattr(self, self.head_name)]

    def forward(self, **inputs: Any) -> Tensor:
        """Values ``[rows, tokens]``, float32, of the state after each token of the input."""
        hidden = self.backbone(use_cache=False, **inputs).last_hidden_state
        return getattr(self, self.head_name)(hidden.float()).squeeze(-1).clone()  # FSDP2 hooks no view


def values_of(model: ValueModel, batch: TrainBatch, *, packed: bool, split: SequenceSplit | None = None) -> Tensor:
    """The value before each response token, ``[B, T]`` float32 with gradient, 0 where ``response_mask`` is 0.

    Args:
        packed: no padding, shared prompts once. False runs the padded specification.
        split: see ``scoring.score``.
    """
    if packed:
        row = pack(*sequences(batch), device=batch.response_ids.device, split=split)
        found = model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            attention_mask=no_mask(row.input_ids),
            plan=row.plan,
        )[0, row.score_index]
        values = nn.functional.pad(row.unpack(found), (0, batch.response_ids.shape[1] - row.shape[1]))
    else:
        values = model(**padded_inputs(batch))[:, batch.prompt_ids.shape[1] - 1 : -1]
    return torch.where(batch.response_mask, values, 0.0)


def _saved_head(path: str, name: str) -> Tensor | None:
    """The tensor of that name in the safetensors files of a model folder; hub models have none of ours."""
    from safetensors import safe_open

    source, options = locate(path)
    for file in [] if options else sorted(Path(source).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - no mapping
                return tensors.get_tensor(name)
    return None
