"""The policy that learns: one optimizer step for each mini-batch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skyrl_train.algorithms.losses import SILENT, merge_updates
from skyrl_train.algorithms.losses_covariance import chooser_of
from skyrl_train.algorithms.reductions import effective_denominator, token_weights, weighted_sum
from skyrl_train.algorithms.table import resolve
from skyrl_train.algorithms.tensors import masked_mean
from skyrl_train.batch import TrainBatch, onto
from skyrl_train.learner.learning_worker import LearningWorker
from skyrl_train.learner.minibatches import mini_batches
from skyrl_train.learner.nonfinite import NonFiniteGuard
from skyrl_train.learner.training_state import TrainingState
from skyrl_train.learner.updater import Updater
from skyrl_train.learner.worker import ScoringWorker
from skyrl_train.models.lora import adapter_config, adapter_off, add_adapter, has_adapter, save_adapter
from skyrl_train.models.scoring import score
from skyrl_train.runtime.place import Place
from skyrl_train.storage.paths import filled

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config


class PolicyWorker(LearningWorker, ScoringWorker):
    """The policy: scores like the reference, and learns: all weights, or an adapter (``trainer.policy.model.lora``).

    Args:
        config: the run's config.
        total_updates: optimizer steps of the whole run, for the learning-rate schedule.
    """

    def __init__(self, config: Config, total_updates: int, place: Place | None = None, *, plain: bool = False) -> None:
        super().__init__(config, "policy", place, plain=plain)
        trainer = config.trainer
        self.algorithm = trainer.algorithm
        guard = NonFiniteGuard(trainer.max_skipped_updates)
        self.updater = Updater(
            self.model, trainer.policy.optimizer_config, total_updates, guard, self.ranks,
            whole_gradients=trainer.policy.fsdp_config.whole_gradients,
        )  # fmt: skip
        self.state = TrainingState(
            self.updater, trainer.policy.model.path, self._adapter(),
            "Set trainer.policy.model.lora as it was, or trainer.resume_mode=none to start anew.",
        )  # fmt: skip
        self.policy_loss = resolve("policy_loss", self.algorithm.policy_loss_type)
        self.chooser = chooser_of(self.policy_loss)
        self.kl = resolve("kl_estimator", self.algorithm.kl_estimator_type)
        self.kl_coef = self.algorithm.kl_loss_coef

    def _assemble(self) -> torch.nn.Module:
        lora = self.config.trainer.policy.model.lora
        if lora.rank:
            add_adapter(self.model, lora, "trainer.policy.model.lora")
        return self.model

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"trained": sum(p.numel() for p in self.updater.parameters)}

    def base_logprobs(self, batch: TrainBatch) -> Tensor:
        """``logprobs`` by the model without its adapter: the reference, without a second model."""
        with adapter_off(self.model):
            return self.logprobs(batch)

    def export(self, folder: str) -> None:
        """Writes a Hugging Face folder; a policy with an adapter merged, and the adapter beside it (``_adapter``)."""
        super().export(folder)
        if has_adapter(self.model):
            with filled(f"{folder.rstrip('/')}_adapter") as path:
                base = self.config.trainer.policy.model.path
                save_adapter(self.model, base, path, write=self.ranks.rank == 0)
            self.ranks.barrier(self.ranks.saving_group)

    def update(self, batch: TrainBatch, kl_coef: float | None = None) -> dict[str, float]:
        """Learns from one step's batch: ``update_epochs_per_batch`` passes, one optimizer step for each mini-batch.

        Args:
            kl_coef: strength of the KL term in this step; None: ``kl_loss_coef``.

        Returns:
            Means (or extremes) over the step's updates, and ``policy/ratio_gap_first``: the mean |ratio - 1| before
            anything was updated, which is 0 but for rounding.

        Raises:
            DivergedError: too many updates in a row were not finite.
        """
        self.kl_coef = self.algorithm.kl_loss_coef if kl_coef is None else kl_coef
        with self.updating(batch):
            updates = [
                self._update_once(mini)
                for _ in range(self.config.trainer.update_epochs_per_batch)
                for mini in mini_batches(batch, self.config.trainer.policy_mini_batch_size)
            ]
        metrics = {f"policy/{name}": value for name, value in merge_updates(updates).items()}
        return metrics | {
            "policy/ratio_gap_first": updates[0]["ratio_gap"],
            "policy/updates": float(len(updates)),
            "policy/skipped_updates_total": float(self.updater.guard.total),
        }

    def _update_once(self, mini: TrainBatch) -> dict[str, float]:
        """One optimizer step. Gradients add up over micro-batches; the denominator is the whole mini-batch's."""
        micro_size = self.config.trainer.micro_train_batch_size_per_gpu
        weights = token_weights(mini.loss_mask, mini.group, self.algorithm, micro_size)
        chosen = self._chosen(mini)
        runs = self.training_runs(mini, self._rows_that_matter(mini))
        metrics = self.updater.step([partial(self._micro, mini, rows, weights, chosen) for rows in runs])
        return metrics | {"denominator": effective_denominator(weights)}

    def _micro(
        self, mini: TrainBatch, rows: Tensor, weights: Tensor, chosen: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], float]:
        """One micro-batch (see ``updater.Micro``)."""
        empty = len(rows) == 0
        rows = torch.zeros(1, dtype=torch.long) if empty else rows
        micro, weights = mini.select(rows), weights[rows] * (not empty)
        loss, metrics = self._loss(micro, weights, None if chosen is None else chosen[rows])
        return loss, metrics, 0.0 if empty else float(micro.loss_mask.sum())

    def _rows_that_matter(self, mini: TrainBatch) -> Tensor:
        """Rows whose gradient can differ from zero. They alone are computed; the denominator still counts every row.

        With a KL or entropy term every trained token pulls; with most losses alone, a sequence of zero advantages does
        not. Of a user's own loss that is not known.
        """
        assert mini.advantages is not None, "assign_credit comes before update"
        trained = mini.loss_mask
        pulls = self.algorithm.use_kl_loss or self.algorithm.use_entropy_loss
        if self.algorithm.policy_loss_type in SILENT and not pulls:
            trained = trained & (mini.advantages != 0)
        rows = trained.any(dim=1).nonzero().squeeze(1)
        return rows if len(rows) else torch.zeros(1, dtype=torch.long)  # one row keeps the step, its gradient is zero

    def _chosen(self, mini: TrainBatch) -> Tensor | None:
        """What a loss that looks at the whole mini-batch has to be told of it (``losses_covariance.whole_batch``)."""
        if self.chooser is None:
            return None
        return self.chooser(
            self.in_shares(mini, self.logprobs), mini.old_logprobs, mini.advantages, mini.loss_mask, self.algorithm
        )

    def _loss(self, micro: TrainBatch, weights: Tensor, chosen: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part of the mini-batch's loss, and its metrics over trained tokens."""
        micro, weights = micro.to(self.device), onto(weights, self.device)
        assert micro.old_logprobs is not None and micro.advantages is not None
        algorithm, mask = self.algorithm, micro.loss_mask
        with self.precision():
            logprobs, entropy = score(
                self.model, micro, temperature=self.temperature, packed=self.packed, with_entropy=True,
                sampled=self.sampled, compiled=self.compiled, split=self.split,
            )  # fmt: skip
        assert entropy is not None
        extra = {} if chosen is None else {"chosen": onto(chosen, self.device)}
        result = self.policy_loss(
            logprobs, micro.old_logprobs, micro.advantages, mask, algorithm, micro.rollout_logprobs, **extra
        )
        factors = weights if micro.correction is None else weights * micro.correction
        loss = weighted_sum(result.per_token, factors)
        metrics = dict(result.metrics) | {
            "policy_loss": masked_mean(result.per_token.detach(), mask),
            "entropy": masked_mean(entropy.detach(), mask),
            "ratio_gap": masked_mean((torch.exp(logprobs.detach() - micro.old_logprobs) - 1).abs(), mask),
        }
        if algorithm.use_kl_loss:
            assert micro.ref_logprobs is not None, "the reference scores before update"
            kl = self.kl(logprobs, micro.ref_logprobs, mask)
            loss = loss + self.kl_coef * weighted_sum(kl, weights)
            metrics["kl_loss"] = masked_mean(kl.detach(), mask)
        if algorithm.use_entropy_loss:
            loss = loss - algorithm.entropy_loss_coef * weighted_sum(entropy, weights)
        return loss, metrics

    def _adapter(self) -> dict[str, Any]:
        """What a checkpoint's adapter must be; nothing for a policy of which all weights are trained."""
        if not has_adapter(self.model):
            return {}
        about = adapter_config(self.model, self.config.trainer.policy.model.path)
        return {"adapter": {name: about[name] for name in ("r", "lora_alpha", "target_modules")}}
