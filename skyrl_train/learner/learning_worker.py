"""What the policy and the critic have in common: a model that learns, and goes on where it was saved."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from skyrl_train.batch import TrainBatch
from skyrl_train.config.backend import resolve_backend, resolve_background
from skyrl_train.learner.model_worker import ModelWorker
from skyrl_train.learner.shares import deal, micro_batches, token_counts
from skyrl_train.learner.training_state import TrainingState
from skyrl_train.learner.updater import Updater


class LearningWorker(ModelWorker):
    """A model with an optimizer. Subclasses set both of these when they are made."""

    updater: Updater
    state: TrainingState

    @property
    def _bounds(self) -> dict[str, Any]:
        """Of a micro-batch of an update."""
        trainer = self.config.trainer
        return {"sequences": trainer.micro_train_batch_size_per_gpu, "tokens": trainer.max_tokens_per_microbatch}

    def training_runs(self, batch: TrainBatch, rows: Tensor) -> list[Tensor]:
        """This worker's micro-batches of an update on ``rows``. Every worker has as many; those beyond its own rows
        are empty (``len(run) == 0``)."""
        every = [micro_batches(batch, mine, **self._bounds) for mine in deal(batch, rows, self.ranks.data_size)]
        runs = every[self.ranks.data_rank]
        return runs + [rows[:0]] * (max(map(len, every)) - len(runs))

    @contextmanager
    def updating(self, batch: TrainBatch) -> Iterator[None]:
        """Around the updates of a step: the optimizer's moments are here, memory is measured."""
        trainer = self.config.trainer
        mode = trainer.gradient_checkpointing_mode if self.recomputes else None
        counts = token_counts(batch)
        runs = micro_batches(batch, counts.argsort(descending=True), **self._bounds)
        largest = max(int(counts[run].sum()) for run in runs) // self.ranks.sequence_parallel
        self.updater.begin()
        whole = self.updater.accumulation.whole_bytes if len(runs) > self.ranks.data_size else 0
        with self.memory_log.phase("update", self.shapes().training(largest, mode, whole)):
            yield
        if self._engines_need_room and self.section.optimizer_config.offload_after_step is not False:
            self.updater.make_room()

    @property
    def _engines_need_room(self) -> bool:
        """Engines that we start share this GPU."""
        generator = self.config.generator
        shared = generator.run_engines_locally and self.config.trainer.placement.colocate_all
        return shared and resolve_backend(self.config) != "embedded"

    def make_room(self) -> int:
        """Moves the optimizer's moments to the host."""
        return self.updater.make_room()

    def offload(self) -> int:
        return self.updater.make_room() + super().offload()

    def save(self, folder: str) -> None:
        """Writes everything that the next update depends on into ``folder``; with an adapter, the base is left out.

        In the background, where ``trainer.ckpt_in_background`` says so: then it returns when a copy is made, and
        ``saved`` when that is written.
        """
        self.state.save(folder, background=resolve_background(self.config, self.device.type == "cuda"))

    async def saved(self) -> None:
        """Returns when what was saved is written; raises what went wrong. Updates go on meanwhile."""
        writing = self.state.take_writing()
        if writing is not None:
            await asyncio.wrap_future(writing)

    def restore(self, folder: str) -> None:
        """Takes back what ``save`` wrote. Learning rate, betas and decay are the config's: they may have changed.

        Raises:
            CheckpointError: files are absent, unreadable, or of another model.
        """
        self.state.restore(folder)
