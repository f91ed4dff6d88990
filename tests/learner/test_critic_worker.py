"""The critic that learns, against plain PyTorch; and what it writes and takes back."""

from __future__ import annotations

import pytest
import shards
import torch

from skyrl_train.errors import CheckpointError, DivergedError
from skyrl_train.learner.critic_worker import CriticWorker

OPTIMIZER = "trainer.critic.optimizer_config"


@pytest.fixture
def make(config, model_folder):
    """Makes critics from the policy's folder."""

    def worker(*overrides: str, updates: int = 10) -> CriticWorker:
        return CriticWorker(
            config(f"trainer.critic.model.path={model_folder}", "trainer.critic_mini_batch_size=4",
                   "trainer.algorithm.advantage_estimator=gae", f"{OPTIMIZER}.lr=1e-3", *overrides),
            updates,
        )  # fmt: skip

    return worker


def weights(worker: CriticWorker) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in worker.values_model.named_parameters()}


def same(a: dict, b: dict, tolerance: float = 0.0) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=0, atol=tolerance) for name in a)


def ready(worker: CriticWorker, batch):
    """The batch with values, and with returns that are a little away from them."""
    batch.values = worker.values(batch)
    draw = torch.Generator().manual_seed(2)
    batch.returns = torch.where(batch.response_mask, torch.randn(batch.values.shape, generator=draw), 0.0)
    return batch


def by_hand(worker: CriticWorker, batch, folder, mask) -> dict[str, torch.Tensor]:
    """The weights after one update, from the definition: the mean over sequences of their mean squared errors, halved.

    The values are those of the start of the step, so the clip has nothing to do.
    """
    from transformers import AutoModelForCausalLM

    body = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").base_model
    head = worker.values_model.value_head.weight.detach().clone().requires_grad_()  # pyright: ignore
    parameters = [*body.parameters(), head]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, foreach=False)
    total = torch.zeros(())
    for row in range(len(batch)):
        prompt, response = batch.prompt(row), batch.response(row)
        hidden = body(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
        errors = (hidden @ head[0] - batch.returns[row, : len(response)]).square() / 2
        total = total + errors[mask[row, : len(response)]].mean()
    (total / len(batch)).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return {**{f"backbone.{name}": p for name, p in body.named_parameters()}, "value_head.weight": head}


@pytest.mark.parametrize("tokens", ["count", "skip"])
@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("micro", [1, 8])
def test_one_update_is_the_definitions(make, batch, model_folder, packing, micro, tokens) -> None:
    worker = make(
        f"trainer.use_sample_packing={packing}", f"trainer.micro_train_batch_size_per_gpu={micro}",
        f"trainer.algorithm.observation_tokens={tokens}",
    )  # fmt: skip
    batch = ready(worker, batch)
    mask = batch.response_mask if tokens == "count" else batch.loss_mask
    expected = by_hand(worker, batch, model_folder, mask)
    metrics = worker.update(batch)
    assert same(weights(worker), {n: p.detach() for n, p in expected.items()}, 1e-5)
    assert weights(worker).keys() == expected.keys()
    assert metrics["critic/updates"] == 1 and metrics["critic/denominator"] == pytest.approx(mask.sum())
    assert metrics["critic/clip_fraction"] == 0 and metrics["critic/lr"] == 1e-3
    gap = (batch.values - batch.returns).abs()[mask].mean().item()
    assert metrics["critic/error"] == pytest.approx(gap, rel=1e-4)


def test_values_are_of_the_state_before_each_token(make, batch) -> None:
    worker = make()
    values = worker.values(batch)
    assert values.shape == batch.response_ids.shape and values.device.type == "cpu" and not values.requires_grad
    changed = batch.select(range(len(batch)))
    changed.response_ids = changed.response_ids.clone()
    changed.response_ids[:, 2:] = 9
    other = worker.values(changed)
    assert torch.allclose(values[:, :3], other[:, :3], atol=1e-5) and not torch.allclose(values, other, atol=1e-3)


def test_it_learns_the_returns(make, batch) -> None:
    worker = make(f"{OPTIMIZER}.lr=1e-2", updates=60)
    batch = ready(worker, batch)
    errors = []
    for _ in range(60):
        errors.append(worker.update(batch)["critic/error"])
        batch.values = worker.values(batch)
    assert errors[-1] < 0.3 * errors[0]


def test_sequences_left_out_of_the_loss_teach_nothing(make, batch) -> None:
    whole, part = make(), make()
    batch = ready(whole, batch)
    batch.loss_mask[3] = False
    batch.returns[3] = 1000.0
    metrics = whole.update(batch)
    assert metrics["critic/error"] < 100
    batch.returns[3] = 0.0
    assert part.update(batch) == metrics and same(weights(part), weights(whole))
    batch.loss_mask[:] = False
    assert whole.update(batch)["critic/grad_norm"] == 0


def test_mini_batches_and_passes_are_counted(make, batch) -> None:
    worker = make("trainer.critic_mini_batch_size=1", "trainer.update_epochs_per_batch=3")
    metrics = worker.update(ready(worker, batch))
    assert metrics["critic/updates"] == 12 and worker.updater.scheduler.last_epoch == 12


def test_updates_that_are_not_finite_are_skipped_and_then_end_the_run(make, batch) -> None:
    worker = make("trainer.max_skipped_updates=2")
    batch, before = ready(worker, batch), weights(worker)
    batch.returns[0, 0] = float("nan")
    assert worker.update(batch)["critic/skipped_updates_total"] == 1
    assert same(weights(worker), before)
    with pytest.raises(DivergedError, match=r"2 updates in a row.*trainer\.critic\.optimizer_config\.lr"):
        worker.update(batch)


def test_what_was_saved_goes_on_as_if_nothing_had_been(make, batch, tmp_path) -> None:
    more = (f"{OPTIMIZER}.scheduler=cosine", "trainer.critic_mini_batch_size=2", f"{OPTIMIZER}.num_warmup_steps=3")
    worker = make(*more)
    worker.update(ready(worker, batch))
    worker.save(str(tmp_path / "saved"))
    expected = worker.update(batch), weights(worker)
    other = make(*more, "trainer.seed=7")  # whose head starts elsewhere
    assert not same(weights(other), weights(worker))
    other.restore(str(tmp_path / "saved"))
    assert other.update(batch) == expected[0] and same(weights(other), expected[1])


@pytest.mark.parametrize("case", ["absent", "cut", "other"])
def test_a_file_that_cannot_be_used_is_one_error(make, tmp_path, case) -> None:
    worker, file = make(), tmp_path / "__0_0.distcp"
    worker.save(str(tmp_path))
    if case == "absent":
        file.unlink()
    elif case == "cut":
        file.write_bytes(file.read_bytes()[:3000])
    else:
        shards.replace(tmp_path, {name: value[..., :1] for name, value in shards.tensors(tmp_path).items()})
    with pytest.raises(CheckpointError, match=r"not whole|does not fit") as raised:
        worker.restore(str(tmp_path))
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize("reentrant", ["true", "false"])
def test_gradient_checkpointing_changes_memory_alone(make, batch, reentrant) -> None:
    plain = make("trainer.gradient_checkpointing=false")
    other = make(
        "trainer.gradient_checkpointing=true", f"trainer.gradient_checkpointing_use_reentrant={reentrant}"
    )  # fmt: skip
    batch = ready(plain, batch)
    norms = [worker.update(batch)["critic/grad_norm"] for worker in (plain, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0
    assert same(weights(plain), weights(other), 1e-6)
