"""Who of the learner's models is on GPUs that engines use too.

generating      nobody        the engines have weights and KV cache
weight sync     the policy    without its optimizer; the engines have weights, no cache
training        everybody     the engines sleep; an optimizer comes for its updates
"""

from __future__ import annotations

import asyncio
import time

from skyrl_train.errors import WorkerError
from skyrl_train.learner.policy import Handle
from skyrl_train.runtime.deadline import within


class Residents:
    """Moves models between the GPUs and the host.

    Args:
        policy: it is needed for a weight sync.
        timeout: seconds for one move (``trainer.collective_timeout``).
    """

    def __init__(self, policy: Handle, timeout: float) -> None:
        self.policy, self.others, self._timeout = policy, list[Handle](), timeout
        self._seconds: dict[str, float] = {}
        self._bytes: dict[str, float] = {}

    def add(self, model: Handle) -> None:
        """One more model on these GPUs."""
        self.others.append(model)

    async def nobody(self) -> None:
        """The GPUs are the engines'."""
        await self._call("offload", "offload", [self.policy, *self.others])

    async def policy_only(self) -> None:
        """What a weight sync needs."""
        await self._call("offload", "offload", self.others)
        await self._call("offload", "make_room", [self.policy])
        await self._call("onload", "onload", [self.policy])

    async def everybody(self) -> None:
        """The GPUs are the learner's."""
        await self._call("onload", "onload", [self.policy, *self.others])

    def metrics(self) -> dict[str, float]:
        """Seconds and GB of the moves since the last call."""
        found = {f"memory/{name}_s": value for name, value in self._seconds.items()}
        found |= {f"memory/{name}_GB": value / 1e9 for name, value in self._bytes.items()}
        self._seconds, self._bytes = {}, {}
        return found

    async def _call(self, name: str, method: str, models: list[Handle]) -> None:
        """
        Raises:
            WorkerError: workers did not finish in time.
        """

        def late() -> WorkerError:
            return WorkerError(
                f"the learner's models did not finish {method} (between a GPU and the host) within {self._timeout:g} s "
                "(trainer.collective_timeout). A GPU hangs, or the host's memory is swapped to a disk."
            )

        begun = time.monotonic()
        async with within(self._timeout, late):
            moved = await asyncio.gather(*(model.workers.all(method) for model in models))
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - begun
        self._bytes[name] = self._bytes.get(name, 0.0) + sum(map(sum, moved))
