"""A loss or gradient that is not a number: the update is skipped and counted; several in a row stop the run."""

from __future__ import annotations

import logging
import math

from skyrl_train.errors import DivergedError

log = logging.getLogger("skyrl.learner")

ADVICE = (
    "Lower trainer.policy.optimizer_config.lr (1e-7), tighten trainer.policy.optimizer_config.max_grad_norm (0.5), "
    "raise trainer.algorithm.kl_loss_coef (0.01), or narrow trainer.algorithm.eps_clip_low and eps_clip_high (0.1)."
)


class NonFiniteGuard:
    """Counts skipped updates.

    Args:
        limit: how many in a row stop the run (``trainer.max_skipped_updates``).
        advice: what to try then.
    """

    def __init__(self, limit: int, advice: str = ADVICE) -> None:
        self.limit, self.advice = limit, advice
        self.in_a_row = 0
        self.total = 0

    def admits(self, loss: float, grad_norm: float) -> bool:
        """Whether the update may be applied.

        Raises:
            DivergedError: this was the ``limit``-th in a row that may not.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.total += 1
        log.warning("update skipped: loss %s, gradient norm %s (%d in a row)", loss, grad_norm, self.in_a_row)
        if self.in_a_row >= self.limit:
            raise DivergedError(
                f"{self.in_a_row} updates in a row had a loss or gradient that is not finite (last: loss {loss}, "
                f"gradient norm {grad_norm}; trainer.max_skipped_updates={self.limit}). {self.advice}"
            )
        return False
