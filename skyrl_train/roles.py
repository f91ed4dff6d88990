"""What a process can host when the policy and the engine are one: the only place where both wings meet."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from skyrl_train.batch import collate
from skyrl_train.engines.base import Completion, Engine, Request
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.engines.sglang.payloads import Bucket
from skyrl_train.learner.policy_worker import PolicyWorker
from skyrl_train.models.arenas import into_arenas
from skyrl_train.models.loading import load_tokenizer
from skyrl_train.models.lora import adapter_off
from skyrl_train.models.mirror import Mirror
from skyrl_train.models.scoring import score
from skyrl_train.models.streamed import Streamed
from skyrl_train.runtime.base import Workers
from skyrl_train.runtime.place import Place
from skyrl_train.types import Prompt, Trajectory
from skyrl_train.weight_sync.layout import Rank
from skyrl_train.weight_sync.outline import SendPlan, Sent
from skyrl_train.weight_sync.sender import WeightSender

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config


class PolicyWithEngine(PolicyWorker):
    """The policy and an embedded engine on its parameters, in one process, on one compute thread.

    A policy of several workers is sharded. Then each has an engine on a whole copy of the model, which takes the new
    weights when they are committed, and serves its share of the prompts.
    """

    def __init__(self, config: Config, total_updates: int, executor: Executor, place: Place) -> None:
        self.mirror: Mirror | None = None
        self.executor = executor
        super().__init__(config, total_updates, place, plain=place.size == 1)
        self.engine = EmbeddedEngine(
            self.mirror.model if self.mirror else self.model,  # pyright: ignore[reportArgumentType] - a copy of it
            tokenizer=load_tokenizer(config.trainer.policy.model.path),
            executor=executor,
            max_num_seqs=config.generator.max_num_seqs,
            deterministic=config.generator.deterministic,
            autocast_dtype=self.autocast_dtype,
            request_timeout=config.generator.request_timeout,
        )

    def _assemble(self) -> torch.nn.Module:
        module = super()._assemble()
        if self.ranks.size > 1:
            self.mirror = Mirror(self.model, self.device)
        return module

    async def generate(self, request: Request) -> list[Completion]:
        return await self.engine.generate(request)

    async def abort(self, request_ids: Sequence[str] | None) -> None:
        await self.engine.abort(request_ids)

    async def commit_weights(self, version: int) -> None:
        if self.mirror is not None:
            follow = partial(self.mirror.follow, self.model)
            await asyncio.get_running_loop().run_in_executor(self.executor, follow)
        await self.engine.commit_weights(version)

    async def open_sessions(self, sessions: Sequence[str]) -> None:
        await self.engine.open_sessions(sessions)

    async def close_sessions(self, sessions: Sequence[str]) -> None:
        await self.engine.close_sessions(sessions)

    async def close(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - the host awaits it
        await self.engine.close()
        super().close()


class PolicyWithSender(PolicyWorker):
    """The policy, and what sends its weights to engines that are servers."""

    def __init__(self, config: Config, total_updates: int, place: Place | None = None) -> None:
        self.streamed: Streamed | None = None
        super().__init__(config, total_updates, place)
        if self.streamed is not None:
            into_arenas(self.module)
        self.sender = WeightSender(self.model, self.device)

    def _assemble(self) -> torch.nn.Module:
        module = super()._assemble()
        if self.sharded and self.ranks.size == 1 and not self.section.fsdp_config.cpu_offload:
            graphs = self.device.type == "cuda" and self.config.generator.weight_probe_graphs
            self.streamed = Streamed(self.model, self.device, self.autocast_dtype, graphs=graphs)
        return module

    def weights_describe(self) -> dict[str, Any]:
        return self.sender.describe()

    def weights_begin(self, plan: SendPlan) -> list[Bucket]:
        return self.sender.begin(plan)

    def weights_pack(self, index: int) -> None:
        self.sender.pack(index)

    async def weights_hash(self, index: int) -> None:
        await self.sender.hash(index)

    def weights_share(
        self, index: int, engine: str, ranks: Sequence[Rank], readers: int, directed: bool
    ) -> tuple[list[str], str]:
        return self.sender.share(index, engine, ranks, readers, directed=directed)

    async def weights_broadcast(self, index: int, group: str) -> None:
        await self.sender.broadcast(index, group)

    def weights_write_config(self, folder: str) -> None:
        self.sender.write_config(folder)

    def weights_write(self, index: int, folder: str) -> None:
        self.sender.write(index, folder)

    def weights_release(self, index: int) -> None:
        self.sender.release(index)

    def weights_end(self) -> Sent:
        return self.sender.end()

    def adapter_begin(self) -> dict[str, Any]:
        return self.sender.adapter_begin()

    def adapter_share(self, ranks: int) -> list[str]:
        return self.sender.adapter_share(ranks)

    def adapter_write(self, folder: str) -> None:
        self.sender.adapter_write(folder)

    def adapter_end(self) -> None:
        self.sender.adapter_end()

    def weights_open_group(
        self, own: str, name: str, backend: str, world_size: int, timeout: float, towards: str
    ) -> tuple[str, int]:
        return self.sender.open_group(own, name, backend, world_size, timeout, towards)

    async def weights_join_group(self, own: str) -> None:
        await self.sender.join_group(own)

    async def weights_close_group(self, own: str) -> None:
        await self.sender.close_group(own)

    @torch.no_grad()
    def weights_probe(self, rows: Sequence[Sequence[int]], start: int, base: bool = False) -> list[list[float]]:
        """Log-probs of each row from ``start`` on, at temperature 1: what an engine's are compared with.

        Args:
            base: of the model without its adapter.
        """
        batch = collate([_split_row(row, start) for row in rows], pad_token_id=0).to(self.device)
        asked = (tuple(map(tuple, rows)), start, base)
        body = nullcontext(self.model) if self.streamed is None else self.streamed.of(self.model, asked)
        with self.precision(), body as model, adapter_off(model) if base else nullcontext():
            values, _ = score(model, batch, temperature=1.0, packed=self.packed, with_entropy=False, split=self.split)
        return values.float().tolist()


def _split_row(row: Sequence[int], start: int) -> Trajectory:
    prompt = Prompt(uid="probe", messages=(), env_class="probe")
    trajectory = Trajectory(prompt=prompt, sample=0, prompt_ids=list(row[:start]))
    ids = list(row[start:])
    trajectory.append_sampled(ids, [0.0] * len(ids), "stop", 0)
    return trajectory


class HostedEngine(Engine):
    """The embedded engine as the generator sees it, wherever its workers live.

    With several workers, the samples of a prompt go to one of them, chosen by the prompt's name alone.
    """

    capabilities = EmbeddedEngine.capabilities

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    async def generate(self, request: Request) -> list[Completion]:
        return await self.workers.one(self._rank(request.session or request.id), "generate", request)

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        await self.workers.all("abort", request_ids)

    async def commit_weights(self, version: int) -> None:
        await self.workers.all("commit_weights", version)

    async def open_sessions(self, sessions: Sequence[str]) -> None:
        await self._each("open_sessions", sessions)

    async def close_sessions(self, sessions: Sequence[str]) -> None:
        await self._each("close_sessions", sessions)

    async def _each(self, method: str, sessions: Sequence[str]) -> None:
        shares: list[list[str]] = [[] for _ in range(self.workers.size)]
        for session in sessions:
            shares[self._rank(session)].append(session)
        await self.workers.each(method, [(share,) for share in shares])

    def _rank(self, session: str) -> int:
        """A session's name ends in the number of the sample."""
        return zlib.crc32(session.rpartition("/")[0].encode()) % self.workers.size
