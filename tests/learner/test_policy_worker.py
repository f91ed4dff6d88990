"""The worker that learns, against plain PyTorch; and what it writes and takes back."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import shards
import torch

from skyrl_train.errors import CheckpointError, DivergedError
from skyrl_train.learner.policy_worker import PolicyWorker


def make(config, *overrides: str, updates: int = 10) -> PolicyWorker:
    return PolicyWorker(config(*overrides), updates)


def weights(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in worker.model.named_parameters()}


def same(a: dict, b: dict, tolerance: float = 0.0) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=0, atol=tolerance) for name in a)


def scored(worker: PolicyWorker, batch):
    batch.old_logprobs = worker.logprobs(batch)
    return batch


def by_hand(config, batch, *, reference=None, kl: float = 0.0, entropy: float = 0.0) -> dict[str, torch.Tensor]:
    """The weights after one update, from the definition, a row at a time, padding and shortcuts nowhere.

    The ratio is 1, so the gradient of the PPO loss is that of ``-sum A log p / N``.
    """
    from transformers import AutoModelForCausalLM

    settings = config().trainer.policy
    model = AutoModelForCausalLM.from_pretrained(settings.model.path, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, foreach=False)
    total, tokens = torch.zeros(()), int(batch.loss_mask.sum())
    for row in range(len(batch)):
        prompt, response = batch.prompt(row), batch.response(row)
        every = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        for place, token in enumerate(response):
            if not batch.loss_mask[row, place]:
                continue
            distribution = every[len(prompt) + place - 1]
            total = total - batch.advantages[row, place] * distribution[token]
            total = total + entropy * (distribution.exp() * distribution).sum()
            if reference is not None:
                d = reference[row, place] - distribution[token]
                total = total + kl * (d.exp() - d - 1)
    (total / tokens).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return dict(model.named_parameters())


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("micro", [1, 2, 8])
def test_one_update_is_the_definitions(config, batch, packing, micro) -> None:
    """Rows without advantage are not computed, and micro-batches cut groups: neither shows."""
    worker = make(config, f"trainer.use_sample_packing={packing}", f"trainer.micro_train_batch_size_per_gpu={micro}")
    metrics = worker.update(scored(worker, batch))
    assert same(weights(worker), by_hand(config, batch), 1e-5)
    assert metrics["policy/updates"] == 1 and metrics["policy/denominator"] == batch.loss_mask.sum()
    assert metrics["policy/ratio_gap_first"] < 1e-5 and metrics["policy/lr"] == 1e-3


def test_kl_and_entropy_terms_are_the_definitions(config, batch) -> None:
    more = ("trainer.algorithm.use_kl_loss=true", "trainer.algorithm.kl_loss_coef=0.7",
            "trainer.algorithm.use_entropy_loss=true", "trainer.algorithm.entropy_loss_coef=0.3")  # fmt: skip
    worker = make(config, *more)
    scored(worker, batch)
    shift = 0.4 * torch.randn(batch.old_logprobs.shape, generator=torch.Generator().manual_seed(0))
    batch.ref_logprobs = torch.where(batch.response_mask, batch.old_logprobs + shift, 0.0)
    metrics = worker.update(batch)
    expected = by_hand(config, batch, reference=batch.ref_logprobs, kl=0.7, entropy=0.3)
    assert same(weights(worker), expected, 1e-5)
    assert metrics["policy/kl_loss"] > 0 and metrics["policy/entropy"] > 0


def test_zero_advantages_move_nothing_but_the_decay(config, batch) -> None:
    worker = make(config, "trainer.policy.optimizer_config.weight_decay=0")
    before = weights(worker)
    batch.advantages = torch.zeros_like(batch.advantages)
    metrics = worker.update(scored(worker, batch))
    assert metrics["policy/grad_norm"] == 0 and metrics["policy/updates"] == 1
    assert same(weights(worker), before)


def test_mini_batches_and_passes_are_counted(config, batch) -> None:
    more = ("trainer.policy_mini_batch_size=1", "trainer.update_epochs_per_batch=3")
    worker = make(config, *more)
    metrics = worker.update(scored(worker, batch))
    assert metrics["policy/updates"] == 12 and worker.updater.scheduler.last_epoch == 12
    assert metrics["policy/ratio_gap_first"] < 1e-5 < metrics["policy/ratio_gap"]


def test_gradients_are_clipped_and_told_as_they_were(config, batch) -> None:
    worker = make(config, "trainer.policy.optimizer_config.max_grad_norm=1e-3")
    seen = []
    worker.updater.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in worker.updater.parameters]).norm().item())
    )
    norm = worker.update(scored(worker, batch))["policy/grad_norm"]
    assert norm > 1e-2 and seen == [pytest.approx(1e-3, rel=1e-3)]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_update_is_the_same_to_the_bit(config, batch, threads) -> None:
    found = []
    for _ in range(3):
        worker = make(config, f"trainer.num_threads={threads}", "trainer.policy_mini_batch_size=2")
        metrics = worker.update(scored(worker, batch))
        found.append((weights(worker), metrics))
    assert all(same(w, found[0][0]) and m == found[0][1] for w, m in found)


def test_an_update_that_is_not_finite_leaves_everything_as_it_was(config, batch) -> None:
    worker = make(config, "trainer.max_skipped_updates=3", "trainer.policy.optimizer_config.num_warmup_steps=5")
    good, old = batch.advantages.clone(), scored(worker, batch).old_logprobs.clone()
    worker.update(batch)
    before, rate = weights(worker), worker.updater.scheduler.get_last_lr()
    moments = {i: s["exp_avg"].clone() for i, s in enumerate(worker.updater.optimizer.state.values())}
    batch.advantages[0, 0] = float("nan")
    metrics = [worker.update(batch), worker.update(batch)]
    assert [m["policy/skipped_updates_total"] for m in metrics] == [1, 2]
    assert same(weights(worker), before) and worker.updater.scheduler.get_last_lr() == rate
    assert all(torch.equal(s["exp_avg"], moments[i]) for i, s in enumerate(worker.updater.optimizer.state.values()))
    assert not worker.model.training and all(p.grad is None for p in worker.updater.parameters)
    batch.advantages, batch.old_logprobs = good, old
    assert worker.update(batch)["policy/skipped_updates_total"] == 2
    assert not same(weights(worker), before)
    batch.advantages = torch.full_like(good, float("inf"))
    worker.update(batch)
    worker.update(batch)
    with pytest.raises(DivergedError, match="3 updates in a row"):
        worker.update(batch)


def test_what_was_saved_goes_on_as_if_nothing_had_been(config, batch, tmp_path) -> None:
    more = ("trainer.policy.optimizer_config.scheduler=cosine", "trainer.policy_mini_batch_size=2",
            "trainer.policy.optimizer_config.num_warmup_steps=3")  # fmt: skip
    worker = make(config, *more)
    worker.update(scored(worker, batch))
    worker.save(str(tmp_path / "saved"))
    drawn = torch.rand(3)
    expected = worker.update(scored(worker, batch)), weights(worker)
    other = make(config, *more)
    other.restore(str(tmp_path / "saved"))
    assert torch.equal(torch.rand(3), drawn)
    assert other.updater.scheduler.last_epoch == 2
    assert other.update(scored(other, batch)) == expected[0] and same(weights(other), expected[1])


def test_settings_of_the_optimizer_are_the_configs(config, batch, tmp_path) -> None:
    """After a divergence a user lowers the rate and goes on: what was saved must not bring the old one back."""
    section = "trainer.policy.optimizer_config"
    worker = make(config, f"{section}.scheduler=linear", updates=4)
    worker.update(scored(worker, batch))
    worker.save(str(tmp_path / "saved"))
    changed = (f"{section}.lr=1e-5", f"{section}.weight_decay=0.3", f"{section}.adam_betas=[0.5,0.6]",
               f"{section}.scheduler=linear")  # fmt: skip
    other = make(config, *changed, updates=8)
    other.restore(str(tmp_path / "saved"))
    (group,) = other.updater.optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.6), 0.3)
    assert other.update(scored(other, batch))["policy/lr"] == pytest.approx(1e-5 * 7 / 8)
    assert other.updater.scheduler.get_last_lr() == [pytest.approx(1e-5 * 6 / 8)]
    state = next(iter(other.updater.optimizer.state.values()))
    assert state["step"] == 2  # the moments were taken back


def test_counts_of_skipped_updates_are_kept(config, batch, tmp_path) -> None:
    worker = make(config)
    scored(worker, batch).advantages[:] = float("nan")
    worker.update(batch)
    worker.save(str(tmp_path / "saved"))
    other = make(config)
    other.restore(str(tmp_path / "saved"))
    assert (other.updater.guard.in_a_row, other.updater.guard.total) == (1, 1)


def lacks(name):
    def change(file):
        state = json.loads(file.read_text())
        del state[name]
        file.write_text(json.dumps(state))

    return change


def traversing(file):
    """A pickle that asks an honest module for what that has imported."""
    file.write_bytes(b"ctorch.distributed.checkpoint.filesystem\nos.system\n(S'echo run'\ntR.")
    harmless = pickle.dumps(0, protocol=4)[:2]  # from this protocol on, dots in a name are followed
    file.write_bytes(
        harmless + b"\x8c\x28torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93\x8c\x08echo run\x85R."
    )


def harmful(file):
    """A pickle that would run code."""

    class Run:
        def __reduce__(self):
            return print, ("run",)

    file.write_bytes(pickle.dumps(Run(), protocol=2))


METADATA, TENSORS, FACTS = ".metadata", "__0_0.distcp", "state.json"
BROKEN = {
    "absent": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("weights"),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "binary": lambda file: file.write_bytes(b"\xff\xfe\x00"),
}
CASES = [
    *((name, change) for name in (METADATA, TENSORS, FACTS) for change in BROKEN.values()),
    (METADATA, harmful), (METADATA, traversing), (METADATA, lambda file: file.write_bytes(pickle.dumps([1]))),
    *((FACTS, lacks(name)) for name in ("scheduled", "guard", "facts")),
    (FACTS, lambda file: file.write_text("[1]")),
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(model_folder, tmp_path_factory):
    """A checkpoint's folder."""
    from skyrl_train.config.door import load_config

    folder = tmp_path_factory.mktemp("saved")
    overrides = [f"trainer.policy.model.path={model_folder}", "trainer.num_threads=1"]
    PolicyWorker(load_config(overrides), 10).save(str(folder))
    return folder


def test_files_that_cannot_be_used_are_one_error(config, saved, tmp_path, capfd) -> None:
    worker = make(config)
    for number, (name, change) in enumerate(CASES):
        folder = tmp_path / f"copy{number}"
        shutil.copytree(saved, folder)
        change(folder / name)
        with pytest.raises(CheckpointError, match=f"copy{number}.*not whole") as raised:
            worker.restore(str(folder))
        assert len(str(raised.value)) < 700
    assert "run" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["rng.0.cpu", "model.model.norm.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(config, saved, tmp_path, name) -> None:
    state = shards.tensors(saved)
    del state[name]
    shutil.copytree(saved, tmp_path / "copy")
    shards.replace(tmp_path / "copy", state)
    with pytest.raises(CheckpointError, match=r"not whole|does not fit"):
        make(config).restore(str(tmp_path / "copy"))


def test_another_models_file_is_refused(config, saved, tmp_path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    shards.replace(tmp_path / "copy", {name: value[..., :1] for name, value in shards.tensors(saved).items()})
    with pytest.raises(CheckpointError, match="does not fit the model"):
        make(config).restore(str(tmp_path / "copy"))
