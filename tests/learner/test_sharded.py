"""What sharding must leave as it was: the critic's digits, deadlines of every group, memory that is given back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import distributed

from skyrl_train.errors import ModelError
from skyrl_train.learner import model_worker
from skyrl_train.learner.critic_worker import CriticWorker
from skyrl_train.learner.policy_worker import PolicyWorker
from skyrl_train.learner.ranks import Ranks
from skyrl_train.models.gather import is_shard
from skyrl_train.runtime.place import Place


@pytest.mark.parametrize("bf16", ["false", "true"])
def test_a_sharded_critic_keeps_its_head_in_float32(config, batch, model_folder, monkeypatch, bf16) -> None:
    critic = (f"trainer.critic.model.path={model_folder}", "trainer.algorithm.advantage_estimator=gae")
    plain = CriticWorker(config(*critic, "trainer.bf16=false"), 10)
    expected = plain.values(batch)
    monkeypatch.setattr(model_worker, "SHARD_ALONE", True)
    worker = CriticWorker(config(*critic, f"trainer.bf16={bf16}"), 10)
    found = worker.values(batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if bf16 == "false" else 0.02)
    assert len(found.unique()) > 0.8 * len(expected.unique()), "half precision would round values onto each other"
    batch.values, batch.returns = found, found + torch.where(batch.response_mask, 0.5, 0.0)
    losses = [worker.update(copy.deepcopy(batch))["critic/loss"] for _ in range(4)]
    assert losses[-1] < losses[0]


def test_what_stays_gathered_between_the_passes_is_given_back(config, batch, monkeypatch) -> None:
    monkeypatch.setattr(model_worker, "SHARD_ALONE", True)
    worker = PolicyWorker(config("trainer.policy.fsdp_config.reshard_after_forward=false"), 10)
    worker.logprobs(batch)
    assert all(map(is_shard, worker.module.parameters()))


def deadlines(fsdp_size: int, parts: int) -> dict[str, float]:
    place, cpu = Place(rank=distributed.get_rank(), size=4), torch.device("cpu")
    ranks = Ranks(place, cpu, timeout=7.0, saving_timeout=60.0, fsdp_size=fsdp_size, sequence_parallel=parts)

    def seconds(group: Any) -> float:
        return group._get_backend(cpu).options._timeout.total_seconds()

    found = {f"mesh {i}": seconds(group) for i, group in enumerate(ranks.mesh.get_all_groups())}
    return found | {"sequence": seconds(ranks.sequence_group), "saving": seconds(ranks.saving_group)}


def test_every_group_has_the_deadline_of_the_config(ranks) -> None:
    """A disk may take longer than a collective."""
    for found in ranks(deadlines, 2, 2, size=4):
        assert found == {"mesh 0": 7.0, "mesh 1": 7.0, "sequence": 7.0, "saving": 60.0}


def test_a_rotary_embedding_that_goes_by_the_longest_row_is_refused(config) -> None:
    with pytest.raises(ModelError, match="rope_type=dynamic: each batch would be computed by its longest sequence"):
        PolicyWorker(config("trainer.rope_scaling={rope_type: dynamic, factor: 4.0}"), 10)
