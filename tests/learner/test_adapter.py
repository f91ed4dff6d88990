"""The policy with an adapter: it learns by the definition, keeps its base at hand, and saves what it trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import shards
import torch
from safetensors.torch import load_file

from skyrl_train.errors import CheckpointError
from skyrl_train.learner.policy_worker import PolicyWorker
from skyrl_train.learner.worker import ScoringWorker, policy_holds_reference

SECTION = "trainer.policy.model.lora"


@pytest.fixture
def make(config):
    """Makes policies with an adapter of rank 4."""

    def worker(*overrides: str, updates: int = 10) -> PolicyWorker:
        return PolicyWorker(config(f"{SECTION}.rank=4", f"{SECTION}.alpha=8", *overrides), updates)

    return worker


def scored(worker: PolicyWorker, batch):
    batch.old_logprobs = worker.logprobs(batch)
    return batch


def trained(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in worker.model.named_parameters() if p.requires_grad}


def same(a: dict, b: dict, tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=tolerance) for name in a)


def by_hand(folder: Path, batch, start: dict[str, torch.Tensor], updates: int) -> dict[str, torch.Tensor]:
    """The adapter after some updates, from the definition: y = W x + 2 B A x, with A and B as plain leaves.

    The ratio is 1 at each update, so the gradient of the PPO loss is that of ``-sum A log p / N``.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").requires_grad_(False)
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    base = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(list(leaves.values()), lr=1e-3, weight_decay=0.1, foreach=False)
    tokens = int(batch.loss_mask.sum())
    for _ in range(updates):
        weights = dict(base)
        for name in [name for name in leaves if ".lora_A." in name]:
            b = leaves[name.replace("lora_A", "lora_B")]
            layer = name.partition(".lora_A")[0] + ".weight"
            weights[layer] = base[layer] + 2 * b @ leaves[name]
        total = torch.zeros(())
        for row in range(len(batch)):
            prompt, response = batch.prompt(row), batch.response(row)
            call = {"input_ids": torch.tensor([prompt + response])}
            every = torch.func.functional_call(model, weights, kwargs=call).logits[0].log_softmax(-1)
            for place, token in enumerate(response):
                if batch.loss_mask[row, place]:
                    total = total - batch.advantages[row, place] * every[len(prompt) + place - 1, token]
        optimizer.zero_grad()
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), 1.0)
        optimizer.step()
    return leaves


@pytest.mark.parametrize("micro", [1, 8])
def test_updates_are_the_definitions(make, model_folder, batch, micro) -> None:
    worker = make(f"trainer.micro_train_batch_size_per_gpu={micro}")
    start = trained(worker)
    for _ in range(3):  # B starts at zero, so A first moves in the second
        metrics = worker.update(scored(worker, batch))
        assert metrics["policy/ratio_gap_first"] < 1e-5
    expected = by_hand(model_folder, batch, start, 3)
    assert same(trained(worker), {name: value.detach() for name, value in expected.items()}, 1e-5)
    assert not same(trained(worker), start, 1e-3)


def test_the_base_stays_and_is_the_reference(make, config, batch) -> None:
    worker, reference = make(), ScoringWorker(config(), "ref")
    assert torch.equal(worker.logprobs(batch), worker.base_logprobs(batch))
    for _ in range(3):
        worker.update(scored(worker, batch))
    assert torch.equal(worker.base_logprobs(batch), reference.logprobs(batch))
    assert (worker.logprobs(batch) - worker.base_logprobs(batch)).abs().max() > 1e-3
    before = trained(worker)
    worker.update(scored(worker, batch))  # scoring with the base did not freeze anything
    assert not same(trained(worker), before, 1e-5)


def test_facts(make) -> None:
    facts = make().describe()
    assert facts["trained"] == sum(p.numel() for p in trained(make()).values()) < facts["parameters"]


def test_the_optimizer_holds_the_adapter_alone(make, batch) -> None:
    worker = make()
    worker.update(scored(worker, batch))
    assert len(worker.updater.optimizer.state) == len(trained(worker)) == 28


