"""The probe's way past FSDP2 gives what FSDP2 gives, to the bit, and holds nothing afterwards."""

from __future__ import annotations

import copy

import pytest
import torch

from skyrl_train.learner import model_worker
from skyrl_train.models.offload import Offload, parameters_of
from skyrl_train.models.sharding import reshard
from skyrl_train.roles import PolicyWithSender

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27]]


def probed(worker: PolicyWithSender, *, base: bool = False) -> list[list[float]]:
    """By the second body; by FSDP2 it is the same."""
    found = worker.weights_probe(ROWS, 6, base)
    streamed, worker.streamed = worker.streamed, None
    assert streamed is not None and worker.weights_probe(ROWS, 6, base) == found
    worker.streamed = streamed
    return found


@pytest.mark.parametrize("bf16", ["false", "true"])
@pytest.mark.parametrize("lora", [0, 4])
def test_it_follows_the_policy(config, batch, monkeypatch, bf16, lora) -> None:
    monkeypatch.setattr(model_worker, "SHARD_ALONE", True)
    more = (f"trainer.bf16={bf16}", "trainer.algorithm.use_entropy_loss=true", f"trainer.policy.model.lora.rank={lora}")
    worker = PolicyWithSender(config(*more, "trainer.policy.optimizer_config.lr=0.1"), 10)
    first, base = probed(worker), probed(worker, base=True)
    assert first == base, "an adapter begins as nothing"
    batch.old_logprobs = worker.logprobs(batch)
    worker.update(copy.deepcopy(batch))
    assert probed(worker) != first
    assert (probed(worker, base=True) == base) == bool(lora)


def test_it_holds_no_memory_and_finds_what_was_away(config, monkeypatch) -> None:
    monkeypatch.setattr(model_worker, "SHARD_ALONE", True)
    worker = PolicyWithSender(config("trainer.bf16=true"), 10)
    found = worker.weights_probe(ROWS, 6)
    assert worker.streamed is not None
    taken = [size for _, size in worker.streamed._memory]
    layer = sum(p.numel() for p in worker.model.model.layers[0].parameters())
    assert 2 * layer <= taken[0] < 3 * layer, "one layer's, for all of them"
    assert all(storage.nbytes() == 0 for storage, _ in worker.streamed._memory)
    away = Offload()
    assert away.out(parameters_of(worker.module))
    away.back()
    with torch.no_grad():
        for parameter in worker.model.parameters():
            parameter.mul_(1.5)
    assert probed(worker) != found


def test_it_finds_parameters_that_got_other_memory(config, monkeypatch) -> None:
    monkeypatch.setattr(model_worker, "SHARD_ALONE", True)
    worker = PolicyWithSender(config(), 10)
    found = probed(worker)
    reshard(worker.module)
    with torch.no_grad():
        worker.module._apply(lambda t: t * 1.5 if isinstance(t, torch.nn.Parameter) else t)  # as ``module.to`` does
    assert probed(worker) != found
