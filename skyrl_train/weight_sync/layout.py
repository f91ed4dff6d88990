"""How an SGLang server holds a checkpoint in memory: fused, sliced over tensor-parallel ranks, and padded.

SGLang's weights checker names and hashes tensors as its ranks hold them. To know what it must answer, the sender has to
lay out what it sends in the same way::

    checkpoint                                   held by rank r of 2
    q_proj [Q, H], k_proj [K, H], v_proj [K, H]  qkv_proj      rows of q for r, then of k, then of v
    gate_proj [I, H], up_proj [I, H]             gate_up_proj  rows of gate for r, then of up
    o_proj [H, Q], down_proj [H, I]              the same name, columns of r
    experts.N.{gate,up}_proj, N = 0, 1, ...      experts.w13_weight: for each expert, gate then up
    embed_tokens [V, H], lm_head [V, H]          rows of r, of a vocabulary padded with zeros to a multiple of 64

Whatever else there is, every rank holds whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "qwen3_moe"})
"""Model types (``config.model_type``) of which the layout is known, and tested against real servers."""
VOCABULARY_STEP = 64
WIDTH_STEP = 64
Kind = Literal["whole", "rows", "kv_rows", "columns", "vocabulary"]
_QKV = re.compile(r"(.*\.)([qkv])_proj\.(weight|bias)")
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
_GATE_UP = re.compile(r"(.*\.)(gate|up)_proj\.(weight|bias)")
_ROW_PARALLEL = re.compile(r".*\.(o|down)_proj\.weight")
_VOCABULARY = re.compile(r"(.*\.)?(embed_tokens|lm_head)\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """Which part of each tensor a rank holds."""

    tensor_rank: int = 0
    tensor_size: int = 1
    expert_size: int = 1
    """Expert-parallel size: experts are dealt out over so many parts of the tensor-parallel ranks."""
    on_cpu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What a rank holds of a checkpoint tensor, and where: counted in elements."""

    held: str
    first: int
    """Element of the held tensor where the piece begins."""
    size: tuple[int, ...]
    stride: tuple[int, ...]
    """Of the piece in the checkpoint tensor."""
    start: int
    """Element of the checkpoint tensor where the piece begins."""
    zeros: int = 0
    """Elements after it that are padding."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one checkpoint tensor goes: it is part ``part`` of the tensor ``held``."""

    held: str
    part: tuple[int, ...]
    kind: Kind
    expert: int | None = None


def place(name: str) -> Place:
    """The place of the checkpoint tensor ``name``."""
    if match := _QKV.fullmatch(name):
        part = "qkv".index(match[2])
        return Place(f"{match[1]}qkv_proj.{match[3]}", (part,), "kv_rows" if part else "rows")
    if match := _EXPERT.fullmatch(name):
        expert = int(match[2])
        if match[3] == "down":
            return Place(f"{match[1]}w2_weight", (expert,), "columns", expert)
        return Place(f"{match[1]}w13_weight", (expert, int(match[3] == "up")), "rows", expert)
    if match := _GATE_UP.fullmatch(name):
        return Place(f"{match[1]}gate_up_proj.{match[3]}", (int(match[2] == "up"),), "rows")
    if _ROW_PARALLEL.fullmatch(name):
        return Place(name, (0,), "columns")
    return Place(name, (0,), "vocabulary" if _VOCABULARY.fullmatch(name) else "whole")