@pytest.mark.parametrize("reentrant", ["true", "false"])
def test_gradient_checkpointing_changes_memory_alone(make, batch, reentrant) -> None:
    plain = make("trainer.gradient_checkpointing=false")
    other = make(
        "trainer.gradient_checkpointing=true", f"trainer.gradient_checkpointing_use_reentrant={reentrant}"
    )  # fmt: skip
    for _ in range(2):
        norms = [worker.update(scored(worker, batch))["policy/grad_norm"] for worker in (plain, other)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0
    assert same(trained(plain), trained(other), 1e-6)


def test_under_bfloat16_the_adapter_stays_float32(make, batch) -> None:
    worker = make("trainer.bf16=true")
    metrics = worker.update(scored(worker, batch))
    assert metrics["policy/ratio_gap_first"] < 5e-3 and metrics["policy/grad_norm"] > 0
    assert {p.dtype for p in trained(worker).values()} == {torch.float32}


def test_what_was_saved_goes_on_as_if_nothing_had_been(make, batch, tmp_path) -> None:
    more = ("trainer.policy.optimizer_config.scheduler=cosine", "trainer.policy_mini_batch_size=2")
    worker = make(*more)
    worker.update(scored(worker, batch))
    worker.save(str(tmp_path / "saved"))
    expected = worker.update(scored(worker, batch)), trained(worker)
    other = make(*more, "trainer.seed=7")  # whose adapter starts elsewhere
    other.restore(str(tmp_path / "saved"))
    assert other.update(scored(other, batch)) == expected[0] and same(trained(other), expected[1])


def test_a_checkpoint_leaves_the_base_out(make, batch, tmp_path) -> None:
    worker = make()
    worker.save(str(tmp_path))
    held = shards.tensors(tmp_path, "model.")
    assert held.keys() == trained(worker).keys()


OTHER = {
    "rank": (f"{SECTION}.rank=2",),
    "alpha": (f"{SECTION}.alpha=9",),
    "targets": (f"{SECTION}.target_modules=[q_proj]",),
    "none": (f"{SECTION}.rank=0",),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_checkpoint_of_another_adapter_is_refused(make, tmp_path, case) -> None:
    for first, second in ((OTHER[case], ()), ((), OTHER[case])):
        folder = str(tmp_path / str(len(first)))
        make(*first).save(folder)
        with pytest.raises(CheckpointError, match=r"was written with.*trainer.policy.model.lora"):
            make(*second).restore(folder)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(make, tmp_path) -> None:
    make().save(str(tmp_path))
    state = shards.tensors(tmp_path)
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    del state[f"model.{name}"]
    shards.replace(tmp_path, state)
    with pytest.raises(CheckpointError, match=f"does not fit the model.*{name}"):
        make().restore(str(tmp_path))


def test_an_export_is_the_merged_model_with_the_adapter_beside_it(make, config, batch, tmp_path) -> None:
    worker = make()
    for _ in range(3):
        worker.update(scored(worker, batch))
    worker.export(str(tmp_path / "step" / "policy"))
    assert sorted(p.name for p in (tmp_path / "step").iterdir()) == ["policy", "policy_adapter"]
    merged = ScoringWorker(config(f"trainer.ref.model.path={tmp_path}/step/policy"), "ref")
    assert torch.allclose(merged.logprobs(batch), worker.logprobs(batch), atol=1e-5)
    assert len(load_file(tmp_path / "step" / "policy_adapter" / "adapter_model.safetensors")) == 28


def test_when_the_policy_holds_the_reference(config) -> None:
    lora = f"{SECTION}.rank=4"
    assert policy_holds_reference(config(lora))
    assert not policy_holds_reference(config())
    assert not policy_holds_reference(config(lora, "trainer.ref.model.path=elsewhere"))
    assert not policy_holds_reference(config(lora, "trainer.ref.model_config_kwargs.rms_norm_eps=0.1"))
