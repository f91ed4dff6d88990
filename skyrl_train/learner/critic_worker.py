"""The critic: it estimates the rewards still to come before each token, and learns from those that came."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.credit import estimator_mask, written_mask
from skyrl_train.algorithms.losses import merge_updates
from skyrl_train.algorithms.reductions import effective_denominator, sequence_mean, weighted_sum
from skyrl_train.algorithms.table import resolve
from skyrl_train.batch import TrainBatch, onto
from skyrl_train.learner.learning_worker import LearningWorker
from skyrl_train.learner.minibatches import mini_batches
from skyrl_train.learner.nonfinite import NonFiniteGuard
from skyrl_train.learner.training_state import TrainingState
from skyrl_train.learner.updater import Updater
from skyrl_train.models.value_model import ValueModel, values_of
from skyrl_train.runtime.place import Place

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config

ADVICE = (
    "Lower trainer.critic.optimizer_config.lr (1e-6), or tighten trainer.critic.optimizer_config.max_grad_norm (0.5)."
)


class CriticWorker(LearningWorker):
    """A model with a value head that gives values and learns.

    Args:
        config: the run's config.
        total_updates: optimizer steps of the critic in the whole run, for the learning-rate schedule.
    """

    def __init__(self, config: Config, total_updates: int, place: Place | None = None) -> None:
        super().__init__(config, "critic", place)
        trainer = config.trainer
        self.algorithm = trainer.algorithm
        guard = NonFiniteGuard(trainer.max_skipped_updates, ADVICE)
        self.updater = Updater(
            self.values_model, trainer.critic.optimizer_config, total_updates, guard, self.ranks,
            whole_gradients=trainer.critic.fsdp_config.whole_gradients,
        )  # fmt: skip
        self.state = TrainingState(self.updater, str(trainer.critic.model.path))
        self.value_loss = resolve("value_loss", self.algorithm.value_loss_type)

    def _assemble(self) -> torch.nn.Module:
        source, prefix = self.config.trainer.critic.model.path, self.config.trainer.algorithm.value_head_prefix
        assert source is not None, "build makes a critic where there is a path"
        self.values_model = ValueModel(self.model, source, prefix).eval()
        return self.values_model

    def values(self, batch: TrainBatch) -> Tensor:
        """The value before each response token, ``[B, T]`` float32 on the CPU, 0 where there is no token."""
        how = {"packed": self.packed, "split": self.split}
        return self.in_micro_batches(batch, lambda rows: values_of(self.values_model, rows, **how))

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """Learns from one step's batch: ``update_epochs_per_batch`` passes, one optimizer step for each mini-batch.

        Returns:
            Means (or extremes) over the step's updates.

        Raises:
            DivergedError: too many updates in a row were not finite.
        """
        with self.updating(batch):
            updates = [
                self._update_once(mini)
                for _ in range(self.config.trainer.update_epochs_per_batch)
                for mini in mini_batches(batch, self.config.trainer.critic_mini_batch_size)
            ]
        metrics = {f"critic/{name}": value for name, value in merge_updates(updates).items()}
        return metrics | {
            "critic/updates": float(len(updates)),
            "critic/skipped_updates_total": float(self.updater.guard.total),
        }

    def _update_once(self, mini: TrainBatch) -> dict[str, float]:
        """One optimizer step. Every sequence counts the same, as in SkyRL, and the tokens of one share its weight."""
        mask = self._learned(mini)
        weights = sequence_mean(mask, mini.group, self.algorithm)
        rows = mask.any(dim=1).nonzero().squeeze(1)
        rows = rows if len(rows) else torch.zeros(1, dtype=torch.long)  # one row keeps the step, its gradient is zero
        runs = self.training_runs(mini, rows)
        metrics = self.updater.step([partial(self._micro, mini, part, mask, weights) for part in runs])
        return metrics | {"denominator": effective_denominator(weights)}

    def _micro(
        self, mini: TrainBatch, rows: Tensor, mask: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], float]:
        """One micro-batch (see ``updater.Micro``)."""
        empty = len(rows) == 0
        rows = torch.zeros(1, dtype=torch.long) if empty else rows
        loss, metrics = self._loss(mini.select(rows), mask[rows], weights[rows] * (not empty))
        return loss, metrics, 0.0 if empty else float(mask[rows].sum())

    def _learned(self, mini: TrainBatch) -> Tensor:
        """The tokens whose value is learned: those that the estimator counts, of sequences that are trained."""
        live = mini.loss_mask.any(dim=1, keepdim=True)
        return live & estimator_mask(mini, written_mask(mini), self.algorithm)

    def _loss(self, micro: TrainBatch, mask: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        micro, mask, weights = micro.to(self.device), onto(mask, self.device), onto(weights, self.device)
        assert micro.values is not None and micro.returns is not None, "values and credit come before update"
        with self.precision():
            values = values_of(self.values_model, micro, packed=self.packed, split=self.split)
        result = self.value_loss(values, micro.values, micro.returns, mask, self.algorithm)
        return weighted_sum(result.per_token, weights), dict(result.metrics)
