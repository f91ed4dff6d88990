"""How much memory each phase takes on this worker: predicted from shapes, beside what was measured.

    weights      this worker's shards, as stored              gradients    float32, of what is trained
    optimizer    two moments, float32                         gathered     a layer and the embeddings, as computed in
    activations  what is kept of each layer, one layer in full, and a chunk of logits

The prediction knows decoder layers of the usual shape; what it leaves out (fragments, libraries) shows as the gap.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from skyrl_train.errors import WorkerError
from skyrl_train.models.projection import CHUNK
from skyrl_train.models.sharding import layers_of

GIB = 1 << 30


@dataclass(slots=True, kw_only=True)
class Shapes:
    """What a prediction needs of a model."""

    weights: int
    """Bytes of this worker's parameters."""
    trained: int
    """Parameters that this worker trains."""
    gathered: int
    """Bytes of what is whole at the same time while a sharded model computes."""
    layers: int
    hidden: int
    queries: int
    """heads x head size."""
    keys: int
    """key-value heads x head size."""
    inner: int
    """Of the MLP."""
    vocabulary: int
    width: int
    """Bytes of a number in activations."""

    @classmethod
    def of(cls, module: nn.Module, config: Any, *, sharded: bool, half: bool) -> Shapes:
        """Of a model as it is now.

        Args:
            config: transformers' own, of the text part.
        """
        parameters, width = list(module.parameters()), 2 if half else 4
        local = [_local(p) for p in parameters]
        layers = layers_of(module)
        inside = {id(p) for layer in layers for p in layer.parameters()}
        largest = max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0)
        around = sum(p.numel() for p in parameters if id(p) not in inside)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            weights=sum(p.nbytes for p in local),
            trained=sum(p.numel() for p, whole in zip(local, parameters, strict=True) if whole.requires_grad),
            gathered=(2 * largest + around) * width if sharded else 0,  # the next layer is gathered ahead
            layers=len(layers),
            hidden=config.hidden_size,
            queries=config.num_attention_heads * head,
            keys=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head,
            inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            vocabulary=config.vocab_size,
            width=width,
        )

    def scoring(self, tokens: int) -> int:
        """Bytes of a forward pass over so many tokens, weights and all."""
        return self.weights + self.gathered + tokens * self._layer + self._logits(tokens, 1)

    def training(self, tokens: int, kept: str | None, whole_gradients: int = 0) -> int:
        """Bytes at the peak of an update whose largest micro-batch has so many tokens.

        Args:
            whole_gradients: bytes of gradients that are kept whole between micro-batches.
            kept: "full", "selective" (``gradient_checkpointing_mode``), or None: nothing is recomputed.
        """
        each = {"full": self.hidden, "selective": self.hidden + self.queries}.get(kept or "")
        one = self._layer + (2 * self.inner + self.queries + self.hidden) * self.width
        kept_bytes = self.layers * (each * self.width if each is not None else self._layer)
        states = self.weights + self.gathered + 12 * self.trained + whole_gradients
        return states + tokens * (kept_bytes + one) + self._logits(tokens, 2)

    @property
    def _layer(self) -> int:
        """Bytes of one layer's activations for a token."""
        return (4 * self.hidden + 3 * self.queries + 4 * self.keys + 3 * self.inner) * self.width

    def _logits(self, tokens: int, copies: int) -> int:
        return min(tokens * self.vocabulary, CHUNK["cuda"]) * (copies * self.width + 4)


@dataclass(slots=True)
class MemoryLog:
    """The peaks of this process, by phase."""

    device: torch.device
    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, predicted: int) -> Iterator[None]:
        """Measures what runs inside. Of a phase that came before, the larger peak stays.

        Raises:
            WorkerError: the GPU's memory is not enough; it says what was predicted, and what to set.
        """
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise WorkerError(f"{self.device}, {name}: {_too_little(error, predicted)}") from error
        peak = torch.cuda.max_memory_allocated(self.device) if gpu else _resident_peak()
        now = {"predicted_GiB": predicted / GIB, "measured_GiB": peak / GIB}
        if gpu:
            now["reserved_GiB"] = torch.cuda.max_memory_reserved(self.device) / GIB
        before = self.phases.get(name, {})
        self.phases[name] = {key: round(max(value, before.get(key, 0.0)), 3) for key, value in now.items()}


def _too_little(error: torch.OutOfMemoryError, predicted: int) -> str:
    said = str(error).splitlines()[0]
    return (
        f"{said} (predicted for this phase: {predicted / GIB:.1f} GiB, without what others hold on this GPU.) Lower "
        "trainer.max_tokens_per_microbatch, or trainer.micro_train_batch_size_per_gpu and "
        "trainer.micro_forward_batch_size_per_gpu; set trainer.gradient_checkpointing=true, "
        "trainer.policy.optimizer_config.offload_after_step=true or trainer.policy.fsdp_config.cpu_offload=true; and "
        "where engines share the GPU, lower generator.gpu_memory_utilization."
    )


def _local(parameter: Any) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _resident_peak() -> int:
    """Bytes of this process at its largest, Python and libraries included; it never falls."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
