"""The reference: a model that scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skyrl_train.batch import TrainBatch
from skyrl_train.learner.model_worker import ModelWorker
from skyrl_train.models.loading import load_tokenizer, save_pretrained
from skyrl_train.models.scoring import score, score_both
from skyrl_train.storage.paths import filled

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config


class ScoringWorker(ModelWorker):
    """A model that gives log-probs: the reference."""

    def logprobs(self, batch: TrainBatch) -> Tensor:
        """Log-probs of the response tokens under the distribution sampled from, ``[B, T]`` float32 on the CPU."""
        options: dict[str, Any] = self._options | {"with_entropy": False, "compiled": self.compiled}
        return self.in_micro_batches(batch, lambda rows: score(self.model, rows, **options)[0])

    def both_logprobs(self, batch: TrainBatch) -> Tensor:
        """Where engines change the distribution: log-probs under the changed one and the plain one, ``[B, 2, T]``."""
        assert self.sampled is not None
        return self.in_micro_batches(batch, lambda rows: torch.stack(score_both(self.model, rows, **self._options), 1))

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature, "packed": self.packed, "sampled": self.sampled, "split": self.split
        }  # fmt: skip

    def export(self, folder: str) -> None:
        """Writes an ordinary Hugging Face folder: weights, config, tokenizer. Rank 0 writes what all of them gather.

        Args:
            folder: a path, or an address that fsspec knows.
        """
        with filled(folder) as path:
            save_pretrained(self.model, load_tokenizer(self.section.model.path), path, write=self.ranks.rank == 0)
        self.ranks.barrier(self.ranks.saving_group)


def policy_holds_reference(config: Config) -> bool:
    """Whether the reference is the policy without its adapter, so that no second model is needed."""
    policy, ref = config.trainer.policy, config.trainer.ref
    same = (policy.model.path, policy.model_config_kwargs) == (ref.model.path, ref.model_config_kwargs)
    return policy.model.lora.rank > 0 and same
