"""``Outline``: what a weight sync sends, which stays the same from sync to sync."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.engines.sglang.payloads import Bucket, Spec, empty_bucket, plan_buckets
from skyrl_train.models.checkpoint_names import checkpoint_tensors
from skyrl_train.models.gather import copy_all, copy_whole, in_place, own_part
from skyrl_train.weight_sync.digests import Digester, Kind, OwnDigester, told
from skyrl_train.weight_sync.directions import directions, question
from skyrl_train.weight_sync.layout import Layout, Rank
from skyrl_train.weight_sync.own_memory import lent, own_runs

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
    hold: bool = False
    """That memory stays where it is, so that engines need not let go of it between syncs."""


Digests = Mapping[Rank, Mapping[str, str]]
"""By rank, the digest of each tensor that it holds, by its name there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What is known of a sync's weights when all are sent."""

    digests: Digests = field(default_factory=dict)
    """Of what was sent; empty where the layout is not known."""
    reports: Mapping[str, Digests] = field(default_factory=dict)
    """By engine, what our loader inside it found there afterwards; only of engines that have answered in full."""


class Outline:
    """What stays the same from sync to sync: names, shapes, buckets, and where ranks hold what.

    Args:
        model: whole, or sharded over workers that all make the same outline.
        plan: what stays the same too.
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
        self.own: list[tuple[Bucket, Tensor]] = []
        """The runs of the worker's own memory, each with a tensor there; together they are one bucket then."""
        self._own_digester: OwnDigester | None = None
        if plan.own and self.layout is not None and not self.layout.experts and self.knows(plan.ranks):
            self._take_own(self.layout, to)
        self._directions: dict[Rank, list[list[bytes]]] = {}
        self._names: dict[Rank, list[str]] = {}
        """What each rank of the directions holds."""
        self._questions: dict[Rank, bytes] = {}
        """What asks each of them for the digests of that."""
        self._answers: dict[str, dict[Rank, Tensor]] = {}
        """By engine, ``[N]`` int64 for each rank: there its loader writes the digests of what it holds."""

    def fresh(self) -> bool:
        """Whether all parameters are still where they were found, wherever their memory has been meanwhile."""
        return in_place(self._whose)

    def fill(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        """The bytes of bucket ``index``, ``[N]`` uint8 for each run, and its tensors there (of own memory none)."""
        if self.own:
            if self.plan.hold and self.plan.device == "cuda":  # who has it mapped does not wait for our stream
                torch.cuda.current_stream().synchronize()
            return [lent(holder) for _, holder in self.own], []
        flat, views = empty_bucket(self.buckets[index], self.plan.device)
        if index in self._parts:
            copy_all(views, self._parts[index])
            return [flat], views
        names = [spec.name for spec in self.buckets[index]]
        sources = [self.tensors[name] for name in names]
        copy_whole(views, sources)
        parameters = [found for name in names if (found := self.tensors.parameter(name)) is not None]
        if len(parameters) == len(names):
            self._parts[index] = sources
            self._whose += zip(sources, parameters, strict=True)
        return [flat], views

    def digester(self, plan: SendPlan) -> Digester | OwnDigester | None:
        """What takes the digests that are wanted; None: none are, or the layout is not known."""
        if plan.digests is None or self.layout is None or not self.knows(plan.ranks):
            return None
        return self._own_digester or Digester(self.layout, plan.ranks, plan.digests)

    def knows(self, ranks: Sequence[Rank]) -> bool:
        """Whether it is known how these ranks hold the model."""
        return self.layout is not None and all(map(self.layout.knows, ranks))

    def directions(self, rank: Rank, index: int) -> list[bytes] | None:
        """Where a rank puts what each run of bucket ``index`` holds; None: that is not known for sure.

        Experts are left to the server: some of its kernels hold them in an order of their own.
        """
        layout = self.layout
        if layout is None or layout.experts or not layout.knows(rank):
            return None
        if rank not in self._directions:
            pieces, totals = layout.pieces({name: spec.shape for name, spec in self._specs.items()}, rank)
            tell = partial(
                directions, pieces=pieces, totals=totals, tied="lm_head.weight" not in self._specs, hold=self.plan.hold
            )
            runs = [[bucket for bucket, _ in self.own]] if self.own else [[bucket] for bucket in self.buckets]
            self._directions[rank] = [list(map(tell, each)) for each in runs]
            self._names[rank], self._questions[rank] = list(totals), question(totals, hold=self.plan.hold)
        return self._directions[rank][index]

    def ask(self, engine: str, rank: Rank) -> tuple[bytes, Tensor]:
        """What asks a rank, which has had ``directions``, for the digests of all it holds, and where it answers."""
        answers = self._answers.setdefault(engine, {})
        if rank not in answers:
            answers[rank] = torch.zeros(len(self._names[rank]), dtype=torch.int64, device=self.plan.device)
            if answers[rank].is_cuda:
                torch.cuda.current_stream().synchronize()
        return self._questions[rank], answers[rank]

    def forget_answers(self) -> None:
        """Those of the last sync, before anybody is told where to write the next."""
        for answers in self._answers.values():
            for answer in answers.values():
                answer.zero_()

    def reports(self) -> dict[str, Digests]:
        """See ``Sent``."""
        if self.plan.digests is None:
            return {}
        found = {}
        for engine, answers in self._answers.items():
            texts = {rank: told(answer.cpu(), self.plan.digests) for rank, answer in answers.items()}
            whole = {rank: each for rank, each in texts.items() if each is not None}
            if len(whole) == len(texts):
                found[engine] = {rank: dict(zip(self._names[rank], each, strict=True)) for rank, each in whole.items()}
        return found

    def _take_own(self, layout: Layout, dtype: torch.dtype) -> None:
        parameters = [self.tensors.parameter(name) for name in self.tensors]
        whole = [parameter for parameter in parameters if parameter is not None]
        if len(whole) < len(parameters):
            return
        parts = dict(zip(self.tensors, map(own_part, whole), strict=True))
        self.own = own_runs(parts)
        if not self.own:
            return
        self.buckets = [tuple(spec for bucket, _ in self.own for spec in bucket)]
        self._whose = list(zip(parts.values(), whole, strict=True))
        if self.plan.digests is not None:
            self._own_digester = OwnDigester(layout, self.plan.ranks, self.plan.digests, parts, dtype)
