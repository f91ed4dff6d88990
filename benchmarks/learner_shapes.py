"""Batches that the learner's benchmark runs on, of given lengths."""

from __future__ import annotations

import torch

from skyrl_train.batch import TrainBatch


def make_batch(lengths: list[int], vocabulary: int, prompt: int = 128, seed: int = 0) -> TrainBatch:
    """One sequence of each length, its prompt's tokens among them, each of a prompt of its own, with advantages."""
    draw = torch.Generator().manual_seed(seed)
    prompt = min(prompt, min(lengths) - 1)
    answers = torch.tensor([n - prompt for n in lengths])
    rows, width = len(lengths), int(answers.max())
    mask = torch.arange(width) < answers[:, None]

    def tokens(shape: tuple[int, int]) -> torch.Tensor:
        return torch.randint(1, vocabulary, shape, generator=draw)

    signs = torch.where(torch.arange(rows) % 2 == 0, 1.0, -1.0)[:, None].expand(rows, width)
    old = torch.where(mask, -torch.log(torch.tensor(float(vocabulary))), 0.0)
    return TrainBatch(
        prompt_ids=tokens((rows, prompt)),
        prompt_lengths=torch.full((rows,), prompt),
        response_ids=torch.where(mask, tokens((rows, width)), 0),
        response_mask=mask,
        loss_mask=mask,
        rollout_logprobs=old,
        rewards=torch.zeros(rows, width),
        group=torch.arange(rows),
        old_logprobs=old,
        advantages=torch.where(mask, signs, 0.0),
        returns=torch.where(mask, signs, 0.0),
    )


def ragged_lengths(total: int, mean: float, largest: int, prompt: int = 128, seed: int = 0) -> list[int]:
    """Log-normal response lengths (sigma 1) of the given mean, cut at ``largest``, that use about ``total`` tokens."""
    draw = torch.Generator().manual_seed(seed)
    mu = torch.log(torch.tensor(mean)) - 0.5
    lengths: list[int] = []
    while sum(lengths) < total:
        answer = int(torch.exp(mu + torch.randn(1, generator=draw)).clamp(8, largest))
        lengths.append(prompt + answer)
    return lengths
