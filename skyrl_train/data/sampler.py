"""Which prompts each step gets. The order is a function of (seed, epoch), so two numbers say where a run stands."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from skyrl_train.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)
Item = TypeVar("Item")


class PromptSampler(Iterator[list[int]]):
    """Yields the indices of one train batch a step, each prompt at most once an epoch::

        n_prompts 7, batch_size 3, epochs 2:   [4 0 2] [6 1 5] | [2 5 0] [1 3 6]     3 is left over, then 4

    A batch counts as used when it is yielded: a state saved after a step makes the resumed run go on with the next one.
    ``more`` takes further prompts for the running step. The number of steps stays ``epochs`` times the batches of an
    epoch, and the data are walked faster, over further epochs where they run out.

    Args:
        n_prompts: how many there are to draw from.
        batch_size: prompts a step (``trainer.train_batch_size``). The rest of an epoch that fills no batch is left out.
        shuffle: whether each epoch has an order of its own; if not, the prompts come as they are.
        fingerprint: of the data; a state saved with other data is refused.

    Raises:
        ConfigError: a size that is not positive, or fewer prompts than one batch takes.
    """

    def __init__(
        self, n_prompts: int, batch_size: int, seed: int, shuffle: bool = True, epochs: int = 1, fingerprint: str = ""
    ) -> None:
        for key, value in (("trainer.train_batch_size", batch_size), ("trainer.epochs", epochs)):
            if value < 1:
                raise ConfigError(key, value, "must be at least 1.")
        if batch_size > n_prompts:
            raise ConfigError(
                "trainer.train_batch_size", batch_size, f"the data holds {n_prompts} prompts, not one full batch.",
                "Lower it, or give more data.",
            )  # fmt: skip
        self.n_prompts, self.batch_size, self.epochs = n_prompts, batch_size, epochs
        self.seed, self.shuffle, self.fingerprint = seed, shuffle, fingerprint
        self.epoch = 0
        """The epoch that the next batch is looked for in, from 0."""
        self.position = 0
        """How many prompts of that epoch are used."""
        self.step = 0
        """How many batches were yielded."""
        self.extra = 0
        """How many batches ``more`` gave."""
        self._order: tuple[int, list[int]] = (-1, [])
        if self.left_over:
            log.info("%d of %d prompts are left out of each epoch: they fill no batch.", self.left_over, n_prompts)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch."""
        return self.n_prompts // self.batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: those done and those to come."""
        rest = (self.n_prompts - self.position) // self.batch_size
        left = rest + (self.epochs - self.epoch - 1) * self.steps_per_epoch + self.extra
        return self.step + max(0, left)

    @property
    def left_over(self) -> int:
        """Prompts of an epoch that fill no batch."""
        return self.n_prompts % self.batch_size

    def __next__(self) -> list[int]:
        if self.step >= self.total_steps:
            raise StopIteration
        self.step += 1
        return self._take()

    def more(self) -> list[int]:
        """The prompts that come next, for the step that is running."""
        self.extra += 1
        return self._take()

    def _take(self) -> list[int]:
        if self.position + self.batch_size > self.n_prompts:
            self.epoch, self.position = self.epoch + 1, 0
        batch = self._epoch_order()[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return batch

    def steps(self, prompts: Sequence[Item]) -> Iterator[tuple[int, list[Item]]]:
        """``(step, the step's prompts)``, steps counted from 1, going on where a loaded state stopped."""
        for batch in self:
            yield self.step, [prompts[index] for index in batch]

    def state_dict(self) -> dict[str, int | bool | str]:
        """Where the run stands, and what this holds for."""
        names = ("epoch", "position", "step", "extra", "seed", "shuffle", "n_prompts", "fingerprint")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, int | bool | str]) -> None:
        """Goes to where ``state`` was saved. The batch size and the number of epochs may differ, nothing else may.

        Raises:
            CheckpointError: the state is partial, or was saved with other data, seed or order: going on would repeat
                some prompts and skip others.
        """
        state = {"extra": 0} | state  # what was saved before there was dynamic sampling has none
        if missing := [name for name in self.state_dict() if name not in state]:
            raise CheckpointError(f"the saved place in the data lacks {', '.join(missing)}.")
        for name, key in (("seed", "trainer.seed"), ("shuffle", "data.shuffle")):
            if state[name] != getattr(self, name):
                raise CheckpointError(
                    f"{key}={getattr(self, name)!r}: the checkpoint was saved with {state[name]!r}, another order "
                    f"of the data. Set {key}={state[name]} to resume."
                )
        if (state["n_prompts"], state["fingerprint"]) != (self.n_prompts, self.fingerprint):
            raise CheckpointError(
                f"the training data changed since the checkpoint: {state['n_prompts']} prompts (fingerprint "
                f"{state['fingerprint']!r}) then, {self.n_prompts} ({self.fingerprint!r}) now. Resume with the data of "
                "then (data.train_data, trainer.max_prompt_length), or start anew with trainer.resume_mode=none."
            )
        for name in ("epoch", "position", "step", "extra"):
            setattr(self, name, int(state[name]))

    def _epoch_order(self) -> list[int]:
        if self._order[0] != self.epoch:
            order = list(range(self.n_prompts))
            if self.shuffle:
                random.Random(f"prompts/{self.seed}/{self.epoch}").shuffle(order)
            self._order = (self.epoch, order)
        return self._order[1]
