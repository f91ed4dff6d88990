"""A policy, engines that sample from it, and the weight sync between them: one way for each kind of backend."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_train.config.backend import resolve_backend
from skyrl_train.config.environ import read_environment
from skyrl_train.engines.base import Engine
from skyrl_train.engines.pool import EnginePool
from skyrl_train.errors import NotSupportedError
from skyrl_train.learner.policy import Policy
from skyrl_train.learner.residents import Residents
from skyrl_train.runtime.site import Site
from skyrl_train.weight_sync.base import WeightSync
from skyrl_train.weight_sync.direct import DirectSync

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config
    from skyrl_train.engines.sglang.engine import SGLangEngine

log = logging.getLogger("skyrl.build")

PROBE_TOKENS = 256
"""Length of a probe's rows; the engines' prefix caches work in pages of up to 128 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A policy and what samples from it."""

    policy: Policy
    engine: Engine
    weight_sync: WeightSync
    facts: dict[str, Any]
    """What the policy's first worker says of its model."""
    residents: Residents | None = None
    """The models that make room for engines on their GPUs."""


async def start_sampling(
    config: Config, site: Site, updates: int, folder: Path, prompts: Sequence[Sequence[int]], stack: AsyncExitStack
) -> Sampled:
    """Starts the policy, then the engines; what needs ending is ended when ``stack`` is left.

    Args:
        site: where they go.
        updates: optimizer steps of the whole run.
        folder: the run folder.
        prompts: token ids of a few prompts, for the probe.

    Raises:
        SkyRLError: a model that does not load, an engine that does not start, what an engine cannot do.
    """
    if resolve_backend(config) == "embedded":
        return await _embedded(config, site, updates, folder, stack)
    return await _servers(config, site, updates, folder, prompts, stack)


async def _embedded(config: Config, site: Site, updates: int, folder: Path, stack: AsyncExitStack) -> Sampled:
    from skyrl_train.roles import HostedEngine, PolicyWithEngine

    workers = await site.workers("policy", PolicyWithEngine, config, updates, folder=folder)
    stack.push_async_callback(workers.close)
    engine = HostedEngine(workers)
    return Sampled(
        policy=Policy(workers, parts=config.trainer.policy.sequence_parallel_size),
        engine=engine,
        weight_sync=DirectSync(engine, config.generator.weight_sync_timeout),
        facts=(await workers.all("describe"))[0],
    )


async def _servers(
    config: Config, site: Site, updates: int, folder: Path, prompts: Sequence[Sequence[int]], stack: AsyncExitStack
) -> Sampled:
    from skyrl_train.engines.sglang.sources import sources, start_all
    from skyrl_train.learner.model_worker import collective_timeout
    from skyrl_train.roles import PolicyWithSender
    from skyrl_train.weight_sync.engine_sync import EngineSync
    from skyrl_train.weight_sync.group import agree_with_servers
    from skyrl_train.weight_sync.proof import make_rows
    from skyrl_train.weight_sync.recovery import Recovery
    from skyrl_train.weight_sync.surroundings import Surroundings

    generator = config.generator
    agree_with_servers()
    origins = await sources(config, site, folder, stack)  # what cannot be started is told before a model is loaded
    workers = await site.workers("policy", PolicyWithSender, config, updates, folder=folder)
    stack.push_async_callback(workers.close)
    facts = (await workers.all("describe"))[0]
    policy = Policy(workers, parts=config.trainer.policy.sequence_parallel_size)
    colocated = generator.run_engines_locally and config.trainer.placement.colocate_all
    shared = colocated and facts["device"].startswith("cuda")
    residents = Residents(policy, collective_timeout(config)) if shared else None
    if residents:
        await residents.nobody()  # an engine takes its share of what it finds free
    for origin in origins:
        stack.push_async_callback(origin.stop)
    engines = await start_all(origins)
    _check(config, engines)
    pool = EnginePool(
        engines,
        max_in_flight=2 * generator.max_num_seqs,  # one lot runs, the next is at hand
        patience=generator.engine_start_timeout + generator.weight_sync_timeout,
    )
    stack.push_async_callback(pool.close)
    senders = await workers.all("weights_describe")
    sleeps = colocated and all(engine.facts.memory_saver for engine in engines.values())
    room = min((engine.facts.context_length or PROBE_TOKENS + 2) - 2 for engine in engines.values())
    inner = EngineSync(
        pool,
        workers,
        _settings(config, folder, sleeps),
        around={origin.name: Surroundings.of(origin.host, origin.gpus, senders) for origin in origins},
        learner_dtype=facts["dtype"],
        checkpoint_dtype=facts["checkpoint_dtype"],
        probe_rows=make_rows(prompts, length=min(PROBE_TOKENS, room)),
        residents=residents if sleeps else None,
    )
    recovery = Recovery(
        pool,
        inner,
        origins,
        attempts=generator.engine_restarts,
        health_interval=generator.engine_health_interval,
        health_timeout=generator.engine_health_timeout,
        share_memory=sleeps,
    )
    recovery.start()
    stack.push_async_callback(recovery.close)
    if residents:  # the reference and the critic are loaded next
        await (recovery.enter_training() if sleeps else residents.everybody())
    return Sampled(
        policy=policy, engine=pool, weight_sync=recovery, facts=facts, residents=residents if sleeps else None
    )


def _check(config: Config, engines: dict[str, SGLangEngine]) -> None:
    """Refuses what the config asks of the engines and one of them cannot do.

    Raises:
        NotSupportedError: names the engine, and what to change.
    """
    for engine in engines.values():
        if config.generator.enable_lora and not engine.facts.lora:
            raise NotSupportedError(
                "generator.enable_lora", True, f"{engine.url} was started without LoRA.",
                "Start it with --enable-lora --max-lora-rank N --lora-target-modules all, or set it to false.",
            )  # fmt: skip
        wanted = config.generator.weight_sync_pause_mode
        if wanted not in engine.facts.pause_modes:
            raise NotSupportedError(
                "generator.weight_sync_pause_mode", wanted,
                f"{engine.url} runs SGLang {engine.facts.version}, which cannot be paused.", "Use SGLang 0.5.17.",
            )  # fmt: skip


def _name(folder: Path) -> str:
    return f"{folder.name}-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:8]}"


def _settings(config: Config, folder: Path, sleeps: bool) -> Any:
    from skyrl_train.weight_sync.settings import SyncSettings

    generator, lora = config.generator, config.trainer.policy.model.lora
    return SyncSettings(
        backend=generator.weight_sync_backend,
        timeout=max(generator.weight_sync_timeout, read_environment().nccl_timeout or 0.0),
        bucket_bytes=int(generator.weight_transfer_threshold_cuda_ipc_GB * (1 << 30)),
        pause_mode=generator.weight_sync_pause_mode,  # pyright: ignore[reportArgumentType] - a choice of the config
        proof=generator.weight_proof,
        on_proof_failure=generator.weight_proof_failure,
        folder=str(Path(generator.weight_sync_path or folder / "weights").expanduser().absolute()),
        override_group=generator.override_existing_update_group,
        probe_tolerance=generator.weight_probe_tolerance,
        sleep=sleeps,
        sleep_level=1 if config.trainer.weight_sync_interval > 1 else 2,
        adapters=generator.enable_lora and lora.rank > 0,
        # A folder of this run's: the default is the same for every run on the machine.
        adapter_folder=str(Path(lora.lora_sync_path).expanduser().absolute() / _name(folder)),
    )
