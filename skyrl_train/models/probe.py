"""Tries whether a model gives a token the same log-prob packed as alone, and from its hidden states as from logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from skyrl_train.batch import TrainBatch
from skyrl_train.models import projection
from skyrl_train.models.scoring import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def packed_gap(model: PreTrainedModel) -> float:
    """The largest difference, in nats, between the packed and the padded log-probs of a few random sequences."""
    training = model.training
    model.eval()
    batch = _random_batch(model.config.get_text_config().vocab_size).to(model.device)
    runs = [score(model, batch, temperature=1.0, packed=packed, with_entropy=False)[0] for packed in (True, False)]
    model.train(training)
    return (runs[0] - runs[1]).abs().max().item()


@torch.no_grad()
def projected_gap(model: PreTrainedModel) -> float:
    """The largest difference, in nats, between log-probs from hidden states and from the model's own logits."""
    batch = _random_batch(model.config.get_text_config().vocab_size).to(model.device)
    held, found = projection.SMALL, []
    try:
        for projection.SMALL in (held, 0):
            found.append(score(model, batch, temperature=1.0, packed=True, with_entropy=False)[0])
    finally:
        projection.SMALL = held
    return (found[0] - found[1]).abs().max().item()


def _random_batch(vocabulary: int) -> TrainBatch:
    """Two prompts, three responses, none of equal length; drawn without touching the global random state."""
    draw = torch.Generator().manual_seed(0)
    lengths, prompt_lengths = torch.tensor([5, 2, 7]), torch.tensor([4, 4, 3])
    prompts = torch.randint(0, vocabulary, (3, 4), generator=draw)
    prompts[1] = prompts[0]
    prompts[2, 0] = 0
    mask = torch.arange(7) < lengths[:, None]
    responses = torch.where(mask, torch.randint(0, vocabulary, (3, 7), generator=draw), 0)
    zeros = torch.zeros(3, 7)
    return TrainBatch(
        prompt_ids=prompts,
        prompt_lengths=prompt_lengths,
        response_ids=responses,
        response_mask=mask,
        loss_mask=mask,
        rollout_logprobs=zeros,
        rewards=zeros,
        group=torch.tensor([0, 0, 1]),
    )
