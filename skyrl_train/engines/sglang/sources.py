"""Where engines come from: servers that we start, servers that run somewhere. Either can be had again after a fault."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skyrl_train.config.environ import read_environment
from skyrl_train.engines.http import normalize_url
from skyrl_train.engines.sglang.causes import advice, how_it_ended, last_error
from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.engines.sglang.launch import SGLangServer
from skyrl_train.engines.sglang.node import look_at_nodes
from skyrl_train.engines.sglang.options import server_arguments
from skyrl_train.errors import EngineError, EngineTimeoutError

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from skyrl_train.config.schema import Config
    from skyrl_train.runtime.plan import Seat
    from skyrl_train.runtime.site import Site

log = logging.getLogger("skyrl.engines")

INTERVAL = 1.0
"""Seconds between two attempts to attach to a server that does not answer."""


class Source(Protocol):
    """One engine, now and again."""

    name: str
    launched: bool
    host: str | None
    """Identity of the host where we start it; None: somebody else does."""
    gpus: tuple[str, ...]
    """UUIDs of its GPUs, if we start it."""

    async def start(self) -> SGLangEngine:
        """The engine, ready to be given weights. What there was of it before is ended.

        Raises:
            EngineError: it does not come up.
        """
        ...

    def died(self) -> str | None:
        """Why its process ended, if it is ours and has ended."""
        ...

    async def stop(self) -> None:
        """Ends the server if it is ours."""
        ...


class Launched:
    """A server that is started, and started again, by us.

    Args:
        host: identity of the host where it runs (``host_identity``).
        gpus: UUIDs of its GPUs.
    """

    launched = True

    def __init__(
        self,
        name: str,
        make: Callable[[], SGLangServer],
        options: Mapping[str, Any],
        *,
        host: str,
        gpus: tuple[str, ...] = (),
    ) -> None:
        self.name, self._make, self._options = name, make, dict(options)
        self.host: str | None = host
        self.gpus = gpus
        self._server: SGLangServer | None = None

    async def start(self) -> SGLangEngine:
        await self.stop()
        server = self._server = self._make()
        engine = await server.attach(**self._options)
        log.info("%s serves at %s (log: %s)", self.name, engine.url, server.log)
        return engine

    def died(self) -> str | None:
        process = self._server.process if self._server is not None else None
        if process is None or process.returncode is None:
            return None
        tail = process.log_tail()
        remedy = advice(tail)
        told = f"its process ended with {how_it_ended(process.returncode)}; "
        told += f"last error in {process.log}: {last_error(tail)}"
        return f"{told} -- {remedy}" if remedy else told

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.close()


class Attached:
    """A server that somebody else runs."""

    launched = False
    host: str | None = None
    gpus: tuple[str, ...] = ()

    def __init__(self, url: str, options: Mapping[str, Any], *, key: str | None, patience: float) -> None:
        self.name = normalize_url(url)
        self._key, self._options, self._patience = key, dict(options), patience

    async def start(self) -> SGLangEngine:
        until = time.monotonic() + self._patience
        while True:
            try:
                return await SGLangEngine.attach(self.name, key=self._key, **self._options)
            except EngineError as error:
                if time.monotonic() > until or "no SGLang server" in str(error) or "wants a key" in str(error):
                    raise EngineTimeoutError(
                        f"cannot attach to {self.name} within {self._patience:g} s: {error}"
                    ) from error
            await asyncio.sleep(INTERVAL)

    def died(self) -> str | None:
        return None

    async def stop(self) -> None:
        return None


async def sources(config: Config, site: Site, folder: Path, stack: AsyncExitStack) -> list[Source]:
    """The engines of a run, not yet started. Copies of the model (data parallelism) are engines of their own.

    Args:
        site: whose plan says where each is started.
        folder: the run folder; on another node, that node's disk.
        stack: when it is left, what starts engines on other nodes is ended.

    Raises:
        ConfigError, MissingPackageError: they could not be started.
        WorkerError: a node does not answer.
    """
    generator = config.generator
    options: dict[str, Any] = {
        "request_timeout": generator.request_timeout,
        "control_timeout": generator.weight_sync_timeout,
    }
    if not generator.run_engines_locally:
        key = read_environment().sglang_admin_key
        patience = generator.engine_start_timeout
        urls = dict.fromkeys(map(normalize_url, generator.remote_inference_engine_urls))
        return [Attached(url, options, key=key, patience=patience) for url in urls]
    grounds = await look_at_nodes(config, site, folder, stack)
    variables = read_environment()

    def launched(index: int, seat: Seat) -> Launched:
        ground, first = grounds[seat.node], seat.slots[0] if site.plan.on_gpu else 0

        def make() -> SGLangServer:
            return SGLangServer(
                server_arguments(config, index, around=ground.around, first_gpu=first, variables=variables),
                log=folder / "logs" / f"engine-{index}.log",
                python=generator.engine_python,
                env=ground.variables,
                start_timeout=generator.engine_start_timeout,
                node=ground.servers,
            )

        gpus = tuple(ground.facts.gpus[slot] for slot in seat.slots if slot < len(ground.facts.gpus))
        return Launched(f"engine-{index}", make, options, host=ground.facts.host, gpus=gpus)

    return [launched(index, seat) for index, seat in enumerate(site.plan.engines)]


async def start_all(of: list[Source]) -> dict[str, SGLangEngine]:
    """Starts every engine, all at once. If one fails, all are ended.

    Raises:
        EngineError: one did not come up; names it.
    """
    results = await asyncio.gather(*(source.start() for source in of), return_exceptions=True)
    engines = {s.name: r for s, r in zip(of, results, strict=True) if isinstance(r, SGLangEngine)}
    errors = [r for r in results if isinstance(r, BaseException)]
    if errors:
        for engine in engines.values():
            await engine.close()
        for source in of:
            await source.stop()
        raise errors[0]
    return engines
