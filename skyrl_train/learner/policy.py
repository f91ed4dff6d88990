"""The trainer's handles to models: a batch goes to the workers in shares, the answers come back as one."""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl_train.batch import TrainBatch
from skyrl_train.learner.shares import deal
from skyrl_train.runtime.base import Workers


class Handle:
    """Workers of one model.

    Args:
        parts: workers that split a sequence between them (``sequence_parallel_size``): they get the same rows.
    """

    def __init__(self, workers: Workers, *, parts: int = 1) -> None:
        self.workers, self.parts = workers, parts

    async def in_shares(self, method: str, batch: TrainBatch) -> Tensor:
        """Calls ``method`` on every worker with its share of the rows; the answers as one tensor."""
        shares = deal(batch, torch.arange(len(batch)), self.workers.size // self.parts)
        some = torch.zeros(1, dtype=torch.long)  # a worker without rows still has to come to the collectives
        arguments = [(batch.select(rows if len(rows) else some),) for rows in shares for _ in range(self.parts)]
        answers = (await self.workers.each(method, arguments))[:: self.parts]
        found = torch.cat([answer[: len(rows)] for answer, rows in zip(answers, shares, strict=True)])
        return found[torch.cat(shares).argsort()]


class Scorer(Handle):
    """A model that gives log-probs: the reference.

    Args:
        workers: hold the model.
        method: theirs that scores. ``base_logprobs`` of a policy with an adapter is the model that it started from.
    """

    def __init__(self, workers: Workers, method: str = "logprobs", *, parts: int = 1) -> None:
        super().__init__(workers, parts=parts)
        self.method = method

    async def logprobs(self, batch: TrainBatch) -> Tensor:
        """``[B, T]`` log-probs of the response tokens under the distribution that was sampled from."""
        return await self.in_shares(self.method, batch)


class Learner(Handle):
    """A model that learns."""

    async def save(self, folder: str) -> None:
        """Writes weights, optimizer and schedule into ``folder``."""
        await self.workers.all("save", folder)

    async def saved(self) -> None:
        """Returns when what was saved is on the disk, if that happens in the background."""
        await self.workers.all("saved")

    async def restore(self, folder: str) -> None:
        """Takes back what ``save`` wrote."""
        await self.workers.all("restore", folder)


class Policy(Scorer, Learner):
    """The policy."""

    async def both_logprobs(self, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        """``[B, T]`` log-probs under the distribution that was sampled from, and under the plain one."""
        sampled, plain = (await self.in_shares("both_logprobs", batch)).unbind(1)
        return sampled, plain

    async def update(self, batch: TrainBatch, kl_coef: float) -> dict[str, float]:
        """Learns from the batch; metrics of the step. Every worker sees the same batch and takes its share.

        Args:
            kl_coef: strength of the KL term in the loss, where there is one.
        """
        return (await self.workers.all("update", batch, kl_coef))[0]

    async def export(self, folder: str) -> None:
        """Writes a Hugging Face folder."""
        await self.workers.all("export", folder)


class Critic(Learner):
    """The critic."""

    async def values(self, batch: TrainBatch) -> Tensor:
        """``[B, T]`` estimates of the rewards still to come before each token."""
        return await self.in_shares("values", batch)

    async def update(self, batch: TrainBatch) -> dict[str, float]:
        """Learns from the batch; metrics of the step."""
        return (await self.workers.all("update", batch))[0]
