"""Checkpoints of one worker and of two: loaded by the other number, in the background, and where the disk fails."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import shards
import torch
from torch import distributed

from skyrl_train.errors import CheckpointError
from skyrl_train.learner import model_worker, shard_files
from skyrl_train.learner.critic_worker import CriticWorker
from skyrl_train.learner.policy_worker import PolicyWorker
from skyrl_train.runtime.place import Place

LORA = "trainer.policy.model.lora.rank=4"


def make(kind: str, config: Any, rank: int = 0, size: int = 1) -> Any:
    return (CriticWorker if kind == "critic" else PolicyWorker)(config, 10, Place(rank=rank, size=size))


def ready(worker: Any, batch: Any) -> Any:
    """The batch as the trainer would give it."""
    if isinstance(worker, CriticWorker):
        batch.values = worker.in_shares(batch, worker.values)
        batch.returns = batch.values + batch.advantages
    else:
        batch.old_logprobs = worker.in_shares(batch, worker.logprobs)
    return batch


def part(kind: str, config: Any, batch: Any, source: str | None, target: str | None) -> bytes:
    """One worker of a group, or one alone: goes on from ``source``, learns, saves to ``target``, learns once more."""
    group = distributed.is_initialized()
    worker = make(kind, config, *((distributed.get_rank(), distributed.get_world_size()) if group else ()))
    if source:
        worker.restore(source)
    first = worker.update(ready(worker, batch))
    if target:
        worker.save(target)
    return pickle.dumps([first, worker.update(ready(worker, batch))])


def options(kind: str, model_folder: Path, workers: int) -> tuple[str, ...]:
    role = "critic" if kind == "critic" else "policy"
    more = (f"trainer.critic.model.path={model_folder}", "trainer.critic_mini_batch_size=4",
            "trainer.algorithm.advantage_estimator=gae") if kind == "critic" else ()  # fmt: skip
    adapter = (LORA,) if kind == "adapter" else ()
    return (*more, *adapter, f"trainer.placement.{role}_num_gpus_per_node={workers}")


@pytest.mark.parametrize("kind", ["policy", "critic", "adapter"])
def test_another_number_of_workers_goes_on(config, batch, ranks, model_folder, tmp_path, kind) -> None:
    """1 -> 2 -> 1: the numbers of the one that never changed, to rounding; and 2 -> 2 to the bit."""
    one, two = (config(*options(kind, model_folder, n)) for n in (1, 2))
    paths = [str(tmp_path / name) for name in ("alone", "both", "again")]
    alone = pickle.loads(part(kind, one, copy.deepcopy(batch), None, paths[0]))
    both = [pickle.loads(x) for x in ranks(part, kind, two, batch, paths[0], paths[1])]
    assert both[0] == both[1]
    assert both[0][0] == pytest.approx(alone[1], rel=1e-4, abs=1e-5)
    assert sorted(p.name for p in Path(paths[1]).iterdir()) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "state.json"
    ]  # fmt: skip
    back = pickle.loads(part(kind, one, copy.deepcopy(batch), paths[1], None))
    assert back[0] == pytest.approx(both[0][1], rel=1e-4, abs=1e-5)
    if kind == "policy":
        same = [pickle.loads(x) for x in ranks(part, kind, two, batch, paths[1], paths[2])]
        assert same[0][0] == same[1][0] == both[0][1]


@pytest.fixture
def slow_disk(monkeypatch) -> threading.Event:
    """Nothing is written until the event is set."""
    gate, write = threading.Event(), shard_files.write

    def wait(*args: Any, **kwargs: Any) -> None:
        assert gate.wait(30)
        write(*args, **kwargs)

    monkeypatch.setattr(shard_files, "write", wait)
    return gate


def test_in_the_background_training_goes_on_and_what_was_then_is_saved(config, batch, tmp_path, slow_disk) -> None:
    worker = make("policy", config("trainer.ckpt_in_background=true"))
    worker.update(ready(worker, batch))
    then = {f"model.{name}": p.detach().clone() for name, p in worker.model.named_parameters()}
    worker.save(str(tmp_path / "saved"))
    expected = worker.update(ready(worker, batch))
    assert not (tmp_path / "saved").exists()
    slow_disk.set()
    asyncio.run(worker.saved())
    held = shards.tensors(tmp_path / "saved")
    assert all(torch.equal(held[name], value) for name, value in then.items())
    other = make("policy", config())
    other.restore(str(tmp_path / "saved"))
    assert other.update(ready(other, batch)) == expected


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_disk_that_fails_is_one_error_with_its_cause(config, tmp_path, background) -> None:
    (tmp_path / "file").write_text("")
    worker = make("policy", config(f"trainer.ckpt_in_background={background}"))

    def save(folder: Path) -> None:
        worker.save(str(folder))
        asyncio.run(worker.saved())

    with pytest.raises(OSError, match=r"rank 0, .*file/saved: NotADirectoryError"):
        save(tmp_path / "file" / "saved")
    save(tmp_path / "saved")  # and the next one is not blamed


def unseen(config: Any, folder: str) -> str:
    """Two workers whose folders have one name and are not one."""
    rank = distributed.get_rank()
    worker = make("policy", config, rank, 2)
    try:
        worker.save(f"{folder}/node{rank}/saved")
    except OSError as error:
        return str(error)
    return ""


def test_workers_that_do_not_share_a_disk_are_told(config, ranks, model_folder, tmp_path) -> None:
    told = ranks(unseen, config(*options("policy", model_folder, 2), "trainer.collective_timeout=5"), str(tmp_path))
    assert all("a folder that all of them share" in text for text in told), told


def test_an_address_is_written_and_read_as_a_folder_is(config, batch, tmp_path) -> None:
    worker = make("policy", config())
    worker.update(ready(worker, batch))
    worker.save(f"file://{tmp_path}/far/policy")
    expected = worker.update(ready(worker, batch))
    other = make("policy", config("trainer.seed=7"))
    other.restore(f"file://{tmp_path}/far/policy")
    assert other.update(ready(other, batch)) == expected
    with pytest.raises(CheckpointError, match="missing"):
        other.restore(f"file://{tmp_path}/far/away")


@pytest.mark.parametrize("background", ["true", "false"])
def test_one_worker_that_is_sharded_as_on_a_gpu(config, batch, tmp_path, monkeypatch, background) -> None:
    """What it saves one that is not sharded takes, and the other way round."""
    plain = make("policy", config())
    plain.update(ready(plain, copy.deepcopy(batch)))
    plain.save(str(tmp_path / "plain"))
    expected = plain.update(ready(plain, copy.deepcopy(batch)))
    monkeypatch.setattr(model_worker, "SHARD_ALONE", True)
    sharded = make("policy", config(f"trainer.ckpt_in_background={background}"))
    assert sharded.describe()["sharded"]
    sharded.restore(str(tmp_path / "plain"))
    sharded.save(str(tmp_path / "sharded"))
    assert sharded.update(ready(sharded, copy.deepcopy(batch))) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    asyncio.run(sharded.saved())
    held = [shards.tensors(tmp_path / name) for name in ("plain", "sharded")]
    assert held[0].keys() == held[1].keys() and all(torch.equal(held[0][n], held[1][n]) for n in held[0])
