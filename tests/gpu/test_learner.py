"""The learner on a GPU: sharded over one or two, in bfloat16 by PyTorch's own kernels, compiled, moved to the host."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
import torch

from skyrl_train.config.door import load_config
from skyrl_train.learner.policy import Policy
from skyrl_train.learner.policy_worker import PolicyWorker
from skyrl_train.models import packing, projection
from skyrl_train.models.packing import pack
from skyrl_train.models.varlen import Run, VarlenPlan, gpu_kernel, takes
from skyrl_train.runtime.processes import ProcessWorkers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore"),  # torch's own, of its compiler and of NCCL
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    made = Qwen3Config(
        vocab_size=4096, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, intermediate_size=512, max_position_embeddings=32768, initializer_range=0.05,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(made).save_pretrained(path)
    return path


def config(folder, *overrides: str) -> Any:
    return load_config([
        f"trainer.policy.model.path={folder}", "trainer.device=cuda", "trainer.algorithm.use_kl_loss=false",
        "trainer.train_batch_size=8", "trainer.policy_mini_batch_size=8", "generator.n_samples_per_prompt=1",
        "trainer.policy.optimizer_config.lr=1e-4", "trainer.policy.use_torch_compile=false",
        "trainer.max_tokens_per_microbatch=3000", "generator.backend=embedded", *overrides,
    ])  # fmt: skip


def make_batch(lengths=(700, 40, 1500, 3, 900, 5000, 64, 333), prompts: int = 4):
    from skyrl_train.batch import collate
    from skyrl_train.types import Prompt, Trajectory

    draw = torch.Generator().manual_seed(0)
    heads = [torch.randint(1, 4096, (50 + 7 * i,), generator=draw).tolist() for i in range(prompts)]
    made = []
    for i, length in enumerate(lengths):
        prompt = Prompt(uid=str(i * prompts // len(lengths)), messages=(), env_class="x")
        one = Trajectory(prompt=prompt, sample=i, prompt_ids=heads[i * prompts // len(lengths)])
        one.append_sampled(torch.randint(1, 4096, (length,), generator=draw).tolist(), [-8.0] * length, "stop", 0)
        made.append(one)
    batch = collate(made, 0)
    signs = torch.where(torch.arange(len(batch)) % 2 == 0, 1.0, -1.0)[:, None]
    batch.advantages = torch.where(batch.response_mask, signs, 0.0)
    batch.returns = batch.advantages
    return batch


def learned(worker: PolicyWorker, batch, updates: int = 2) -> dict[str, Any]:
    batch = copy.deepcopy(batch)
    batch.old_logprobs = worker.logprobs(batch)
    metrics = [worker.update(batch) for _ in range(updates)]
    return {"before": batch.old_logprobs, "metrics": metrics, "after": worker.logprobs(batch)}


def near(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    for name in ("before", "after"):
        gap = (one[name] - other[name]).abs()
        assert gap.mean() < tolerance, (name, gap.mean().item())
    for mine, theirs in zip(one["metrics"], other["metrics"], strict=True):
        assert mine["policy/grad_norm"] == pytest.approx(theirs["policy/grad_norm"], rel=0.05)


def test_there_is_a_kernel_and_it_is_used():
    assert gpu_kernel() is not None
    q = torch.zeros(1, 4, 8, 64, device="cuda", dtype=torch.bfloat16)
    assert takes(q, None) and not takes(q.float(), None)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("long", [600, 1 << 20])
@pytest.mark.parametrize("share", [True, False])
def test_the_kernel_is_attention_by_blocks(window, long, share):
    prompts = [[1] * 40, [1] * 40, [2] * 9, [1] * 40]
    packed = pack(prompts, [[3] * 70, [4] * 300, [5] * 1200, [6]], share_prompts=share, device="cuda")
    total, draw = packed.input_ids.shape[1], torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(1, h, total, 64, generator=draw, device="cuda").requires_grad_() for h in (4, 2, 2)]
    half = [x.detach().bfloat16().requires_grad_() for x in inputs]
    runs = [Run(s.start, s.length, s.prefix) for s in packed.plan._segments]
    plan = VarlenPlan(runs, "cuda", gpu_kernel(), long=long)
    expected = packed.plan.attend(0, *inputs, scale=0.125, window=window)
    got = plan.attend(*half, scale=0.125, window=window)
    torch.testing.assert_close(got.float(), expected, rtol=0.03, atol=0.03)
    pull = torch.randn(expected.shape, generator=draw, device="cuda")
    for mine, theirs in zip(
        torch.autograd.grad((got.float() * pull).sum(), half), torch.autograd.grad((expected * pull).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        assert ((mine.float() - theirs).norm() / theirs.norm()) < 0.02


def test_sharded_over_one_gpu_in_float32_it_is_the_plain_worker(folder):
    plain = learned(PolicyWorker(config(folder, "trainer.bf16=false"), 10, plain=True), make_batch())
    sharded = learned(PolicyWorker(config(folder, "trainer.bf16=false"), 10), make_batch())
    near(plain, sharded, 1e-4)


VARIANTS = {
    "kernels": (),
    "attention recomputed": ("trainer.gradient_checkpointing_mode=full",),
    "nothing recomputed": ("trainer.gradient_checkpointing=false",),
    "moments away": ("trainer.policy.optimizer_config.offload_after_step=true",),
    "everything on the host": ("trainer.policy.fsdp_config.cpu_offload=true",),
    "compiled": ("trainer.policy.use_torch_compile=true",),
    "compiled, full": ("trainer.policy.use_torch_compile=true", "trainer.gradient_checkpointing_mode=full"),
    "chunks": (),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_bfloat16_it_stays_near_float32(folder, variant, monkeypatch):
    exact = learned(PolicyWorker(config(folder, "trainer.bf16=false"), 10, plain=True), make_batch())
    if variant in ("chunks", "compiled"):
        monkeypatch.setattr(projection, "SMALL", 0)
        monkeypatch.setitem(projection.CHUNK, "cuda", 1 << 20)
    worker = PolicyWorker(config(folder, *VARIANTS[variant]), 10)
    near(exact, learned(worker, make_batch()), 0.05)
    phases = worker.memory()
    assert phases["update"]["measured_GiB"] > 0 and phases["scoring"]["predicted_GiB"] > 0


def test_an_adapters_base_is_held_in_half_precision(folder):
    worker = PolicyWorker(config(folder, "trainer.policy.model.lora.rank=8"), 10)
    kinds = {p.requires_grad: p.dtype for p in worker.module.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    found = learned(worker, make_batch())
    assert found["metrics"][0]["policy/grad_norm"] > 0
    assert torch.equal(worker.base_logprobs(make_batch()), found["before"])


def test_offload_frees_the_gpu_and_changes_nothing(folder):
    worker, batch = PolicyWorker(config(folder), 10), make_batch()
    expected = learned(worker, batch)["after"]
    batch.old_logprobs = expected
    before = torch.cuda.memory_allocated()
    moved = worker.offload()
    assert moved >= 12 * sum(p.numel() for p in worker.module.parameters())
    assert torch.cuda.memory_allocated() <= before - moved + (1 << 20)
    assert worker.onload() > 0
    assert torch.equal(worker.logprobs(batch), expected)
    worker.update(batch)


@two_gpus
@pytest.mark.parametrize(("size", "parts"), [(-1, 1), (1, 1), (-1, 2)])
def test_two_gpus_are_one(folder, size, parts):
    one = learned(PolicyWorker(config(folder), 10), make_batch())
    more = (f"trainer.policy.fsdp_config.fsdp_size={size}", "trainer.placement.policy_num_gpus_per_node=2")
    more += (f"trainer.policy.sequence_parallel_size={parts}",)

    async def run() -> dict[str, Any]:
        workers = await ProcessWorkers.start(PolicyWorker, config(folder, *more), 10, role="policy", count=2)
        policy, batch = Policy(workers, parts=parts), make_batch()
        try:
            batch.old_logprobs = await policy.logprobs(batch)
            metrics = [await policy.update(batch, 0.0) for _ in range(2)]
            return {"before": batch.old_logprobs, "metrics": metrics, "after": await policy.logprobs(batch)}
        finally:
            await workers.close()

    near(one, asyncio.run(run()), 0.02)


def test_blocks_serve_what_the_kernel_does_not(monkeypatch):
    monkeypatch.setattr(packing, "takes", lambda q, window: False)
    packed = pack([[1] * 5], [[2] * 6], device="cuda")
    q = torch.randn(1, 2, 11, 64, device="cuda", dtype=torch.bfloat16)
    assert packed.plan.attend(0, q, q, q, scale=0.1, window=None).shape == (1, 11, 2, 64)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=two_gpus)])
def test_a_checkpoint_written_in_the_background_is_of_the_moment_it_was_taken(folder, tmp_path, count):
    """Training goes on over it; whoever restores it makes the same update."""
    more = (f"trainer.placement.policy_num_gpus_per_node={count}", "trainer.ckpt_in_background=true")

    async def run(source: str | None) -> dict[str, float]:
        workers = await ProcessWorkers.start(PolicyWorker, config(folder, *more), 10, role="policy", count=count)
        policy, batch = Policy(workers), make_batch()
        try:
            batch.old_logprobs = torch.full(batch.response_mask.shape, -8.0)
            if source:
                await policy.restore(source)
            else:
                await policy.update(batch, 0.0)
                await policy.save(str(tmp_path / "saved"))
            found = await policy.update(batch, 0.0)
            await policy.saved()
            return found
        finally:
            await workers.close()

    went_on, restored = asyncio.run(run(None)), asyncio.run(run(str(tmp_path / "saved")))
    norms = [metrics.pop("policy/grad_norm") for metrics in (went_on, restored)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # a backward pass on a GPU adds in no fixed order
    assert went_on == restored


def test_a_micro_batch_waits_for_nothing_on_the_gpu(folder):
    worker, batch = PolicyWorker(config(folder), 10), make_batch()
    batch.old_logprobs = worker.logprobs(batch)
    worker.update(batch)
    weights = batch.loss_mask / batch.loss_mask.sum()
    worker.model.train()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rows in worker.training_runs(batch, torch.arange(len(batch))):
            loss, _, _ = worker._micro(batch, rows, weights, None)
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lora", [0, 8])
def test_the_probe_is_replayed_from_recorded_layers(folder, lora):
    """It equals the pass that is launched kernel by kernel, also of weights that have changed, or come back."""
    from skyrl_train.roles import PolicyWithSender

    more = ("generator.backend=sglang", "generator.weight_probe_graphs=true", f"trainer.policy.model.lora.rank={lora}")
    worker, batch = PolicyWithSender(config(folder, *more, "trainer.policy.optimizer_config.lr=1e-2"), 10), make_batch()
    rows, others = [list(range(100, 140)), list(range(300, 330))], [list(range(500, 520))]
    assert worker.streamed is not None and worker.streamed._replayed is not None
    layers = worker.streamed._replayed._layers

    def probe(rows: Any, base: bool) -> Any:
        return torch.tensor([x for row in worker.weights_probe(rows, 15, base) for x in row])

    def check() -> list[torch.Tensor]:
        found = []
        for base in (False, True)[: 2 if lora else 1]:
            passes = [probe(rows, base) for _ in range(4)]
            assert all(r.recordings[tuple(map(tuple, rows)), 15, base].graph for r in layers)
            streamed, worker.streamed = worker.streamed, None
            plain = probe(rows, base)
            worker.streamed = streamed
            assert all(torch.allclose(one, plain, rtol=0, atol=1e-5) for one in passes), (passes, plain)
            found += [plain, *([probe(others, base)] if not base else [])]
        return found

    first = check()
    batch.old_logprobs = worker.logprobs(batch)
    worker.update(batch)
    second = check()
    assert (second[0] - first[0]).abs().max() > 1e-3
    worker.offload()
    held = torch.empty(1 << 28, device="cuda")  # what comes back lies elsewhere
    worker.onload()
    assert all(torch.equal(one, other) for one, other in zip(check(), second, strict=True))
    del held


def test_a_critic_in_bfloat16_has_values_of_many_digits(folder):
    from skyrl_train.learner.critic_worker import CriticWorker

    more = (f"trainer.critic.model.path={folder}", "trainer.algorithm.advantage_estimator=gae")
    worker, batch = CriticWorker(config(folder, *more), 10), make_batch()
    batch.values = worker.values(batch)
    assert len(batch.values.unique()) > 1000, "half precision would have a few hundred"
    batch.returns = batch.values + torch.where(batch.response_mask, 0.5, 0.0)
    losses = [worker.update(copy.deepcopy(batch))["critic/loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
