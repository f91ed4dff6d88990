"""Workers that split sequences give the numbers of one that does not: policy, critic, and with data parallelism."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from test_several_workers import agree, as_rank, play, two
from torch import distributed

from skyrl_train.errors import ConfigError
from skyrl_train.learner.critic_worker import CriticWorker
from skyrl_train.runtime.place import Place

SPLIT = "trainer.policy.sequence_parallel_size=2"


@pytest.mark.parametrize("changed", ["top_k=5", "repetition_penalty=1.3"])
def test_a_changed_distribution(config, batch, ranks, changed) -> None:
    """What the engine did to the logits is done to each worker's; penalties look at the whole sequence."""
    more = ("generator.backend=embedded", f"generator.sampling_params.{changed}")
    one = play(config(*more), copy.deepcopy(batch))
    for found in ranks(as_rank, config(*two(*more, SPLIT)), batch):
        agree(one, pickle.loads(found))


def test_two_copies_of_two_parts(config, batch, ranks) -> None:
    one = play(config(), copy.deepcopy(batch))
    places = ("trainer.placement.policy_num_gpus_per_node=4", "trainer.policy.fsdp_config.fsdp_size=2", SPLIT)
    found = [pickle.loads(x) for x in ranks(as_rank, config(*places), batch, size=4)]
    for each in found:
        agree(one, each)
    assert found[0]["runs"] == found[1]["runs"] != found[2]["runs"] == found[3]["runs"]


def value(config: Any, batch: Any, rank: int = 0, size: int = 1) -> dict[str, Any]:
    worker = CriticWorker(config, 10, Place(rank=rank, size=size))
    batch.values = worker.in_shares(batch, worker.values)
    batch.returns = batch.values + torch.where(batch.response_mask, 0.5, 0.0)
    metrics = [worker.update(batch) for _ in range(2)]
    return {"before": batch.values, "metrics": metrics, "after": worker.in_shares(batch, worker.values)}


def value_as_rank(config: Any, batch: Any) -> bytes:
    return pickle.dumps(value(config, batch, distributed.get_rank(), 2))


def test_the_critic(config, batch, ranks, model_folder) -> None:
    critic = (f"trainer.critic.model.path={model_folder}", "trainer.algorithm.advantage_estimator=gae")
    places = (*two(), "trainer.placement.critic_num_gpus_per_node=2", "trainer.critic.sequence_parallel_size=2")
    alone = (*two(), "trainer.placement.critic_num_gpus_per_node=2")
    both = [pickle.loads(x) for x in ranks(value_as_rank, config(*critic, *alone), batch)]
    split = [pickle.loads(x) for x in ranks(value_as_rank, config(*critic, *places), batch)]
    for found in split:
        agree(both[0], found)


def refused(config: Any) -> str:
    from skyrl_train.learner.policy_worker import PolicyWorker

    with pytest.raises(ConfigError) as caught:
        PolicyWorker(config, 10, Place(rank=distributed.get_rank(), size=distributed.get_world_size()))
    return str(caught.value)


def test_what_cannot_be_split_is_said(config, ranks) -> None:
    places = ("trainer.placement.policy_num_gpus_per_node=4", "trainer.policy.sequence_parallel_size=4")
    said = ranks(refused, config(*places), size=4)
    assert "trainer.policy.sequence_parallel_size=4: does not divide the 2 attention heads" in said[0]
    assert "Set it to one of 1, 2." in said[0]
    said = ranks(refused, config(*two(SPLIT, "trainer.use_sample_packing=false")))
    assert "needs packed sequences" in said[0] and "trainer.use_sample_packing=true" in said[0]
