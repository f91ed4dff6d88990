"""The transport for an engine that samples from the learner's own parameters: nothing to send, only to commit."""

from __future__ import annotations

import asyncio

from skyrl_train.engines.base import Engine
from skyrl_train.errors import EngineError, WeightSyncError
from skyrl_train.weight_sync.base import WeightSync


class DirectSync(WeightSync):
    """Drops what the engine computed with the old weights and moves its version.

    Args:
        engine: shares the policy's parameters.
        timeout: seconds (``generator.weight_sync_timeout``).
    """

    def __init__(self, engine: Engine, timeout: float) -> None:
        self.engine, self.timeout = engine, timeout

    async def sync(self, version: int) -> dict[str, float]:
        name = self.engine.capabilities.name
        try:
            async with asyncio.timeout(self.timeout):
                await self.engine.commit_weights(version)
        except EngineError as error:  # one kind of it is a TimeoutError too: the engine's own deadline
            raise WeightSyncError(
                f"weight sync failed in phase commit, {name} engine, version {version}: {error}"
            ) from error
        except TimeoutError as error:
            raise WeightSyncError(
                f"Weight sync timed out: the {name} engine did not commit version {version} within "
                f"generator.weight_sync_timeout={self.timeout} s"
            ) from error
        return {"weight_sync/version": float(version)}
