"""The two doors of the loop: what must be true before generating, and before training.

Nothing else wakes an engine or syncs weights, so a wake without a sync cannot be written.
"""

from __future__ import annotations

from skyrl_train.tracking.tracker import Tracker
from skyrl_train.weight_sync.base import WeightSync


class Doors:
    """Knows which version of the policy the engines hold.

    Args:
        weight_sync: brings weights to the engines.
        tracker: times the sync.
        version: of the policy as it stands: the steps it has learned from.
        interval: steps between two syncs (``trainer.weight_sync_interval``).
    """

    def __init__(self, weight_sync: WeightSync, tracker: Tracker, version: int, interval: int = 1) -> None:
        self.weight_sync, self.tracker = weight_sync, tracker
        self.version, self.interval = version, interval
        self._synced: int | None = None

    @property
    def staleness(self) -> int:
        """Steps that the policy is ahead of what the engines sample from."""
        return 0 if self._synced is None else self.version - self._synced

    async def enter_generation(self) -> dict[str, float]:
        """Engines awake, and proven to be on the policy's version, or fewer than ``interval`` steps behind it.

        An engine that came back meanwhile is not left waiting for the next sync that is due: all get the weights now.
        """
        if self._synced == self.version:
            return {}
        if self._synced is not None and self.staleness < self.interval and not self.weight_sync.wanted:
            await self.weight_sync.wake(self.version)
            return {"weight_sync/version": float(self._synced)}
        with self.tracker.phase("weight_sync"):
            metrics = await self.weight_sync.sync(self.version)
        self._synced = self.version
        return metrics

    async def enter_training(self) -> None:
        """Engines asleep where they share the learner's memory, and none brought up meanwhile."""
        with self.tracker.phase("sleep"):
            await self.weight_sync.enter_training()

    def learned(self) -> None:
        """The policy has taken a step: engines are behind until ``enter_generation``."""
        self.version += 1
