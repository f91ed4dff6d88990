"""Clip-Cov and KL-Cov: which tokens are chosen, and what is done to them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.losses import PolicyLoss, regular
from skyrl_train.algorithms.losses_covariance import (
    choose_clip_cov,
    choose_kl_cov,
    chooser_of,
    clip_cov,
    kl_cov,
    whole_batch,
)
from skyrl_train.algorithms.table import resolve
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.algorithm_sections import ClipCovConfig, KLCovConfig

from .helpers import random_case

OLD = torch.full((2, 3), -1.0, dtype=torch.float64)
X = torch.tensor([[-1.0, -0.9, -1.1], [-2.0, -1.0, 5.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[1.0, 2.0, -1.0], [-3.0, 1.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
# On paper: mean log-prob -1.2, mean advantage 0. Covariances A (x + 1.2):
#   0.2, 0.6, -0.1 | 2.4, 0.2
# Ratios exp(x + 1): 1, 1.105, 0.905 | 0.368, 1; the fourth is under 0.8 with a negative advantage: clipped anyway.


def clip_config(share: float, low: float, high: float) -> AlgorithmConfig:
    return AlgorithmConfig(clip_cov=ClipCovConfig(clip_ratio=share, clip_cov_lb=low, clip_cov_ub=high))


@pytest.mark.parametrize(
    ("share", "low", "high", "candidates", "count"),
    [
        (1.0, 0.15, 5.0, [0, 1, 4], 3),  # 2.4 is clipped anyway, -0.1 is under the bound
        (1.0, 0.25, 5.0, [1], 1),
        (1.0, 0.15, 0.5, [0, 4], 2),
        (0.4, 0.15, 5.0, [0, 1, 4], 2),  # 0.4 of five tokens
        (0.0, 0.15, 5.0, [0, 1, 4], 1),  # at least one
        (1.0, 3.0, 5.0, [], 0),
    ],
)
def test_which_tokens_clip_cov_leaves_out(share, low, high, candidates, count):
    chosen = choose_clip_cov(X, OLD, ADVANTAGES, MASK, clip_config(share, low, high)).flatten().nonzero()[:, 0].tolist()
    assert set(chosen) <= set(candidates) and len(chosen) == count


def test_clip_cov_is_regular_without_them():
    config = clip_config(1.0, 0.25, 5.0)
    x = X.clone().requires_grad_()
    result, plain = clip_cov(x, OLD, ADVANTAGES, MASK, config), regular(X, OLD, ADVANTAGES, MASK, config)
    want = plain.per_token.clone()
    want[0, 1] = 0
    torch.testing.assert_close(result.per_token.detach(), want)
    result.per_token.sum().backward()
    assert x.grad is not None and x.grad[0, 1] == 0 and x.grad[0, 0] == -1
    assert result.metrics["chosen_fraction"].item() == pytest.approx(0.2)


def test_the_draw_is_even():
    """Of 400 tokens of equal standing, a quarter: about a quarter of each half, whatever the rows' places."""
    draw = torch.Generator().manual_seed(0)
    x = -torch.rand(20, 20, generator=draw, dtype=torch.float64)
    mask, config = torch.ones(20, 20, dtype=torch.bool), clip_config(0.25, -9.0, 9.0)
    chosen = choose_clip_cov(x, x, torch.randn(20, 20, generator=draw), mask, config)
    assert chosen.sum() == 100
    for half in (chosen[:10], chosen[:, :10], chosen[::2], chosen[x > x.median()]):
        assert 30 <= half.sum() <= 70


@pytest.mark.parametrize(("share", "want"), [(0.2, [3]), (0.4, [1, 3]), (0.0, [3]), (0.85, [0, 1, 3, 4])])
def test_which_tokens_kl_cov_holds(share, want):
    chosen = choose_kl_cov(X, OLD, ADVANTAGES, MASK, AlgorithmConfig(kl_cov=KLCovConfig(kl_cov_frac=share)))
    assert chosen.flatten().nonzero()[:, 0].tolist() == want


def test_kl_cov_adds_a_distance_to_them():
    config = AlgorithmConfig(kl_cov=KLCovConfig(kl_cov_frac=0.2, ppo_kl_coef=0.5))
    x = X.clone().requires_grad_()
    result = kl_cov(x, OLD, ADVANTAGES, MASK, config)
    ratio = (X - OLD).exp()
    want = torch.where(MASK, -ratio * ADVANTAGES, 0.0)
    want[1, 0] += 0.5 * 1.0  # |x - old| = 1
    torch.testing.assert_close(result.per_token.detach(), want)
    (gradient,) = torch.autograd.grad(result.per_token.sum(), x)
    assert gradient[1, 0] == pytest.approx(3 * math.exp(-1) - 0.5)
    assert "clip_fraction_low" not in result.metrics


@pytest.mark.parametrize("chooser", [choose_clip_cov, choose_kl_cov])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_among_equals_places_do_not_decide(chooser, seed):
    """Tokens of exactly equal covariance: the choice moves with the rows."""
    case = random_case(seed)
    advantages = torch.where(case["advantages"] > 0, 1.0, -1.0)
    x = -torch.rand(case["old_logprobs"].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    config = AlgorithmConfig(
        clip_cov=ClipCovConfig(clip_ratio=0.3, clip_cov_lb=-9.0, clip_cov_ub=9.0), kl_cov=KLCovConfig(kl_cov_frac=0.3),
        eps_clip_low=0.99, eps_clip_high=99.0,
    )  # fmt: skip
    flat = torch.full_like(x, -1.0)  # every covariance is 0
    for logprobs in (x, flat):
        want = chooser(logprobs, x, advantages, case["mask"], config)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        got = chooser(logprobs[order], x[order], advantages[order], case["mask"][order], config)
        assert torch.equal(got, want[order]) and not (want & ~case["mask"]).any()


def test_a_given_choice_is_taken():
    config, chosen = AlgorithmConfig(), torch.tensor([[True, False, False], [False, False, True]])
    result = clip_cov(X, OLD, ADVANTAGES, MASK, config, None, chosen)
    assert result.per_token[0, 0] == 0 and result.per_token[0, 1] != 0
    assert result.metrics["chosen_fraction"].item() == pytest.approx(0.2)  # the masked one does not count


def test_a_loss_of_ones_own_may_have_a_chooser():
    def chooser(logprobs, old_logprobs, advantages, mask, config):
        return advantages > 0

    @whole_batch(chooser)
    def mine(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None, chosen=None):
        return PolicyLoss(per_token=torch.where(chosen, -logprobs, 0.0))

    assert chooser_of(mine) is chooser and chooser_of(regular) is None
    assert chooser_of(resolve("policy_loss", "skyrl_train.algorithms.losses_covariance:kl_cov")) is choose_kl_cov
