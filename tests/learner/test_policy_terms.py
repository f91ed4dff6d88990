"""What a config adds to an update: every loss in the real worker, corrections, the KL coefficient, reductions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skyrl_train.config.algorithm import LOSSES, REDUCTIONS
from skyrl_train.learner import policy_worker
from skyrl_train.learner.policy_worker import PolicyWorker

ALGORITHM = "trainer.algorithm"
BUSY = (
    f"{ALGORITHM}.eps_clip_low=0.05", f"{ALGORITHM}.eps_clip_high=0.05", f"{ALGORITHM}.clip_cov.clip_ratio=0.2",
    f"{ALGORITHM}.clip_cov.clip_cov_lb=-0.5", f"{ALGORITHM}.clip_cov.clip_cov_ub=5.0",
    f"{ALGORITHM}.kl_cov.kl_cov_frac=0.3", f"{ALGORITHM}.dppo.delta_low=0.01", f"{ALGORITHM}.dppo.delta_high=0.01",
    f"{ALGORITHM}.max_seq_len=30",
)  # fmt: skip
"""Settings under which every loss and reduction does something to the batch of these tests."""


def weights(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in worker.model.named_parameters()}


def gap(a: dict, b: dict) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


def drifted(worker: PolicyWorker, batch, *, by: float = 0.2):
    """The batch as it is after some updates: the policy has moved away from the old log-probs and from the engine's."""
    draw = torch.Generator().manual_seed(8)
    now = worker.logprobs(batch)
    for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs"):
        noise = by * torch.randn(now.shape, generator=draw)
        setattr(batch, name, torch.where(batch.response_mask, (now + noise).clamp(max=-1e-4), 0.0))
    return batch


def by_sgd(config) -> PolicyWorker:
    """A worker whose step is its gradient: the first step of AdamW hides how large it is."""
    worker = PolicyWorker(config, 10)
    worker.updater.optimizer = torch.optim.SGD(worker.updater.parameters, lr=1.0)
    worker.updater.scheduler = torch.optim.lr_scheduler.LambdaLR(worker.updater.optimizer, lambda _: 1.0)
    return worker


