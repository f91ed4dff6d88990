"""The invariants: worked numbers, a breach for each, the three modes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import exp

import pytest
import torch

from skyrl_train.batch import TrainBatch, collate
from skyrl_train.config.trainer import InvariantsConfig
from skyrl_train.errors import InvariantError
from skyrl_train.invariants import Invariants, mismatch_metrics
from skyrl_train.types import Trajectory


@pytest.fixture
def batch(trajectory: Callable[..., Trajectory]) -> TrainBatch:
    """Three sampled tokens at -0.5; the padding after the short one is not looked at."""
    return collate([trajectory("a/0", ids=[3, 4]), trajectory("b/0", ids=[5])], 0)


def checks(**changes: object) -> Invariants:
    settings = {"mode": "stop", "logprob_gap": 0.2, "ratio_tolerance": 0.01, "kl_tolerance": 0.01}
    return Invariants(InvariantsConfig(**(settings | changes)))  # type: ignore[arg-type]


def test_the_mismatch_of_engine_and_learner_worked_out(batch: TrainBatch) -> None:
    learner = torch.tensor([[-0.4, -0.7], [-0.5, 99.0]])  # differences 0.1, -0.2, 0; the 99 is padding
    checks().engine_agrees(batch, learner, step=1)
    metrics = mismatch_metrics(learner, batch)
    assert metrics["mismatch/mean"] == pytest.approx(0.1)
    assert metrics["mismatch/max"] == pytest.approx(0.2)
    k3 = ((exp(0.1) - 1 - 0.1) + (exp(-0.2) - 1 + 0.2) + 0) / 3
    assert metrics["mismatch/kl"] == pytest.approx(k3, rel=1e-4)
    # the sequences are off by 0.1 - 0.2 and by 0
    assert metrics["mismatch/sequence_max"] == pytest.approx(0.1, rel=1e-4)
    assert metrics["mismatch/sequence_ratio_mean"] == pytest.approx((exp(-0.1) + 1) / 2)


@pytest.mark.parametrize("wrong", [-0.9, float("nan"), float("-inf")])
def test_an_engine_that_disagrees_stops_the_run_and_says_where_to_look(batch: TrainBatch, wrong: float) -> None:
    learner = torch.full((2, 2), wrong)
    with pytest.raises(InvariantError, match=r"step 7.*logprob_gap=0\.2.*stale weights.*chat template") as raised:
        checks().engine_agrees(batch, learner, step=7)
    assert "trainer.invariants.mode=warn" in str(raised.value)


def test_a_batch_in_which_nothing_is_trained_has_no_mismatch(batch: TrainBatch) -> None:
    batch.loss_mask[:] = False
    checks().engine_agrees(batch, torch.full((2, 2), 99.0), 1)
    assert mismatch_metrics(torch.zeros(2, 2), batch) == {}


@pytest.mark.parametrize(("gap", "breach"), [(0.0, False), (0.01, False), (0.011, True), (float("nan"), True)])
def test_ratios_before_the_first_update_are_one(gap: float, breach: bool) -> None:
    metrics = {"policy/ratio_gap_first": gap}
    if not breach:
        return checks().ratio_is_one(metrics, 3)
    with pytest.raises(InvariantError, match=r"step 3.*ratio differs from 1.*ratio_tolerance=0\.01.*dropout"):
        checks().ratio_is_one(metrics, 3)


def test_the_reference_is_the_policy_before_anything_is_learned(batch: TrainBatch) -> None:
    batch.old_logprobs = torch.full((2, 2), -1.0)
    batch.ref_logprobs = torch.tensor([[-1.0, -1.0], [-1.0, 55.0]])
    checks().reference_is_policy(batch, 1)
    batch.ref_logprobs = torch.tensor([[-1.3, -1.0], [-1.0, -1.0]])  # 0.1 on average
    with pytest.raises(InvariantError, match=r"differ by 0\.1 nats.*kl_tolerance=0\.01"):
        checks().reference_is_policy(batch, 1)


def test_warn_logs_and_goes_on_and_off_says_nothing(
    batch: TrainBatch, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("skyrl"), "propagate", True)  # another test may have set logging up
    bad = torch.full((2, 2), -2.5)
    with caplog.at_level(logging.WARNING, logger="skyrl.invariants"):
        checks(mode="warn").engine_agrees(batch, bad, 1)
        assert "differ by 2 nats" in caplog.text and "stale weights" in caplog.text
        caplog.clear()
        checks(mode="off").engine_agrees(batch, bad, 1)
        assert caplog.text == ""
