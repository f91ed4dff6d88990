"""Every policy loss but the PPO clip, worked on paper: values, gradients, who is left out."""

import math

import pytest
import torch

from skyrl_train.algorithms.losses import dual_clip, regular
from skyrl_train.algorithms.losses_bounded import decoupled, dppo, gspo, sapo
from skyrl_train.algorithms.losses_weighted import cispo, cross_entropy, importance_sampling, reinforce, rollout_is
from skyrl_train.algorithms.off_policy import standard as correct
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.algorithm_sections import CispoConfig, DppoConfig, OffPolicyCorrectionConfig, SapoConfig

CONFIG = AlgorithmConfig(eps_clip_low=0.2, eps_clip_high=0.3)
OLD = torch.full((2, 3), -1.0, dtype=torch.float64)
RATIO = torch.tensor([[1.0, 1.5, 0.5], [4.0, 0.5, 1.1]], dtype=torch.float64)
X = OLD + RATIO.log()
ADVANTAGES = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, 5.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])


def run(loss, config=CONFIG, rollout=None, x=X, old=OLD, advantages=ADVANTAGES, mask=MASK):
    """The loss of every token, its gradient, and the metrics as numbers."""
    logprobs = x.clone().requires_grad_()
    result = loss(logprobs, old, advantages, mask, config, rollout)
    (gradient,) = torch.autograd.grad(result.per_token.sum(), logprobs)
    return result.per_token.detach(), gradient, {k: v.item() for k, v in result.metrics.items()}


