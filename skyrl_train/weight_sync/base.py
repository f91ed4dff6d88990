"""Weight sync: a transaction that ends with every engine on the step's version, or with an error naming the phase."""

from __future__ import annotations

from abc import ABC, abstractmethod


class WeightSync(ABC):
    """Brings the policy's weights to the engines."""

    @abstractmethod
    async def sync(self, version: int) -> dict[str, float]:
        """After this, every engine samples from the policy's current weights and reports ``version``.

        Returns:
            Metrics of the transaction.

        Raises:
            WeightSyncError: names the phase and the engine.
        """

    @property
    def wanted(self) -> bool:
        """Whether an engine waits for the next sync."""
        return False

    async def wake(self, version: int) -> None:  # noqa: B027 - optional
        """Engines that sleep go on with the weights that they have; the policy's own are at ``version``."""

    async def enter_training(self) -> None:  # noqa: B027 - optional
        """The policy's weights are about to change."""

    async def close(self) -> None:  # noqa: B027 - optional
        """Ends what the syncs have opened."""
