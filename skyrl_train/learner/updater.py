"""One optimizer step from the losses of micro-batches, on one worker or on many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from skyrl_train.algorithms.losses import merge_metrics
from skyrl_train.learner.nonfinite import NonFiniteGuard
from skyrl_train.learner.optim import make_optimizer, make_scheduler
from skyrl_train.learner.ranks import Ranks
from skyrl_train.models.gather import full_tensor
from skyrl_train.models.offload import Offload, state_of
from skyrl_train.models.sharding import Accumulation, is_on_cpu

if TYPE_CHECKING:
    from skyrl_train.config.models import OptimizerConfig

Micro = Callable[[], tuple[Tensor, dict[str, Tensor], float]]
"""Computes one micro-batch: its part of the mini-batch's loss, metrics over its trained tokens (0-d), and how many
those are. One without trained tokens gives a loss of 0 and takes part all the same: the others wait for it."""


class Updater:
    """Optimizer, schedule and what surrounds them.

    Args:
        model: has the trained parameters, and is put into training mode for the time of an update.
        total_updates: of the whole run, for the schedule.
        whole_gradients: see ``Accumulation``.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        total_updates: int,
        guard: NonFiniteGuard,
        ranks: Ranks,
        whole_gradients: bool | None = None,
    ) -> None:
        self.model, self.guard, self.ranks = model, guard, ranks
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, config)
        self.scheduler = make_scheduler(self.optimizer, config.scheduler, config.num_warmup_steps, total_updates)
        self.max_grad_norm = config.max_grad_norm
        self.offloads = ranks.device.type == "cuda" and not is_on_cpu(model)
        """On a CPU, and with ``cpu_offload``, everything is on the host as it is."""
        self.away_between_updates = self.offloads and config.offload_after_step is True
        self.moments = Offload()
        copies = ranks.size // ranks.shards
        self.accumulation = Accumulation(model, ranks.shards, copies, ranks.device, whole=whole_gradients)

    def begin(self) -> None:
        """Before the updates of a step: the moments come back, unless they stay away between updates too."""
        if not self.away_between_updates:
            self.moments.back()

    def make_room(self) -> int:
        """Moves the moments to the host; bytes moved."""
        return self.moments.out(state_of(self.optimizer)) if self.offloads else 0

    def step(self, micros: Sequence[Micro]) -> dict[str, float]:
        """One update. Every worker calls it with as many micro-batches.

        Returns:
            Metrics of the whole mini-batch, ``loss``, ``grad_norm`` and ``lr`` among them; the same on every worker.

        Raises:
            DivergedError: too many updates in a row were not finite.
        """
        self.model.train()
        found: list[tuple[Tensor, dict[str, Tensor], float]] = []
        for i, micro in enumerate(micros):
            loss, metrics, tokens = micro()
            self.accumulation.before_backward(last=i == len(micros) - 1)
            # The mean over workers is what a sharded backward pass computes; the weights ask for the sum.
            (loss * self.ranks.size if self.ranks.size > 1 else loss).backward()
            found.append((loss.detach(), metrics, tokens))
        self.model.eval()
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)).item()
        metrics = self._merged(found) | {"grad_norm": norm, "lr": self.scheduler.get_last_lr()[0]}
        if self.guard.admits(metrics["loss"], norm):
            self.moments.back()
            self.optimizer.step()
            self.scheduler.step()
            if self.away_between_updates:
                self.make_room()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def _merged(self, found: Sequence[tuple[Tensor, dict[str, Tensor], float]]) -> dict[str, float]:
        """Reads all numbers from the device at once, and puts those of all workers together."""
        names = list(found[0][1])
        rows = torch.stack([torch.stack([loss.float(), *(m[n].float() for n in names)]) for loss, m, _ in found])
        numbers = rows.tolist()
        tokens = [count for _, _, count in found]
        merged = merge_metrics([dict(zip(names, row[1:], strict=True)) for row in numbers], tokens)
        return _over_ranks(self.ranks, sum(row[0] for row in numbers), merged, sum(tokens))


def _over_ranks(ranks: Ranks, loss: float, metrics: dict[str, float], tokens: float) -> dict[str, float]:
    """As if one worker had computed all micro-batches. Those that split sequences have the same numbers."""
    if ranks.size == 1:
        return metrics | {"loss": loss}
    rows = ranks.everyones([loss, tokens, *metrics.values()])
    parts = [dict(zip(metrics, row[2:], strict=True)) for row in rows]
    return merge_metrics(parts, [row[1] for row in rows]) | {"loss": sum(row[0] for row in rows)}