class Layout:
    """The layout of one model.

    Args:
        names: of every tensor in the checkpoint.
        kv_heads: key-value heads of the model.
        experts: of each mixture-of-experts layer; 0: there are none.
        widths: of the feed-forward layers.
    """

    def __init__(self, names: Iterable[str], *, kv_heads: int, experts: int = 0, widths: Sequence[int] = ()) -> None:
        self.kv_heads, self.experts, self.widths = kv_heads, experts, tuple(widths)
        self.places = {name: place(name) for name in names}
        self.parts: dict[str, list[str]] = {}
        for name in sorted(self.places, key=lambda name: self.places[name].part):
            self.parts.setdefault(self.places[name].held, []).append(name)

    @classmethod
    def of(cls, config: Any, names: Iterable[str]) -> Layout | None:
        """The layout of a transformers model by its config; None if its family is not known."""
        if config.model_type not in FAMILIES:
            return None
        widths = [getattr(config, name, 0) or 0 for name in ("intermediate_size", "moe_intermediate_size")]
        experts = getattr(config, "num_experts", 0) or 0
        return cls(names, kv_heads=config.num_key_value_heads, experts=experts, widths=widths)

    def knows(self, rank: Rank) -> bool:
        """Whether the rank holds what is written here: on a CPU, SGLang widens layers that do not divide evenly."""
        even = all(width % (WIDTH_STEP * rank.tensor_size) == 0 for width in self.widths)
        return not rank.on_cpu or (even and self.kv_heads % rank.tensor_size == 0)

    def holds(self, name: str, rank: Rank) -> bool:
        """Whether the rank holds anything of a checkpoint tensor: experts are dealt out."""
        expert = self.places[name].expert
        if expert is None or rank.expert_size == 1:
            return True
        each, ranks = self.experts // rank.expert_size, rank.tensor_size // rank.expert_size
        return expert // each == rank.tensor_rank // ranks

    def slice(self, name: str, tensor: Tensor, rank: Rank) -> Tensor:
        """What the rank holds of a whole checkpoint tensor, padding included: a view where that is possible."""
        held = self._cut(name, tensor, rank)
        missing = self._rows(len(tensor), rank) - len(held) if self.places[name].kind == "vocabulary" else 0
        if not missing:
            return held
        padded = held.new_zeros(len(held) + missing, *held.shape[1:])
        padded[: len(held)] = held
        return padded

    def pieces(self, shapes: Mapping[str, tuple[int, ...]], rank: Rank) -> tuple[dict[str, Piece], dict[str, int]]:
        """Where the rank holds each checkpoint tensor of which it holds anything.

        Args:
            shapes: of every checkpoint tensor, by name.

        Returns:
            The pieces by checkpoint name, and the elements of every held tensor by its name.
        """
        import torch

        pieces: dict[str, Piece] = {}
        totals: dict[str, int] = {}
        for held, names in self.parts.items():
            for name in (name for name in names if self.holds(name, rank)):
                whole = torch.empty(shapes[name], device="meta")
                cut = self._cut(name, whole, rank)
                zeros = 0
                if self.places[name].kind == "vocabulary":
                    zeros = (self._rows(len(whole), rank) - len(cut)) * whole[:1].numel()
                first = totals.get(held, 0)
                pieces[name] = Piece(
                    held=held, first=first, size=tuple(cut.shape), stride=cut.stride(),
                    start=int(cut.storage_offset()), zeros=zeros,
                )  # fmt: skip
                totals[held] = first + cut.numel() + zeros
        return pieces, totals

    def _cut(self, name: str, tensor: Tensor, rank: Rank) -> Tensor:
        """The rank's part of a whole checkpoint tensor, as a view."""
        found = self.places[name]
        index, size = rank.tensor_rank, rank.tensor_size
        if found.expert is not None:
            size //= rank.expert_size
            index %= size
        if found.kind == "vocabulary":
            rows = self._rows(len(tensor), rank)
            return tensor[index * rows : (index + 1) * rows]
        if size == 1 or found.kind == "whole":
            return tensor
        if found.kind == "kv_rows" and size > self.kv_heads:  # ranks share a head
            index, size = index * self.kv_heads // size, self.kv_heads
        dimension = 1 if found.kind == "columns" else 0
        length = tensor.shape[dimension] // size
        return tensor.narrow(dimension, index * length, length)

    @staticmethod
    def _rows(vocabulary: int, rank: Rank) -> int:
        """Rows of the padded vocabulary that each rank holds."""
        step, size = VOCABULARY_STEP, rank.tensor_size
        if rank.on_cpu and -(-vocabulary // step) * step % size:
            step *= size
        return -(-vocabulary // step) * step // size
