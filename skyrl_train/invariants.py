"""Numbers that must hold whatever the algorithm. A breach means a wrong run; the message says where to look."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skyrl_train.algorithms.tensors import LOG_RATIO_LIMIT
from skyrl_train.batch import TrainBatch
from skyrl_train.errors import InvariantError

if TYPE_CHECKING:
    from skyrl_train.config.trainer import InvariantsConfig

log = logging.getLogger("skyrl.invariants")


class Invariants:
    """Checks, and stops the run or warns as ``trainer.invariants.mode`` says."""

    def __init__(self, config: InvariantsConfig) -> None:
        self.config = config

    def engine_agrees(self, batch: TrainBatch, learner: Tensor, step: int) -> None:
        """The engine's log-probs and the learner's, of the same tokens under the same weights, agree on average.

        Args:
            learner: ``[B, T]`` log-probs by the learner at the start of the step, of the distribution that engines
                report.
        """
        gap = (learner - batch.rollout_logprobs)[batch.loss_mask]
        mean = gap.abs().mean().item() if gap.numel() else 0.0
        self._require(
            mean <= self.config.logprob_gap,
            f"step {step}: the engine's log-probs and the learner's differ by {mean:.4g} nats a token on average "
            f"(trainer.invariants.logprob_gap={self.config.logprob_gap:g}). Likely causes: stale weights in the "
            "engine, another dtype (trainer.bf16, generator.model_dtype), another temperature, a chat template or "
            "tokenizer that is not the model's, a LoRA adapter that is not applied.",
        )

    def ratio_is_one(self, metrics: dict[str, float], step: int) -> None:
        """Before the first update of a step the policy is the policy that was scored: importance ratios are 1."""
        gap = metrics["policy/ratio_gap_first"]
        self._require(
            gap <= self.config.ratio_tolerance,
            f"step {step}: before the first update, the importance ratio differs from 1 by {gap:.4g} on average "
            f"(trainer.invariants.ratio_tolerance={self.config.ratio_tolerance:g}): the policy that is trained is not "
            "the policy that was scored. Likely causes: dropout left on, another dtype or attention in training than "
            "in scoring, packing that lets sequences see each other (compare with trainer.use_sample_packing=false).",
        )

    def reference_is_finite(self, batch: TrainBatch, step: int) -> None:
        """A reference whose log-probs are no numbers would make every update one that is skipped."""
        assert batch.ref_logprobs is not None
        self._require(
            bool(batch.ref_logprobs.isfinite().all()),
            f"step {step}: the reference's log-probs are not finite, so no update could be made. The weights in "
            "trainer.ref.model.path hold NaN or overflow; load another checkpoint.",
        )

    def reference_is_policy(self, batch: TrainBatch, step: int) -> None:
        """Before anything was learned, a reference from the policy's own folder gives the policy's log-probs."""
        assert batch.old_logprobs is not None and batch.ref_logprobs is not None
        gap = (batch.old_logprobs - batch.ref_logprobs)[batch.loss_mask].abs()
        mean = gap.mean().item() if gap.numel() else 0.0
        self._require(
            mean <= self.config.kl_tolerance,
            f"step {step}: the reference and the policy come from the same folder, and before the first update their "
            f"log-probs differ by {mean:.4g} nats a token (trainer.invariants.kl_tolerance="
            f"{self.config.kl_tolerance:g}). Likely causes: another dtype for the reference, random weights that no "
            "file gave, dropout.",
        )

    def _require(self, holds: bool, message: str) -> None:
        if holds or self.config.mode == "off":
            return
        if self.config.mode == "stop":
            raise InvariantError(f"{message} Set trainer.invariants.mode=warn to go on.")
        log.warning(message)


def mismatch_metrics(learner: Tensor, batch: TrainBatch) -> dict[str, float]:
    """``mismatch/*``, over trained tokens and their sequences: how far the engine's log-probs are from the learner's.

    Args:
        learner: ``[B, T]`` log-probs by the learner, of the distribution that engines report.

    Returns:
        ``mean`` and ``max`` of the absolute difference in nats, ``kl`` (k3 estimate of KL(engine || learner)), and for
        whole sequences ``sequence_max`` (largest absolute sum in nats) and ``sequence_ratio_mean`` (mean of the product
        of the ratios, 1 if the two agree). Nothing where no token is trained.
    """
    mask = batch.loss_mask
    gap = torch.where(mask, learner - batch.rollout_logprobs, 0.0)
    if not mask.any():
        return {}
    tokens, sequences = gap[mask], gap.sum(dim=1)[mask.any(dim=1)]
    return {
        "mismatch/mean": tokens.abs().mean().item(),
        "mismatch/max": tokens.abs().max().item(),
        "mismatch/kl": (torch.exp(tokens) - 1 - tokens).mean().item(),
        "mismatch/sequence_max": sequences.abs().max().item(),
        "mismatch/sequence_ratio_mean": sequences.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().mean().item(),
    }
