"""Buckets that are the learner's own memory: when there are any, and that their digests are those of packed ones."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace

import pytest
import torch

from skyrl_train.config.door import load_config
from skyrl_train.engines.sglang.payloads import unpack
from skyrl_train.learner import model_worker
from skyrl_train.models.gather import own_part
from skyrl_train.roles import PolicyWithSender
from skyrl_train.weight_sync.layout import Rank
from skyrl_train.weight_sync.outline import Outline, SendPlan
from skyrl_train.weight_sync.own_memory import lent, own_runs

PLAN = SendPlan(dtype="bfloat16", limit=1 << 14, device="cpu", ranks=(Rank(),), digests="tiles", own=True)


@pytest.fixture
def policy(sglang_model, monkeypatch) -> PolicyWithSender:
    """Sharded over one worker, as on a GPU."""
    monkeypatch.setattr(model_worker, "SHARD_ALONE", True)
    folder = f"trainer.policy.model.path={sglang_model.folder}"
    return PolicyWithSender(load_config([folder, "trainer.num_threads=1"]), 10)


def sent(policy: PolicyWithSender, plan: SendPlan) -> dict:
    for index in range(len(policy.weights_begin(plan))):
        policy.weights_pack(index)
        asyncio.run(policy.weights_hash(index))
        policy.weights_release(index)
    return policy.weights_end().digests


@pytest.mark.parametrize("kind", ["tiles", "sha256"])
def test_the_digests_are_those_of_packed_buckets(policy, kind) -> None:
    own, packed = replace(PLAN, digests=kind), replace(PLAN, digests=kind, own=False)
    for _ in range(2):
        digests = sent(policy, own)
        assert digests == sent(policy, packed) and len(digests[Rank()]) > 10
        with torch.no_grad():
            own_part(policy.model.get_input_embeddings().weight)[3, 5] += 1
    (mine,) = (outline for outline in policy.sender._outlines.values() if outline.own)
    assert len(mine.buckets) == 1 and all(spec.dtype == torch.float32 for spec in mine.buckets[0])


def test_what_is_lent_is_the_memory_itself(policy) -> None:
    outline = Outline(policy.model, PLAN)
    ((bucket, _),) = outline.own
    assert outline.buckets == [bucket]
    (flat,), views = outline.fill(0)
    assert not views
    for spec, tensor in zip(outline.buckets[0], unpack(outline.buckets[0], flat), strict=True):
        parameter = outline.tensors.parameter(spec.name)
        assert parameter is not None and tensor.data_ptr() == own_part(parameter).data_ptr()
        assert torch.equal(tensor, own_part(parameter))


def test_a_sync_that_broke_off_has_no_digests(policy) -> None:
    sent(policy, PLAN)
    policy.weights_begin(PLAN)
    policy.weights_pack(0)
    assert policy.weights_end().digests == {}, "not those of the last sync"


@pytest.mark.parametrize("why", ["adapter", "not asked for", "apart", "not sharded"])
def test_else_buckets_are_packed(policy, sglang_model, why, monkeypatch) -> None:
    plan = PLAN
    if why == "adapter":
        lora = ("trainer.policy.model.lora.rank=2", f"trainer.policy.model.path={sglang_model.folder}")
        policy = PolicyWithSender(load_config([*lora, "trainer.num_threads=1"]), 10)
    elif why == "not asked for":
        plan = replace(plan, own=False)
    elif why == "apart":
        policy.module._apply(lambda tensor: tensor.clone() if isinstance(tensor, torch.nn.Parameter) else tensor)
    else:
        monkeypatch.setattr(model_worker, "SHARD_ALONE", False)
        path = f"trainer.policy.model.path={sglang_model.folder}"
        policy = PolicyWithSender(load_config([path, "trainer.num_threads=1"]), 10)
    outline = Outline(policy.model, plan)
    assert not outline.own and all(spec.dtype == torch.bfloat16 for bucket in outline.buckets for spec in bucket)


def test_runs_need_no_gap_and_no_overlap() -> None:
    memory = torch.arange(64, dtype=torch.float32)
    first, second, last = memory[:5].view(1, 5), memory[8:16].view(2, 4), memory[16:64]
    ((bucket, holder),) = own_runs({"b": second, "a": first, "c": last})
    assert [spec.name for spec in bucket] == ["a", "b", "c"] and lent(holder).data_ptr() == memory.data_ptr()
    assert not own_runs({"a": first, "c": last}), "a gap"
    assert not own_runs({"b": second, "c": last}), "something else comes first"
    assert not own_runs({"a": first, "b": second, "c": last, "d": last}), "twice"
    assert not own_runs({"a": memory.view(8, 8).T}), "rows that are columns"
    many = {str(index): copy.deepcopy(first) for index in range(9)}
    assert len(own_runs(many)) == 9 and not own_runs(many | {f"more {name}": copy.deepcopy(first) for name in many})
