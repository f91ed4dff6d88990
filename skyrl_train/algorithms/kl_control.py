"""The strength of the KL penalty over the course of a run: fixed, or moved towards a target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyrl_train.config.algorithm import AlgorithmConfig


class KLController:
    """Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2: proportional control of the log coefficient.

    ``coef *= 1 + clip(kl / kl_target - 1, -0.2, 0.2) * sequences / horizon`` after each step; it stays with
    ``kl_ctrl.type=fixed``. Its state is part of every checkpoint.

    Args:
        config: the section ``trainer.algorithm``: ``kl_loss_coef`` (where it starts) and ``kl_ctrl``.
    """

    def __init__(self, config: AlgorithmConfig) -> None:
        self.control, self.value = config.kl_ctrl, float(config.kl_loss_coef)

    @property
    def adaptive(self) -> bool:
        return self.control.type == "adaptive"

    def update(self, kl: float, sequences: int) -> None:
        """Reacts to a step.

        Args:
            kl: mean over the trained tokens, in nats, by the run's estimator.
            sequences: in the step's batch.
        """
        if self.adaptive:
            error = min(max(kl / self.control.kl_target - 1, -0.2), 0.2)
            self.value *= 1 + error * sequences / self.control.horizon

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the coefficient back; a fixed one is the config's, which may have been changed on purpose."""
        if self.adaptive:
            self.value = float(state["value"])
