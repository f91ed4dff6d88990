"""``WeightSender``: the half of a weight sync that lives where the weights do, in the policy's worker.

    begin ──> pack 0 ──> pack 1 ──> ...                 ──> end          bytes ready, digests kept
                 └ share 0 / broadcast 0 / write 0 ── release 0

A bucket is packed once, whoever gets it: the conversion to the engines' number format, the copy into one run of bytes,
and the digests are the same for all. At most ``AHEAD`` buckets are alive.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skyrl_train.engines.sglang.payloads import Bucket, Spec, adapter_payloads, bucket_payloads, pack, plan_buckets
from skyrl_train.errors import WeightSyncError
from skyrl_train.models.checkpoint_names import CheckpointTensors, checkpoint_tensors
from skyrl_train.models.gather import full_tensor
from skyrl_train.models.lora import adapter_config, adapter_tensors, save_adapter
from skyrl_train.runtime.background import beside
from skyrl_train.runtime.place import host_identity
from skyrl_train.weight_sync.digests import Digester, Kind
from skyrl_train.weight_sync.group import EngineGroup, address_towards
from skyrl_train.weight_sync.layout import Layout, Rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("skyrl.weight_sync")

AHEAD = 2
"""Buckets that are alive at the same time: one is loaded by the engines while the next is packed."""


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


class WeightSender:
    """Packs and sends the weights of one model.

    Args:
        model: whole, or sharded over workers that all call the same methods in the same order.
        device: where the model is.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self.device = model, device
        self._plan: SendPlan | None = None
        self._now: CheckpointTensors | None = None
        self._buckets: list[Bucket] = []
        self._packed: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._alive: dict[int, list[Tensor]] = {}
        self._digester: Digester | None = None
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
        self._plan, self._now = plan, checkpoint_tensors(self.model, merged=plan.merged)
        dtype: torch.dtype = getattr(torch, plan.dtype)
        specs = [
            Spec(name=name, shape=held.shape, dtype=dtype if held.dtype.is_floating_point else held.dtype)
            for name, held in ((name, self._now.spec(name)) for name in self._now)
        ]
        self._buckets = plan_buckets(specs, plan.limit)
        layout = Layout.of(self.model.config, self._now) if plan.digests else None
        if layout is not None and plan.digests is not None and all(map(layout.knows, plan.ranks)):
            self._digester = Digester(layout, plan.ranks, plan.digests)
        return self._buckets

    def pack(self, index: int) -> None:
        """Makes bucket ``index`` ready to be sent. Every worker of the policy does this together.

        Raises:
            WeightSyncError: buckets were not released.
        """
        assert self._plan is not None and self._now is not None, "begin comes before pack"
        if len(self._packed) >= AHEAD:
            raise WeightSyncError(f"weight sync failed in phase pack: {len(self._packed)} buckets were not released.")
        bucket = self._buckets[index]
        flat, views = pack(bucket, [full_tensor(self._now[spec.name]) for spec in bucket], self._plan.device)
        if self._digester is not None:
            self._digester.add(zip((spec.name for spec in bucket), views, strict=True))
        self._packed[index] = flat, views

    def share(self, index: int, ranks: int, readers: int) -> list[str]:
        """Handles of bucket ``index`` for processes on this host: ``ranks`` messages, each for ``readers`` readers."""
        payloads, copies = bucket_payloads(self._buckets[index], self._packed[index][0], ranks, readers)
        self._alive.setdefault(index, []).extend(copies)
        return payloads

    def write(self, index: int, folder: str) -> None:
        """Writes bucket ``index`` as one file of a model folder."""
        from safetensors.torch import save_file

        named = zip(self._buckets[index], self._packed[index][1], strict=True)
        count = len(self._buckets)
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

    def end(self) -> dict[Rank, dict[str, str]]:
        """Frees everything; the digests of what was packed, by rank. Empty where the layout is not known."""
        found = self._digester.result() if self._digester is not None else {}
        self._plan, self._digester, self._now, self._buckets = None, None, None, []
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
        """Writes the adapter as a PEFT folder."""
        save_adapter(self.model, str(self.model.name_or_path), Path(folder))

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
        await beside("weight-sync", self._groups[name].broadcast, self._packed[index][0])

    async def close_group(self, name: str) -> None:
        """Ends a group; a broadcast that waits in it raises."""
        group = self._groups.pop(name, None)
        if group is not None:
            group.give_up()
            await beside("weight-sync", group.close)
