"""Two workers of a model give the numbers of one: sharded over gloo, each in its own process."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from skyrl_train.learner.policy import Policy
from skyrl_train.learner.policy_worker import PolicyWorker
from skyrl_train.runtime.place import Place
from skyrl_train.runtime.processes import ProcessWorkers

KEEP = ("trainer.algorithm.use_kl_loss=true", "trainer.algorithm.use_entropy_loss=true")


def two(*overrides: str) -> tuple[str, ...]:
    return ("trainer.placement.policy_num_gpus_per_node=2", *overrides)


def play(config: Any, batch: Any, folder: str | None = None, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """Scores, learns and exports, as one worker of ``size``; each call gives the worker what the trainer would."""
    worker = PolicyWorker(config, 10, Place(rank=rank, size=size))
    everything = torch.arange(len(batch))

    def logprobs(method: str = "logprobs") -> torch.Tensor:
        return worker.in_shares(batch, getattr(worker, method))

    batch.old_logprobs = logprobs()
    batch.ref_logprobs = batch.old_logprobs - 0.1 * batch.response_mask
    found: dict[str, Any] = {"before": batch.old_logprobs, "facts": worker.describe()}
    found["metrics"] = [worker.update(batch, 0.3) for _ in range(2)]
    found["runs"] = [run.tolist() for run in worker.training_runs(batch, everything)]
    found["after"] = logprobs()
    if config.trainer.policy.model.lora.rank:
        found["base"] = logprobs("base_logprobs")
    if folder is not None:
        worker.export(folder)
    return found


def as_rank(config: Any, batch: Any, folder: str | None = None) -> bytes:
    """Pickled here: a tensor in a pipe of multiprocessing lives in the memory of the process that sent it."""
    return pickle.dumps(play(config, batch, folder, distributed.get_rank(), distributed.get_world_size()))


def agree(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    for name in ("before", "after", "base"):
        if name in one:
            torch.testing.assert_close(other[name], one[name], rtol=0, atol=tolerance)
    for mine, theirs in zip(one["metrics"], other["metrics"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4, abs=tolerance)


CASES = {
    "all weights": (),
    "replicated": ("trainer.policy.fsdp_config.fsdp_size=1", "trainer.micro_train_batch_size_per_gpu=1"),
    "kept gathered": ("trainer.policy.fsdp_config.reshard_after_forward=false",),
    "token budget": ("trainer.max_tokens_per_microbatch=24",),
    "reduced each time": (
        "trainer.policy.fsdp_config.whole_gradients=false",
        "trainer.micro_train_batch_size_per_gpu=1",
    ),
    "reduced once": ("trainer.policy.fsdp_config.whole_gradients=true", "trainer.micro_train_batch_size_per_gpu=1"),
    "recomputed": ("trainer.gradient_checkpointing=true", "trainer.gradient_checkpointing_mode=full"),
    "attention kept": ("trainer.gradient_checkpointing=true",),
    "adapter": ("trainer.policy.model.lora.rank=4",),
    "sequences split": ("trainer.micro_train_batch_size_per_gpu=4",),
    "sequences split, recomputed": ("trainer.gradient_checkpointing=true", "trainer.max_tokens_per_microbatch=24"),
    "sequences split, adapter": ("trainer.policy.model.lora.rank=4",),
    "padded": ("trainer.use_sample_packing=false",),
}


@pytest.mark.parametrize("case", CASES)
def test_two_workers_are_one(config, batch, ranks, case, tmp_path) -> None:
    more = (*KEEP, *CASES[case])
    one = play(config(*more), copy.deepcopy(batch), str(tmp_path / "one"))
    split = ("trainer.policy.sequence_parallel_size=2",) if "split" in case else ()
    both = [pickle.loads(x) for x in ranks(as_rank, config(*two(*more, *split)), batch, str(tmp_path / "two"))]
    for found in both:
        assert found["facts"]["workers"] == 2 and found["facts"]["sharded"]
        agree(one, found)
    assert both[0]["metrics"] == both[1]["metrics"] and len(both[0]["runs"]) == len(both[1]["runs"])
    rows = sorted(row for found in both for run in found["runs"] for row in run)
    assert rows == sorted(list(range(8)) * (2 if split else 1))
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor, rtol=0, atol=2e-5)


def reduced_bytes(config: Any, batch: Any) -> int:
    """Of gradients, into this rank's collectives, in one update."""
    worker = PolicyWorker(config, 10, Place(rank=distributed.get_rank(), size=2))
    batch.old_logprobs = worker.in_shares(batch, worker.logprobs)
    taken = 0
    name = "reduce_scatter_single" if hasattr(distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
    real = getattr(distributed, name)  # torch 2.13 renamed it

    def counting(*args: Any, **more: Any) -> Any:
        nonlocal taken
        taken += max(x.nbytes for x in (*args, *more.values()) if isinstance(x, torch.Tensor))
        return real(*args, **more)

    setattr(distributed, name, counting)
    worker.update(batch)
    setattr(distributed, name, real)
    return taken


def test_gradients_are_exchanged_once_where_there_is_room(config, batch, ranks) -> None:
    """Four micro-batches: each exchanges what the last alone does otherwise."""
    found = {}
    for key in ("null", "true", "false"):
        more = (f"trainer.policy.fsdp_config.whole_gradients={key}", "trainer.micro_train_batch_size_per_gpu=1")
        found[key], _ = ranks(reduced_bytes, config(*two(*more)), batch)
    assert found["null"] == found["true"] > 0
    assert found["false"] == 4 * found["true"]


@pytest.mark.slow  # compiling for a CPU takes a minute
@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_compiled_layers_are_the_same(config, batch, mode, monkeypatch) -> None:
    """Sharded, recomputed, and projected in chunks at the same time."""
    from skyrl_train.learner import model_worker as module
    from skyrl_train.models import projection

    more = (*KEEP, "trainer.gradient_checkpointing=true", f"trainer.gradient_checkpointing_mode={mode}")
    plain = play(config(*more), copy.deepcopy(batch))
    monkeypatch.setattr(projection, "SMALL", 0)
    monkeypatch.setattr(module, "SHARD_ALONE", True)
    compiled = play(config(*more, "trainer.policy.use_torch_compile=true"), copy.deepcopy(batch))
    agree(plain, compiled, 1e-4)


def test_workers_in_processes_of_their_own(config, batch) -> None:
    """What the trainer does: the runtime starts them, and each gets its share of the rows."""
    one = play(config(*KEEP), copy.deepcopy(batch))

    async def run() -> dict[str, Any]:
        handles = await ProcessWorkers.start(PolicyWorker, config(*two(*KEEP)), 10, role="policy", count=2)
        policy = Policy(handles)
        try:
            batch.old_logprobs = await policy.logprobs(batch)
            batch.ref_logprobs = batch.old_logprobs - 0.1 * batch.response_mask
            before = batch.old_logprobs
            metrics = [await policy.update(batch, 0.3) for _ in range(2)]
            return {"before": before, "metrics": metrics, "after": await policy.logprobs(batch)}
        finally:
            await handles.close()

    agree({name: one[name] for name in ("before", "metrics", "after")}, asyncio.run(run()))
