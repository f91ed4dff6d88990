"""``Outline``: what a weight sync sends, which stays the same from sync to sync."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.engines.sglang.payloads import Bucket, Spec, empty_bucket, plan_buckets, unpack
from skyrl_train.models.checkpoint_names import checkpoint_tensors
from skyrl_train.models.gather import copy_all, copy_whole, in_place, own_part
from skyrl_train.weight_sync.digests import Kind
from skyrl_train.weight_sync.directions import directions
from skyrl_train.weight_sync.layout import Layout, Rank
from skyrl_train.weight_sync.own_memory import lent, own_buckets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SendPlan:
    """What one sync sends, and what is to be known of it afterwards."""

    dtype: str
    """The engines' number format, such as "bfloat16"."""
    limit: int
    """Bytes of one bucket."""
    device: str
    """Where buckets lie: "cuda" or "cpu"."""
    ranks: tuple[Rank, ...] = ()
    """Of these, the digests are computed."""
    digests: Kind | None = None
    merged: bool = True
    """With the work of the policy's adapter in the weights; else the base model's."""
    own: bool = False
    """The engines can read the worker's own memory, where that holds the model as it is."""


class Outline:
    """What stays the same from sync to sync: names, shapes, buckets, and where ranks hold what.

    Args:
        model: whole, or sharded over workers that all make the same outline.
        plan: of which ``digests`` does not matter.
    """

    def __init__(self, model: PreTrainedModel, plan: SendPlan) -> None:
        self.plan, self.tensors = plan, checkpoint_tensors(model, merged=plan.merged)
        to: torch.dtype = getattr(torch, plan.dtype)
        specs = [
            Spec(name=name, shape=held.shape, dtype=to if held.dtype.is_floating_point else held.dtype)
            for name, held in ((name, self.tensors.spec(name)) for name in self.tensors)
        ]
        self._specs = {spec.name: spec for spec in specs}
        self.buckets = plan_buckets(specs, plan.limit)
        self.layout = Layout.of(model.config, self.tensors)
        self._parts: dict[int, list[Tensor]] = {}
        """Of buckets that are just parameters, this worker's part of each, which is all of it."""
        self._whose: list[tuple[Tensor, Tensor]] = []
        """The same parts, each with its parameter."""
        self.own: list[Tensor] = []
        """Of each bucket a tensor, if the buckets are the worker's own memory."""
        if plan.own and self.layout is not None and not self.layout.experts and self.knows(plan.ranks):
            self._take_own()
        self._directions: dict[Rank, list[bytes]] = {}

    def fresh(self) -> bool:
        """Whether all parameters are still where they were found, wherever their memory has been meanwhile."""
        return in_place(self._whose)

    def fill(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """The bytes of bucket ``index``, ``[N]`` uint8, and its tensors there (of own memory none)."""
        if self.own:
            return lent(self.own[index]), []
        flat, views = empty_bucket(self.buckets[index], self.plan.device)
        if index in self._parts:
            copy_all(views, self._parts[index])
            return flat, views
        names = [spec.name for spec in self.buckets[index]]
        sources = [self.tensors[name] for name in names]
        copy_whole(views, sources)
        parameters = [found for name in names if (found := self.tensors.parameter(name)) is not None]
        if len(parameters) == len(names):
            self._parts[index] = sources
            self._whose += zip(sources, parameters, strict=True)
        return flat, views

    def converted(self, index: int, views: list[Tensor]) -> Iterator[tuple[Bucket, list[Tensor]]]:
        """Bucket ``index`` in the engines' number format, at most ``plan.limit`` bytes at a time."""
        bucket = self.buckets[index]
        if not self.own:
            yield bucket, views
            return
        held = dict(zip((spec.name for spec in bucket), unpack(bucket, lent(self.own[index])), strict=True))
        for part in plan_buckets([self._specs[spec.name] for spec in bucket], self.plan.limit):
            _, views = empty_bucket(part, self.plan.device)
            copy_all(views, [held[spec.name] for spec in part])
            yield part, views

    def knows(self, ranks: Sequence[Rank]) -> bool:
        """Whether it is known how these ranks hold the model."""
        return self.layout is not None and all(map(self.layout.knows, ranks))

    def directions(self, rank: Rank, index: int) -> bytes | None:
        """Where a rank puts the tensors of bucket ``index``; None: that is not known for sure.

        Experts are left to the server: some of its kernels hold them in an order of their own.
        """
        layout = self.layout
        if layout is None or layout.experts or not layout.knows(rank):
            return None
        if rank not in self._directions:
            pieces, totals = layout.pieces({name: spec.shape for name, spec in self._specs.items()}, rank)
            tied = "lm_head.weight" not in self._specs
            self._directions[rank] = [directions(bucket, pieces, totals, tied=tied) for bucket in self.buckets]
        return self._directions[rank][index]

    def _take_own(self) -> None:
        parameters = [self.tensors.parameter(name) for name in self.tensors]
        whole = [parameter for parameter in parameters if parameter is not None]
        if len(whole) < len(parameters):
            return
        parts = dict(zip(self.tensors, map(own_part, whole), strict=True))
        if found := own_buckets(parts, most=len(self.buckets)):
            self.buckets, self.own = [bucket for bucket, _ in found], [holder for _, holder in found]
            self._whose = list(zip(parts.values(), whole, strict=True))