def after(config, batch, *overrides: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights and metrics after one update."""
    worker = by_sgd(config(*BUSY, *overrides))
    metrics = worker.update(drifted(worker, batch))
    return weights(worker), metrics


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_and_rows_left_out_do_not_show(config, batch, monkeypatch, loss) -> None:
    choice = f"{ALGORITHM}.policy_loss_type={loss}"
    start = weights(PolicyWorker(config(), 10))
    whole, metrics = after(config, batch, choice, "trainer.micro_train_batch_size_per_gpu=8")
    cut, others = after(config, batch, choice, "trainer.micro_train_batch_size_per_gpu=3")
    monkeypatch.setattr(policy_worker, "SILENT", frozenset())  # rows of zero advantage are computed as well
    every, _ = after(config, batch, choice, "trainer.micro_train_batch_size_per_gpu=1")
    assert gap(whole, start) > 1e-3
    assert gap(whole, cut) < 1e-6 and gap(whole, every) < 1e-6
    assert metrics.keys() == others.keys()
    assert metrics == pytest.approx(others, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("reduction", [name for name in REDUCTIONS if name != "token_mean_legacy"])
def test_no_reduction_depends_on_micro_batches(config, batch, reduction) -> None:
    choice = f"{ALGORITHM}.loss_reduction={reduction}"
    whole = after(config, batch, choice, "trainer.micro_train_batch_size_per_gpu=8")[0]
    assert gap(whole, after(config, batch, choice, "trainer.micro_train_batch_size_per_gpu=3")[0]) < 1e-6


def test_but_the_legacy_one(config, batch) -> None:
    """The mean over micro-batches of their token means: of one row each, that is the mean over sequences."""
    legacy, mean = f"{ALGORITHM}.loss_reduction=token_mean_legacy", f"{ALGORITHM}.loss_reduction=token_mean"
    ones, eight = "trainer.micro_train_batch_size_per_gpu=1", "trainer.micro_train_batch_size_per_gpu=8"
    by_sequence = after(config, batch, f"{ALGORITHM}.loss_reduction=sequence_mean", eight)[0]
    assert gap(after(config, batch, legacy, ones)[0], by_sequence) < 1e-6
    assert gap(after(config, batch, legacy, eight)[0], after(config, batch, mean, eight)[0]) < 1e-6
    assert gap(after(config, batch, legacy, eight)[0], by_sequence) > 1e-4


def test_a_correction_weighs_the_policys_loss_alone(config, batch) -> None:
    """A factor of 0 leaves the KL term; 2 doubles the step; the denominator still counts every token."""
    start = weights(PolicyWorker(config(), 10))
    clip = "trainer.policy.optimizer_config.max_grad_norm=1e9"
    plain, metrics = after(config, batch, clip)
    batch.correction = torch.full_like(batch.rollout_logprobs, 2.0)
    double, doubled = after(config, batch, clip)
    moved = {name: 2 * plain[name] - start[name] for name in start}
    assert gap(double, moved) < 1e-5
    assert doubled["policy/denominator"] == metrics["policy/denominator"]
    batch.correction = torch.zeros_like(batch.rollout_logprobs)
    kl = (clip, f"{ALGORITHM}.use_kl_loss=true", f"{ALGORITHM}.kl_loss_coef=0.3")
    still = after(config, batch, clip)[0]
    assert gap(still, start) == 0
    pulled = after(config, batch, *kl)[0]
    batch.advantages, batch.correction = torch.zeros_like(batch.advantages), None
    assert gap(pulled, start) > 1e-4 and gap(after(config, batch, *kl)[0], pulled) < 1e-6


def test_the_kl_coefficient_of_the_step_goes_before_the_configs(config, batch) -> None:
    settings = (f"{ALGORITHM}.use_kl_loss=true", f"{ALGORITHM}.kl_loss_coef=0.5")
    expected = after(config, batch, *settings)[0]
    worker = by_sgd(config(*BUSY, settings[0], f"{ALGORITHM}.kl_loss_coef=0.001"))
    worker.update(drifted(worker, batch), kl_coef=0.5)
    assert gap(weights(worker), expected) == 0
    worker.update(batch)
    assert worker.kl_coef == 0.001  # not remembered


def test_users_functions_are_found_in_the_worker(config, batch, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_functions.py").write_text(
        "import torch\n"
        "from skyrl_train.algorithms.losses import PolicyLoss\n"
        "def minus(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):\n"
        "    return PolicyLoss(per_token=torch.where(mask, -advantages * logprobs, 0.0))\n"
        "def sums(mask, group, config):\n"
        "    return mask.float() / 7\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    clip = "trainer.policy.optimizer_config.max_grad_norm=1e9"
    loss, reduction = (f"{ALGORITHM}.{key}=my_functions:" for key in ("policy_loss_type", "loss_reduction"))
    mine, metrics = after(config, batch, f"{loss}minus", f"{reduction}sums", clip)
    plain, _ = after(config, batch, f"{ALGORITHM}.policy_loss_type=reinforce", clip)
    start, tokens = weights(PolicyWorker(config(), 10)), int(batch.loss_mask.sum())
    assert metrics["policy/denominator"] == pytest.approx(7.0)
    # the same sum over tokens, divided by 7 instead of by their number
    assert gap(mine, {name: start[name] + (plain[name] - start[name]) * tokens / 7 for name in start}) < 1e-5
    assert gap(mine, start) > 1e-3


@pytest.mark.parametrize(
    "sampling", ["top_p=0.8", "top_k=9", "min_p=0.05", "repetition_penalty=1.2", "logit_bias={7:2.0}"]
)
@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_ratio_is_one_under_the_distribution_that_was_sampled(config, batch, sampling, packing) -> None:
    made = config(f"generator.sampling_params.{sampling}", f"trainer.use_sample_packing={packing}")
    worker = PolicyWorker(made, 10)
    batch.old_logprobs = worker.logprobs(batch)
    both = worker.both_logprobs(batch)
    assert both.shape == (len(batch), 2, batch.response_ids.shape[1])
    assert torch.equal(both[:, 0], batch.old_logprobs)
    plain = PolicyWorker(config(f"trainer.use_sample_packing={packing}"), 10).logprobs(batch)
    torch.testing.assert_close(both[:, 1], plain, rtol=0, atol=1e-5)
    assert (both[:, 0] - plain).abs().max() > 0.05
    assert worker.update(batch)["policy/ratio_gap_first"] < 1e-5
