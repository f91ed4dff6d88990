"""``WeightUpdates``: new weights for an SGLang server, from tensors, a broadcast or a folder, and their digests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skyrl_train.engines.faults import EngineRefusedError
from skyrl_train.engines.http import ServerClient
from skyrl_train.engines.sglang.calls import Calls, succeeded
from skyrl_train.engines.sglang.facts import ServerFacts
from skyrl_train.errors import EngineError


class WeightUpdates(Calls):
    """Flushing inside an update would end some versions of the server: it is a step of its own."""

    def __init__(self, client: ServerClient, facts: ServerFacts, control_timeout: float) -> None:
        super().__init__(client, facts, control_timeout)
        self.groups: set[str] = set()
        """Process groups that the server has joined through this side."""

    async def begin_update(self) -> None:
        """Opens a weight update where the server wants it opened (0.5.21 and later)."""
        if not self.facts.update_sessions:
            return
        try:
            await self._update("/begin_weight_update", {})
        except EngineRefusedError as error:
            if "already open" not in str(error):
                raise
            await self.end_update()  # one that an earlier attempt left open
            await self._update("/begin_weight_update", {})

    async def end_update(self) -> None:
        if self.facts.update_sessions:
            await self._update("/end_weight_update", {})

    async def update_from_tensors(self, payloads: Sequence[str], load_format: str | None = "flattened_bucket") -> None:
        """Loads one bucket, within ``begin_update`` and ``end_update``.

        Args:
            payloads: base64, one for each tensor-parallel rank (``payloads.py``); each is read once.
        """
        body = {"serialized_named_tensors": list(payloads), "load_format": load_format, "flush_cache": False}
        await self._update("/update_weights_from_tensor", body)

    async def join_group(
        self, address: str, port: int, *, offset: int, world_size: int, name: str, backend: str
    ) -> None:
        """Makes the server's ranks join a group as ``offset``, ``offset`` + 1, ...; returns when they have."""
        self._needs("/init_weights_update_group", "weights by broadcast")
        body = {"master_address": address, "master_port": port, "rank_offset": offset, "world_size": world_size}
        await self._update("/init_weights_update_group", body | {"group_name": name, "backend": backend})
        self.groups.add(name)

    async def leave_group(self, name: str) -> None:
        """Ends the server's side of a group."""
        self.groups.discard(name)
        await self._update("/destroy_weights_update_group", {"group_name": name})

    async def update_from_group(self, name: str, bucket: Sequence[tuple[str, str, Sequence[int]]]) -> None:
        """Receives one bucket of (name, dtype, shape) that rank 0 broadcasts meanwhile, as one run of bytes.

        Raises:
            EngineError: the server never joined that group (it would die of the question), or the transfer failed.
        """
        if name not in self.groups:
            raise EngineError(f"{self.client.url}: Group {name} not in {sorted(self.groups)}: it has not joined it.")
        names, dtypes, shapes = (list(column) for column in zip(*bucket, strict=True))
        body = {"names": names, "dtypes": dtypes, "shapes": [list(shape) for shape in shapes], "group_name": name}
        await self._update(
            "/update_weights_from_distributed", body | {"load_format": "flattened_bucket", "flush_cache": False}
        )

    async def update_from_disk(self, folder: str, load_format: str | None = None) -> None:
        """Loads a model folder that the server can read."""
        body = {"model_path": folder, "load_format": load_format, "flush_cache": False}
        await self._update("/update_weights_from_disk", body)

    async def weights_checksum(self) -> dict[str, Any]:
        """SGLang's digests of the weights in memory: ``per_engine_checksum`` and, by rank, ``ranks``.

        Raises:
            NotSupportedError: the server has no weights checker.
        """
        self._needs("/weights_checker", "a digest of the weights")
        return succeeded(
            self.client.url, "/weights_checker", await self._post("/weights_checker", {"action": "checksum"})
        )
