"""``WeightSender``: the half of a weight sync that lives where the weights do, in the policy's worker.

    begin ──> pack 0 ──> hash 0 ──> pack 1 ──> ...        ──> end        bytes ready, digests kept
                 └ share 0 / broadcast 0 / write 0 ── release 0

A bucket is packed once, whoever gets it: the conversion to the engines' number format, the copy into one run of bytes,
and the digests are the same for all. At most ``AHEAD`` buckets are alive. Where engines can read the worker's own
memory nothing is packed (``outline.py``).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skyrl_train.engines.sglang.payloads import (
    LOADER,
    Bucket,
    Counter,
    adapter_payloads,
    bucket_payloads,
    directed_payloads,
    give_up,
)
from skyrl_train.errors import WeightSyncError
from skyrl_train.models.gather import full_tensor
from skyrl_train.models.lora import adapter_config, adapter_tensors, write_adapter
from skyrl_train.runtime.background import beside
from skyrl_train.runtime.place import host_identity
from skyrl_train.weight_sync.digests import Digester, OwnDigester
from skyrl_train.weight_sync.group import EngineGroup, address_towards
from skyrl_train.weight_sync.layout import Rank
from skyrl_train.weight_sync.outline import Outline, SendPlan, Sent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("skyrl.weight_sync")

AHEAD = 2
"""Buckets that are alive at the same time: one is loaded by the engines while the next is packed."""


class WeightSender:
    """Packs and sends the weights of one model.

    Args:
        model: whole, or sharded over workers that all call the same methods in the same order.
        device: where the model is.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self.device = model, device
        self._plan: SendPlan | None = None
        self._outlines: dict[SendPlan, Outline] = {}
        self._now: Outline | None = None
        self._packed: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._alive: dict[int, list[Tensor]] = {}
        self._counters: list[Counter] = []
        self._digester: Digester | OwnDigester | None = None
        self._groups: dict[str, EngineGroup] = {}
        self._adapter: dict[str, Tensor] = {}
        self._adapter_copies: list[dict[str, Tensor]] = []

    def describe(self) -> dict[str, Any]:
        """Facts that decide how engines can be reached."""
        uuid = str(torch.cuda.get_device_properties(self.device).uuid) if self.device.type == "cuda" else None
        return {"host": host_identity(), "device": self.device.type, "gpu": uuid}

    def begin(self, plan: SendPlan) -> list[Bucket]:
        """Takes the weights as they are now; nothing is copied yet. Returns what each bucket will hold."""
        self.end()
        if unread := give_up(self._counters):  # of the last sync, whose engines have read or are gone by now
            log.warning("%d messages of the last weight sync were never read; their memory is taken back", unread)
            torch.cuda.ipc_collect()
        self._counters = []
        if plan not in self._outlines or not self._outlines[plan].fresh():
            self._outlines[plan] = Outline(self.model, plan)
        self._plan, self._now = plan, self._outlines[plan]
        self._digester = self._now.digester(plan)
        self._now.forget_answers()
        return self._now.buckets

    def pack(self, index: int) -> None:
        """Makes bucket ``index`` ready to be sent. Every worker of the policy does this together.

        Raises:
            WeightSyncError: buckets were not released.
        """
        assert self._plan is not None and self._now is not None, "begin comes before pack"
        if len(self._packed) >= AHEAD:
            raise WeightSyncError(f"weight sync failed in phase pack: {len(self._packed)} buckets were not released.")
        with torch.no_grad():
            self._packed[index] = self._now.fill(index)

    async def hash(self, index: int) -> None:
        """Takes the digests of bucket ``index``, once, in the order of the buckets; on a thread of its own."""
        await beside("weight-digests", self._hash, index)

    @torch.no_grad()
    def _hash(self, index: int) -> None:
        if self._digester is not None and self._now is not None:
            names = [spec.name for spec in self._now.buckets[index]]
            self._digester.add(zip(names, self._packed[index][1], strict=False))  # there are none of own memory

    def share(
        self, index: int, engine: str, ranks: Sequence[Rank], readers: int, *, directed: bool
    ) -> tuple[list[str], str]:
        """Handles of bucket ``index`` for processes on this host; with the last, where they tell what they hold then.

        Args:
            engine: its name, for ``end``.
            ranks: a message for each.
            readers: how many processes read each message.
            directed: the server has our loader, which is used where it is known how the ranks hold the model.

        Returns:
            The messages, and the ``load_format`` for them.
        """
        assert self._now is not None, "begin comes before share"
        flats, bucket = self._packed[index][0], self._now.buckets[index]
        texts = [self._now.directions(rank, index) for rank in ranks] if directed and readers == 1 else [None]
        known = [text for text in texts if text is not None]
        if len(known) == len(ranks):
            # What is held is read, but not told to be: its counters say nothing.
            counters = None if self._now.own and self._now.plan.hold else self._counters
            last = index == len(self._now.buckets) - 1 and self._digester is not None
            questions = [self._now.ask(engine, rank) for rank in ranks] if last else []
            payloads, copies = directed_payloads(known, flats, counters, questions)
        else:
            payloads, copies = bucket_payloads(bucket, flats[0], len(ranks), readers, self._counters)
        self._alive.setdefault(index, []).extend(copies)
        return payloads, LOADER if len(known) == len(ranks) else "flattened_bucket"

    def write(self, index: int, folder: str) -> None:
        """Writes bucket ``index`` as one file of a model folder."""
        from safetensors.torch import save_file

        assert self._now is not None, "begin comes before write"
        named = zip(self._now.buckets[index], self._packed[index][1], strict=True)
        count = len(self._now.buckets)
        file = Path(folder) / f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        save_file({spec.name: view.cpu() for spec, view in named}, file, metadata={"format": "pt"})

    def write_config(self, folder: str) -> None:
        """Makes an empty model folder with the model's config."""
        path = Path(folder)
        try:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            self.model.config.save_pretrained(path)
        except OSError as error:
            raise WeightSyncError(
                f"weight sync failed in phase write: {path}: {error}. Set generator.weight_sync_path to a folder that "
                "both the learner and the engines can reach."
            ) from error

    def release(self, index: int) -> None:
        """Frees bucket ``index``: every engine has answered."""
        self._packed.pop(index, None)
        self._alive.pop(index, None)

    def end(self) -> Sent:
        """Frees everything, when all engines have answered; what is known of the weights."""
        found = Sent()
        if self._now is not None and self._digester is not None:
            found = Sent(digests=self._digester.result(), reports=self._now.reports())
        if self._now is not None:
            self._now.tensors.release()
        self._plan, self._digester, self._now = None, None, None
        self._packed.clear()
        self._alive.clear()
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()
        return found

    # The adapter.

    def adapter_begin(self) -> dict[str, Any]:
        """Takes the adapter as it is now; every worker does this together. Returns its PEFT config."""
        self._adapter = {
            name: full_tensor(tensor).float().cpu() for name, tensor in adapter_tensors(self.model).items()
        }
        return adapter_config(self.model, str(self.model.name_or_path))

    def adapter_share(self, ranks: int) -> list[str]:
        """Handles of the adapter for ``ranks`` processes on this host."""
        payloads, copies = adapter_payloads(self._adapter, ranks)
        self._adapter_copies += copies
        return payloads

    def adapter_write(self, folder: str) -> None:
        """Writes what ``adapter_begin`` took as a PEFT folder. One worker does it, and needs no other."""
        write_adapter(self._adapter, adapter_config(self.model, str(self.model.name_or_path)), Path(folder))

    def adapter_end(self) -> None:
        """Frees what ``adapter_begin`` took."""
        self._adapter, self._adapter_copies = {}, []

    # Groups, for broadcasts: one for each engine.

    def open_group(
        self, own: str, name: str, backend: str, world_size: int, timeout: float, towards: str
    ) -> tuple[str, int]:
        """Makes a store that the engine at the host ``towards`` can reach: (address, port).

        Args:
            own: what the group is called here; ``name`` is what the engine calls it.
        """
        address = address_towards(towards, 9)
        group = self._groups[own] = EngineGroup(name, backend, world_size, timeout)
        return address, group.open(address)

    async def join_group(self, name: str) -> None:
        await beside("weight-sync", self._groups[name].join)

    async def broadcast(self, index: int, name: str) -> None:
        """Sends bucket ``index`` to the engine of a group, on a thread of its own. Errors as ``EngineGroup``'s."""
        await beside("weight-sync", self._groups[name].broadcast, self._packed[index][0][0])

    async def close_group(self, name: str) -> None:
        """Ends a group; a broadcast that waits in it raises."""
        group = self._groups.pop(name, None)
        if group is not None:
            group.give_up()
            await beside("weight-sync", group.close)