def matrix(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_dual_clip():
    # as regular: -1, -1.3, -0.5 | 8, 1.6; negative advantages are bounded by -3 A = 6
    loss, gradient, metrics = run(dual_clip)
    torch.testing.assert_close(loss, matrix([[-1, -1.3, -0.5], [6, 1.6, 0]]))
    torch.testing.assert_close(gradient, matrix([[-1, 0, -0.5], [0, 0, 0]]))
    assert metrics["clip_fraction_dual"] == pytest.approx(0.2)
    assert (metrics["clip_fraction_low"], metrics["clip_fraction_high"]) == pytest.approx((0.2, 0.2))
    plain = run(regular)[0]
    assert plain[1, 0] == pytest.approx(8) and torch.equal(plain[0], loss[0])


def test_gspo():
    # log ratios 0, log 1.5, log 0.5: mean log(0.75) / 3, s = 0.75^(1/3) = 0.9086
    # second row: (log 4 + log 0.5) / 2, s = 2^0.5
    first, second = 0.75 ** (1 / 3), 2**0.5
    loss, gradient, metrics = run(gspo)
    # A = 1: inside the bounds, -s. A = -2: s = 1.414 is over 1.3, but the advantage is negative: -min(-2 s, -2.6) = 2 s
    torch.testing.assert_close(loss, matrix([[-first] * 3, [2 * second] * 2 + [0]]))
    torch.testing.assert_close(gradient, matrix([[-first] * 3, [2 * second] * 2 + [0]]))
    assert metrics["ratio_mean"] == pytest.approx((3 * first + 2 * second) / 5)
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0
    # with a positive advantage the second sequence is clipped as a whole
    loss, gradient, metrics = run(gspo, advantages=ADVANTAGES.abs())
    torch.testing.assert_close(loss[1], matrix([-2.6, -2.6, 0]))
    assert (gradient[1] == 0).all() and metrics["clip_fraction_high"] == pytest.approx(0.4)


def test_gspo_before_the_first_update_is_plain_policy_gradient():
    loss, gradient, _ = run(gspo, x=OLD)
    torch.testing.assert_close(loss, torch.where(MASK, -ADVANTAGES, 0.0))
    torch.testing.assert_close(gradient, torch.where(MASK, -ADVANTAGES, 0.0))


def test_sapo():
    config = AlgorithmConfig(sapo=SapoConfig(tau_pos=1.0, tau_neg=2.0))
    loss, gradient, metrics = run(sapo, config)

    def gate(r, tau):
        return 4 / tau / (1 + math.exp(-tau * (r - 1)))

    want = [[-gate(1, 1), -gate(1.5, 1), -gate(0.5, 1)], [2 * gate(4, 2), 2 * gate(0.5, 2), 0]]
    torch.testing.assert_close(loss, matrix(want))
    # d gate / d logp = 4 s (1 - s) r with s the sigmoid; at r = 1 that is 1, so the gradient there is -A
    s = 1 / (1 + math.exp(-2 * 3))
    assert gradient[0, 0] == pytest.approx(-1.0) and gradient[1, 0] == pytest.approx(2 * 4 * s * (1 - s) * 4)
    slopes = [4 * q * (1 - q) for q in (1 / (1 + math.exp(-t)) for t in (0, 0.5, -0.5, 6, -1))]
    assert metrics["gate_mean"] == pytest.approx(sum(slopes) / 5)


def test_sapo_takes_the_negative_temperature_for_no_advantage():
    config = AlgorithmConfig(sapo=SapoConfig(tau_pos=1.0, tau_neg=2.0))
    assert run(sapo, config, x=OLD, advantages=torch.zeros_like(OLD))[2]["gate_mean"] == 1.0


class TestDppo:
    P = math.exp(-1)  # 0.3679, of every token when it was drawn

    def test_total_variation(self):
        # q - p = p (r - 1): 0, 0.184, -0.184 | 1.10, -0.184. With delta 0.15: the second is positive and went up too
        # far; the third went down, which its advantage does not want; the fifth is negative and went down too far.
        config = AlgorithmConfig(dppo=DppoConfig(delta_low=0.15, delta_high=0.15))
        loss, gradient, metrics = run(dppo, config)
        torch.testing.assert_close(loss, matrix([[-1, 0, -0.5], [8, 0, 0]]))
        torch.testing.assert_close(gradient, loss)
        assert (metrics["clip_fraction_low"], metrics["clip_fraction_high"]) == pytest.approx((0.2, 0.2))
        wide = AlgorithmConfig(dppo=DppoConfig(delta_low=0.2, delta_high=0.2))
        torch.testing.assert_close(run(dppo, wide)[0], matrix([[-1, -1.5, -0.5], [8, 1, 0]]))

    def test_binary_kl(self):
        def kl(r):
            p, q = self.P, self.P * r
            return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

        # p = 0.368: to q = 0.552 it is -0.1492 + 0.6321 log(0.6321 / 0.4482) = 0.0682;
        # to q = 0.184 it is 0.2550 - 0.1615 = 0.0936
        assert (kl(1.5), kl(0.5)) == pytest.approx((0.0682, 0.0936), abs=1e-3)
        config = AlgorithmConfig(dppo=DppoConfig(dppo_type="binary_kl", delta_low=0.2, delta_high=kl(1.5) - 1e-4))
        x = OLD + matrix([[1.0, 1.5, 0.5], [2.0, 0.5, 1.0]]).log()
        loss = run(dppo, config, x=x)[0]
        torch.testing.assert_close(loss, matrix([[-1, 0, -0.5], [4, 1, 0]]))
        config = AlgorithmConfig(dppo=DppoConfig(dppo_type="binary_kl", delta_low=kl(0.5) - 1e-4, delta_high=0.2))
        torch.testing.assert_close(run(dppo, config, x=x)[0], matrix([[-1, -1.5, -0.5], [4, 0, 0]]))

    def test_relative_to_the_engine_where_it_is_given(self):
        loss = run(dppo, AlgorithmConfig(), rollout=X)[0]
        torch.testing.assert_close(loss, torch.where(MASK, -ADVANTAGES, 0.0))


def test_decoupled():
    # the engine drew with half the probability: behaviour weight 2 on the loss of regular
    loss, gradient, metrics = run(decoupled, rollout=OLD - math.log(2))
    torch.testing.assert_close(loss, 2 * run(regular)[0])
    torch.testing.assert_close(gradient, 2 * run(regular)[1])
    assert (metrics["behaviour_weight_mean"], metrics["behaviour_weight_max"]) == pytest.approx((2, 2))


def test_decoupled_is_token_tis_without_a_cap():
    rollout = OLD + 0.3 * torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    section = OffPolicyCorrectionConfig(tis_ratio_type="token", token_tis_ratio_clip_high=1e9)
    weights = correct(OLD, rollout, MASK, AlgorithmConfig(off_policy_correction=section)).weights
    torch.testing.assert_close(run(decoupled, rollout=rollout)[0], run(regular)[0] * weights)


def test_cispo():
    config = AlgorithmConfig(cispo=CispoConfig(cispo_eps_clip_low=0.4, cispo_eps_clip_high=0.3))
    loss, gradient, metrics = run(cispo, config)
    weight = matrix([[1, 1.3, 0.6], [1.3, 0.6, 0]])  # the ratio within 0.6 and 1.3
    torch.testing.assert_close(loss, torch.where(MASK, -weight * ADVANTAGES * X, 0.0))
    torch.testing.assert_close(gradient, torch.where(MASK, -weight * ADVANTAGES, 0.0))  # every token keeps one
    assert (metrics["clip_fraction_low"], metrics["clip_fraction_high"]) == pytest.approx((0.4, 0.4))


def test_cispo_has_no_lower_bound_by_default():
    gradient = run(cispo, AlgorithmConfig())[1]
    torch.testing.assert_close(gradient, torch.where(MASK, -RATIO * ADVANTAGES, 0.0))


def test_cispo_relative_to_the_engine():
    anchored = AlgorithmConfig(cispo=CispoConfig(cispo_anchor="rollout"))
    assert torch.equal(run(cispo, anchored, rollout=X)[1], torch.where(MASK, -ADVANTAGES, 0.0))


def test_rollout_is():
    # relative to the engine, which here is the old policy: inside (0.8, 1.3) is the first token alone
    loss, gradient, metrics = run(rollout_is, rollout=OLD)
    torch.testing.assert_close(loss, matrix([[1.0, 0, 0], [0, 0, 0]]))  # -1 * 1 * -1
    torch.testing.assert_close(gradient, matrix([[-1.0, 0, 0], [0, 0, 0]]))
    assert (metrics["clip_fraction_low"], metrics["clip_fraction_high"]) == pytest.approx((0.4, 0.4))


def test_importance_sampling():
    loss, gradient, metrics = run(importance_sampling)
    torch.testing.assert_close(loss, torch.where(MASK, -RATIO * ADVANTAGES, 0.0))
    torch.testing.assert_close(gradient, loss)
    assert metrics["ratio_mean"] == pytest.approx((1 + 1.5 + 0.5 + 4 + 0.5) / 5)
    assert (metrics["ratio_min"], metrics["ratio_max"]) == pytest.approx((0.5, 4))


def test_reinforce():
    loss, gradient, _ = run(reinforce)
    torch.testing.assert_close(loss, torch.where(MASK, -ADVANTAGES * X, 0.0))
    torch.testing.assert_close(gradient, torch.where(MASK, -ADVANTAGES, 0.0))


def test_cross_entropy():
    loss, gradient, _ = run(cross_entropy, advantages=torch.full_like(X, float("nan")))
    torch.testing.assert_close(loss, torch.where(MASK, -X, 0.0))
    torch.testing.assert_close(gradient, torch.where(MASK, -1.0, 0.0).double())


@pytest.mark.parametrize("loss", [dual_clip, gspo, sapo, dppo, cispo, importance_sampling, rollout_is, decoupled])
def test_a_huge_ratio_stays_finite(loss):
    x = torch.zeros(1, 2)
    old = torch.tensor([[-500.0, 500.0]])
    result, gradient, _ = run(loss, x=x, old=old, rollout=old, advantages=torch.tensor([[-1.0, 1.0]]),
                              mask=torch.ones(1, 2, dtype=torch.bool))  # fmt: skip
    assert torch.isfinite(result).all() and torch.isfinite(gradient).all()
