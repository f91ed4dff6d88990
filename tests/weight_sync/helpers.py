"""A policy, engines and the sync between them, all real, in one ``async with``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from engines.contract import PROMPT, ask, one

from skyrl_train.config.door import load_config
from skyrl_train.engines.pool import EnginePool
from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.engines.sglang.payloads import Spec, bucket_payloads, pack
from skyrl_train.models.gather import own_part
from skyrl_train.roles import PolicyWithSender
from skyrl_train.runtime.local import LocalWorkers
from skyrl_train.weight_sync.engine_sync import EngineSync
from skyrl_train.weight_sync.settings import SyncSettings
from skyrl_train.weight_sync.surroundings import Surroundings

ROWS = (tuple(range(3, 67)), tuple(range(90, 26, -1)))
HERE = Surroundings(launched=True, same_host=True, same_gpu=False, learner_device="cpu")
FAR = replace(HERE, launched=False)


@dataclass(slots=True)
class Syncing:
    """What a test has in its hands."""

    sync: EngineSync
    pool: EnginePool
    engines: dict[str, SGLangEngine]
    policy: PolicyWithSender

    def change_policy(self, amount: float = 0.02) -> None:
        """As a step of learning does."""
        with torch.no_grad():
            for parameter in self.policy.model.parameters():
                if parameter.requires_grad:
                    part = own_part(parameter)
                    part.add_(amount * torch.randn_like(part))

    async def answers_as_the_policy(self, engine: SGLangEngine) -> bool:
        """Whether a sample's log-probs are those of the policy now."""
        answer = await one(engine, ask())
        (scored,) = self.policy.weights_probe([[*PROMPT, *answer.token_ids]], len(PROMPT))
        return max(abs(a - b) for a, b in zip(scored, answer.logprobs, strict=True)) < 1e-4


@contextmanager
def one_unit_off(sync: EngineSync, policy: PolicyWithSender, name: str, place: int) -> Iterator[None]:
    """Inside, one number of one tensor is changed by one unit in the last place, in every server that gets weights."""
    send = sync.shipment._send_buckets

    async def then_spoil(run: Any, part: Any, *plan: Any) -> Any:
        sent = await send(run, part, *plan)
        tensor = policy.model.state_dict()[name].detach().clone()
        tensor.view(-1).view(torch.int32)[place] += 1
        for engine in part.engines.values():
            await _put(engine, name, tensor)
        return sent

    sync.shipment._send_buckets = then_spoil
    try:
        yield
    finally:
        sync.shipment._send_buckets = send


async def _put(engine: SGLangEngine, name: str, tensor: torch.Tensor) -> None:
    """Loads one tensor into a server, past every proof."""
    bucket = (Spec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype),)
    flat, _ = pack(bucket, [tensor], "cpu")
    payloads, alive = bucket_payloads(bucket, flat, engine.facts.tensor_parallel)
    await engine.begin_update()
    await engine.update_from_tensors(payloads)
    await engine.end_update()
    del alive


@asynccontextmanager
async def syncing(
    folder: Path,
    servers: Mapping[str, Callable[[], Any]],
    *,
    around: Surroundings = HERE,
    overrides: tuple[str, ...] = (),
    sync_class: type[EngineSync] = EngineSync,
    **settings: Any,
) -> AsyncIterator[Syncing]:
    """Policy and engines.

    Args:
        folder: the model's.
        servers: by name, what attaches an engine.
        overrides: of the policy's config.
        settings: of ``SyncSettings``.
    """
    config = load_config([f"trainer.policy.model.path={folder}", "trainer.num_threads=1", *overrides])
    workers = await LocalWorkers.start(PolicyWithSender, config, 10)
    engines = {name: await attach() for name, attach in servers.items()}
    pool = EnginePool(engines)
    settings = {"timeout": 60.0, "bucket_bytes": 1 << 16, "folder": str(folder.with_suffix(".sync"))} | settings
    sync = sync_class(
        pool,
        workers,
        SyncSettings(**settings),
        around=dict.fromkeys(engines, around),
        learner_dtype="float32",
        checkpoint_dtype="float32",
        probe_rows=ROWS,
    )
    try:
        yield Syncing(sync, pool, engines, workers._hosts[0]._object)
    finally:
        await sync.close()
        await pool.close()
        await workers.close()


def attach_to(server: Any, *, stock: bool = False, **options: Any) -> Callable[[], Any]:
    """Attaches to a shared server without owning it.

    Args:
        stock: as if our loader were not there.
    """

    async def attach() -> SGLangEngine:
        engine = await SGLangEngine.attach(server.url, key=server.key, control_timeout=60.0, **options)
        if stock:
            engine.facts = replace(engine.facts, loaders=frozenset())
        return engine

    return attach
