"""Parameters in a few runs of memory learn, travel to the host and are saved as those with memory of their own."""

from __future__ import annotations

import copy

import pytest
import torch

from skyrl_train.learner import model_worker
from skyrl_train.learner.policy_worker import PolicyWorker
from skyrl_train.models.arenas import ALIGNED, into_arenas
from skyrl_train.models.offload import Offload, parameters_of
from skyrl_train.models.sharding import reshard


@pytest.fixture(autouse=True)
def sharded(monkeypatch) -> None:
    monkeypatch.setattr(model_worker, "SHARD_ALONE", True)


def storages(worker: PolicyWorker) -> set[int]:
    reshard(worker.module)
    return {p.to_local().untyped_storage().data_ptr() for p in worker.model.parameters()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("limit", [1 << 30, 10_000])
def test_it_learns_the_same(config, batch, tmp_path, lora, limit) -> None:
    more = (f"trainer.policy.model.lora.rank={lora}", "trainer.bf16=true", "trainer.algorithm.use_entropy_loss=true")
    plain, moved = PolicyWorker(config(*more), 10), PolicyWorker(config(*more), 10)
    before = list(moved.model.parameters())
    runs = into_arenas(moved.module, limit)
    assert len(storages(moved)) == runs and (runs == 1) == (limit == 1 << 30)
    assert all(a is b for a, b in zip(moved.model.parameters(), before, strict=True))
    found = []
    for worker in (plain, moved):
        mine = copy.deepcopy(batch)
        mine.old_logprobs = worker.logprobs(mine)
        found.append([worker.update(mine), worker.update(mine), worker.logprobs(mine).tolist()])
        worker.save(str(tmp_path / str(len(found))))
    assert found[0] == found[1]
    assert len(storages(moved)) == runs, "an update leaves them where they are"
    plain.restore(str(tmp_path / "2"))
    assert plain.logprobs(mine).tolist() == found[1][2]


def test_they_lie_one_after_the_other_and_move_as_one(config) -> None:
    worker = PolicyWorker(config(), 10)
    values = [p.to_local().clone() for p in worker.model.parameters()]  # type: ignore[attr-defined]
    into_arenas(worker.module)
    parts = sorted((p.to_local() for p in worker.model.parameters()), key=lambda t: t.storage_offset())  # type: ignore[attr-defined]
    place = 0
    for part in parts:
        assert part.storage_offset() * part.itemsize == place and part.is_contiguous()
        place += -(-part.nbytes // ALIGNED) * ALIGNED
    away = Offload()
    assert away.out(parameters_of(worker.module)) >= place
    away.back()
    for parameter, value in zip(worker.model.parameters(), values, strict=True):
        assert torch.equal(parameter.to_local(), value)  # type: ignore[attr-defined]
