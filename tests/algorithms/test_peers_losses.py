"""Losses, KL, corrections and reductions at the numbers that the test suites of SkyRL, verl, TRL and OpenRLHF use.

Inputs and results are theirs; where a suite compares with a formula only, the working is written here. Where we differ
on purpose, the test says so, and ``docs/algorithms.md`` why.
"""

import math

import pytest
import torch

from skyrl_train.algorithms.cases import Subject, tensor_of
from skyrl_train.algorithms.off_policy import standard as correct
from skyrl_train.algorithms.reductions import token_weights, weighted_sum
from skyrl_train.algorithms.table import resolve
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.algorithm_sections import (
    CispoConfig,
    ClipCovConfig,
    DppoConfig,
    KLCovConfig,
    OffPolicyCorrectionConfig,
    SapoConfig,
)

from .helpers import named


def run(name, logprobs, old, advantages, mask=None, rollout=None, **settings):
    """Sum of a policy loss, and its metrics."""
    x, old, a = (torch.tensor(rows, dtype=torch.float64) for rows in (logprobs, old, advantages))
    given = torch.ones_like(x).bool() if mask is None else torch.tensor(mask).bool()
    then = None if rollout is None else torch.tensor(rollout, dtype=torch.float64)
    result = resolve("policy_loss", name)(x, old, a, given, AlgorithmConfig(**settings), then)
    return result.per_token.sum().item(), {key: value.item() for key, value in result.metrics.items()}


class TestSkyRLLosses:
    """tests/train/algorithms/test_losses.py"""

    NEW, OLD, ADVANTAGES = [[-1.69315, -1.0, -0.69741]], [[-1.0, -1.0, -3.0]], [[1.0, -1.0, -4.0]]
    # ratios 0.5, 1, 10

    def test_dual_clip(self):
        assert run("dual_clip", self.NEW, self.OLD, self.ADVANTAGES)[0] == pytest.approx(12.5, abs=1e-4)

    def test_cispo(self):
        config = {"cispo": CispoConfig(cispo_eps_clip_low=0.2, cispo_eps_clip_high=0.2)}
        loss, metrics = run("cispo", self.NEW, self.OLD, self.ADVANTAGES, **config)
        assert loss == pytest.approx(-2.9930, abs=1e-4)
        assert (metrics["ratio_min"], metrics["ratio_max"]) == pytest.approx((0.5, 10), rel=1e-3)
        # without the middle token, whose ratio is 1
        assert run("cispo", self.NEW, self.OLD, self.ADVANTAGES, [[1, 0, 1]], **config)[1]["ratio_min"] == (
            pytest.approx(0.5, rel=1e-3)
        )

    def test_cispo_relative_to_the_engine(self):
        # ratios exp(-0.3863), exp(0.5), exp(0.30259): 0.6796 -> 0.8; 1.6487 -> 1.2; 1.3534 -> 1.2
        rollout = [[-1.30685, -1.5, -1.0]]
        config = CispoConfig(cispo_eps_clip_low=0.2, cispo_eps_clip_high=0.2, cispo_anchor="rollout")
        loss, metrics = run("cispo", self.NEW, self.OLD, self.ADVANTAGES, rollout=rollout, cispo=config)
        assert loss == pytest.approx(0.8 * 1.69315 - 1.2 * 1.0 - 1.2 * 4 * 0.69741, rel=1e-6)
        ratios = [math.exp(d) for d in (-0.3863, 0.5, 0.30259)]
        assert metrics["ratio_mean"] == pytest.approx(sum(ratios) / 3)
        assert metrics["clip_fraction_high"] == pytest.approx(2 / 3)

    def test_gspo(self):
        # mean log ratios 0.7 / 5, 2.6 / 2, 2.5 / 4: s = 1.1503 and two over 1.2; the advantages sum to 5.8, 4.5, 5.0
        new = [[0.2, -2.5, -0.3, 0.1, -1.8, -1, -1, -1], [0.8, -0.2, -1, -1, -1, -1, -1, -1],
               [-0.5, 0.3, -1.7, 0.4, -1, -1, -1, -1]]  # fmt: skip
        advantages = [
            [1.5, 2.0, 1.0, 0.8, 0.5, 0, 0, 0],
            [3.0, 1.5, 0, 0, 0, 0, 0, 0],
            [0.5, 0.8, 1.2, 2.5, 0, 0, 0, 0],
        ]
        mask = [[1] * 5 + [0] * 3, [1] * 2 + [0] * 6, [1] * 4 + [0] * 4]
        loss, metrics = run("gspo", new, [[-1.0] * 8] * 3, advantages, mask)
        assert loss == pytest.approx(-(math.exp(0.14) * 5.8 + 1.2 * 4.5 + 1.2 * 5.0))
        assert metrics["clip_fraction_high"] == pytest.approx(6 / 11)

    def test_clip_cov(self):
        # ratios 1.65, 0.61, 1.22, 0.82 | 0.74, 1.35, 0.45: all are clipped anyway but for 0.82 and 0.74, whose
        # advantages are positive. Those two are candidates, and half of seven would be three.
        new, advantages = (
            [[-0.5, -1.5, -0.8, -1.2], [-1.3, -0.7, -1.8, -0.9]],
            [[2.0, -1.0, 1.5, 0.8], [1.0, 0.5, -2.0, 1.2]],
        )
        config = {"clip_cov": ClipCovConfig(clip_ratio=0.5, clip_cov_lb=-5.0, clip_cov_ub=5.0)}
        mask = [[1, 1, 1, 1], [1, 1, 1, 0]]
        loss, metrics = run("clip_cov", new, [[-1.0] * 4] * 2, advantages, mask, **config)
        plain, _ = run("regular", new, [[-1.0] * 4] * 2, advantages, mask)
        assert metrics["chosen_fraction"] == pytest.approx(2 / 7)
        assert loss == pytest.approx(plain + 0.8 * math.exp(-0.2) + 1.0 * math.exp(-0.3))

    def test_kl_cov(self):
        # means 0.542857 and -1.0142857; covariances 0.205, 0.194, 0.604, -0.022 | 0.004, 0.052, 0.788: of seven, the
        # three highest are at distances 0.2, 0.4, 0.4 from the old policy
        new, advantages = (
            [[-0.8, -1.2, -0.6, -1.1], [-1.1, -0.9, -1.4, -0.7]],
            [[1.5, -0.5, 2.0, 0.8], [0.5, 1.0, -1.5, 1.2]],
        )
        mask = [[1, 1, 1, 1], [1, 1, 1, 0]]
        loss, _ = run("kl_cov", new, [[-1.0] * 4] * 2, advantages, mask, kl_cov=KLCovConfig(kl_cov_frac=0.5))
        tokens = [(0.2, 1.5), (-0.2, -0.5), (0.4, 2.0), (-0.1, 0.8), (-0.1, 0.5), (0.1, 1.0), (-0.4, -1.5)]
        assert loss == pytest.approx(-sum(math.exp(d) * a for d, a in tokens) + 0.2 + 0.4 + 0.4)

    def test_sapo(self):
        loss, _ = run("sapo", [[-1.5, -0.8, -1.1]], [[-1.0] * 3], [[1.0, -1.0, 0.5]], sapo=SapoConfig(tau_neg=2.0))

        def gate(r, tau):
            return 4 / tau / (1 + math.exp(-tau * (r - 1)))

        assert loss == pytest.approx(-gate(math.exp(-0.5), 1) + gate(math.exp(0.2), 2) - 0.5 * gate(math.exp(-0.1), 1))

    @pytest.mark.parametrize(
        ("kind", "delta", "new", "advantages", "kept"),
        [
            ("binary_tv", 0.2, [-0.3, -2.0, -0.9], [1.0, -1.0, 1.0], [0, 0, 1]),
            ("binary_tv", 0.2, [-2.0, -0.3], [1.0, -1.0], [1, 1]),
            ("binary_kl", 0.5, [-1.01, -0.99], [1.0, -1.0], [1, 1]),
            ("binary_kl", 0.05, [-0.1, -0.95], [1.0, 1.0], [0, 1]),
        ],
    )
    def test_dppo(self, kind, delta, new, advantages, kept):
        config = DppoConfig(dppo_type=kind, delta_low=delta, delta_high=delta)
        loss, metrics = run("dppo", [new], [[-1.0] * len(new)], [advantages], dppo=config)
        want = -sum(k * a * math.exp(x + 1) for k, a, x in zip(kept, advantages, new, strict=True))
        assert loss == pytest.approx(want)
        left_out = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
        assert left_out == pytest.approx(1 - sum(kept) / len(kept))


@pytest.mark.parametrize(
    ("bound", "sampled", "now", "advantage", "kept"),
    [
        ((0.2, 0.28), [0.5, 0.3, 0.7], [0.51, 0.29, 0.71], 1.0, [1, 1, 1]),
        ((0.01, 0.01), [0.1], [0.5], 1.0, [0]),
        ((0.01, 0.01), [0.5], [0.1], -1.0, [0]),
    ],
)
def test_dppo_of_trl(bound, sampled, now, advantage, kept):
    """TRL: tests/experimental/test_dppo_trainer.py"""
    then, x = ([[math.log(p) for p in row]] for row in (sampled, now))
    config = DppoConfig(delta_low=bound[0], delta_high=bound[1])
    loss, _ = run("dppo", x, then, [[advantage] * len(now)], rollout=then, dppo=config)
    assert loss == pytest.approx(-sum(k * q / p * advantage for k, p, q in zip(kept, sampled, now, strict=True)))


class TestKL:
    @pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs"])
    def test_skyrl(self, name):
        """tests/backends/skyrl_train/utils/test_ppo_utils.py: a difference of 0.1 at two tokens, NaN behind them."""
        want = {"k1": 0.1, "k2": 0.005, "k3": math.exp(-0.1) - 0.9, "abs": 0.1}[name]
        x, base = torch.tensor([[0.2, 0.3, 0.7]]), torch.tensor([[0.1, 0.2, float("nan")]])
        got = resolve("kl_estimator", name)(x, base, torch.tensor([[True, True, False]]))
        assert got.tolist() == [[pytest.approx(want, abs=1e-6)] * 2 + [0.0]]

    @pytest.mark.parametrize("name", ["k1+", "k2+", "k3+", "abs+"])
    def test_openrlhf_straight_through(self, name):
        """tests/test_kl_estimator_gradient.py: the estimator's value, and the difference of log-probs as gradient."""
        torch.manual_seed(42)
        x, base = torch.randn(4, 8).requires_grad_(), torch.randn(4, 8)
        mask = torch.ones(4, 8, dtype=torch.bool)
        value = resolve("kl_estimator", name)(x, base, mask)
        torch.testing.assert_close(value, resolve("kl_estimator", name.rstrip("+"))(x, base, mask))
        value.sum().backward()
        torch.testing.assert_close(x.grad, (x - base).detach(), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_openrlhf_extremes(self, dtype):
        """The same file: k3 up to a difference of 100 is the clipped formula, with its gradient."""
        x = torch.tensor([[-100.0, -90.0, -11.0, -10.0, -3.0, -1.0, -0.1, 0.0]], dtype=dtype, requires_grad=True)
        value = resolve("kl_estimator", "k3")(x, torch.zeros_like(x), torch.ones_like(x, dtype=torch.bool))
        value.sum().backward()
        plain = x.detach().double().requires_grad_()
        want = ((-plain).exp() - 1 + plain).clamp(max=10)
        want.sum().backward()
        assert plain.grad is not None
        torch.testing.assert_close(value, want.float(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(x.grad, plain.grad.to(dtype), atol=1e-6, rtol=1e-5)


class TestReductions:
    @pytest.mark.parametrize(
        ("name", "loss", "mask", "want", "more"),
        [
            # SkyRL: tests/backends/skyrl_train/utils/test_ppo_utils.py
            ("token_mean", [[1, 2, 3], [4, 5, 6]], [[1, 1, 0], [1, 1, 1]], 3.6, {}),
            ("token_mean", [[1, 2]], [[0, 0]], 0.0, {}),
            ("sequence_mean", [[1, 2], [3, 4]], [[1, 1], [1, 0]], 2.25, {}),
            ("seq_mean_token_sum_norm", [[2, 3], [9, 12]], [[1, 1], [1, 0]], 0.7, {"max_seq_len": 10}),
            ("token_mean_legacy", [[2, 4], [6, 8], [10, 12], [14, 16]], [[1, 1], [1, 0], [1, 1], [1, 1]], 8.5, {}),
            # and of its older version
            ("token_mean", [[1, 2, 3], [4, 5, 6]], [[1, 1, 1], [1, 0, 0]], 2.5, {}),
            ("sequence_mean", [[1, 2, 3], [4, 5, 6]], [[1, 1, 1], [1, 0, 0]], 3.0, {}),
            ("seq_mean_token_sum_norm", [[1, 2, 3], [4, 5, 6]], [[1, 1, 1], [1, 0, 0]], 1.25, {"max_seq_len": 4}),
            # OpenRLHF: tests/test_loss_aggregation.py, the last over two micro-batches of uneven token counts
            ("token_mean", [[1, 2, 0], [3, 4, 5], [7, 0, 0]], [[1, 1, 0], [1, 1, 1], [1, 0, 0]], 22 / 6, {}),
            ("sequence_mean", [[1, 3, 9], [2, 4, 0], [8, 0, 0]], [[1, 1, 0], [1, 1, 0], [1, 0, 0]], 13 / 3, {}),
            ("token_mean", [[1, 2, 0], [3, 4, 5], [6, 7, 0]], [[1, 1, 0], [1, 1, 1], [1, 1, 0]], 4.0, {}),
        ],
    )
    def test_worked_there(self, name, loss, mask, want, more):
        per_token, given = torch.tensor(loss).float(), torch.tensor(mask).bool()
        config = AlgorithmConfig(loss_reduction=name, **more)
        weights = token_weights(given, torch.arange(len(given)), config, micro_batch_size=2)
        assert weighted_sum(per_token, weights).item() == pytest.approx(want, rel=1e-6)
        parts = [weighted_sum(per_token[rows], weights[rows]) for rows in torch.arange(len(given)).split(1)]
        assert sum(parts).item() == pytest.approx(want, rel=1e-6)  # ranks add up

    def test_a_sequence_without_a_trained_token_is_counted(self):
        """OpenRLHF's suite (and verl) has 2.0 here: the mean of the one sequence that has a token."""
        loss, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[True, True], [False, False]])
        weights = token_weights(mask, torch.tensor([0, 0]), AlgorithmConfig(loss_reduction="sequence_mean"))
        assert weighted_sum(loss, weights).item() == 1.0


def corrected(old, rollout, mask=None, **section):
    """Weights, and metrics as numbers."""
    x, then = torch.tensor(old), torch.tensor(rollout)
    given = torch.ones_like(x).bool() if mask is None else torch.tensor(mask).bool()
    config = AlgorithmConfig(off_policy_correction=OffPolicyCorrectionConfig(**section))
    result = correct(x, then, given, config)
    return result.weights.tolist(), {name: value.item() for name, value in result.metrics.items()}


GEO = {"sequence_mask_metric": "geometric", "geo_mask_low": 0.9, "geo_mask_high": 1.1}
PRODUCT = {"sequence_mask_metric": "product", "product_mask_low": 0.5, "product_mask_high": 2.0}
OUTLIERS = {"outlier_token_is_threshold_low": 1e-4, "outlier_token_is_threshold_high": 100.0}
A_BIT_OFF = ([[-1.0, -1.5, -0.5]], [[-1.5, -1.0, -1.5]])  # log ratios 0.5, -0.5, 1


@pytest.mark.parametrize(
    ("pair", "mask", "section", "want", "metrics"),
    [
        (A_BIT_OFF, None, {"tis_ratio_type": "token"}, [1.6487, 0.6065, 2.0], {"capped_tokens": 1 / 3}),
        (A_BIT_OFF, None, {"tis_ratio_type": "sequence"}, [2.7183] * 3, {"capped_sequences": 0}),
        (([[-1.0] * 3], [[-2.0] * 3]), None, {"tis_ratio_type": "sequence"}, [5.0] * 3, {"capped_sequences": 1}),
        (A_BIT_OFF, [[1, 0, 1]], {"tis_ratio_type": "sequence"}, [4.4817, 0, 4.4817], {"capped_sequences": 0}),
        (([[-1.0, -1.1, -1.0]], [[-1.1, -1.0, -1.0]]), None, GEO, [1, 1, 1], {"masked_sequences": 0}),
        (([[-1.0] * 3], [[-1.5] * 3]), None, GEO, [0, 0, 0], {"masked_sequences_high": 1, "masked_sequences_low": 0}),
        (([[-1.0, -1.1, -1.2]], [[-1.2] * 3]), None, PRODUCT, [1, 1, 1], {"masked_sequences": 0}),
        (([[-1.0] * 3], [[-2.0] * 3]), None, PRODUCT, [0, 0, 0], {"masked_sequences_high": 1}),
        (([[-1.0] * 3], [[-1.0, -1.0, -6.0]]), None, OUTLIERS, [0, 0, 0], {"outlier_sequences_high": 1}),
        (([[-1.0] * 3], [[-1.0, -1.0, -6.0]]), [[1, 1, 0]], OUTLIERS, [1, 1, 0], {"outlier_sequences": 0}),
        (([[-1.0, -1.5, -1.0]], [[-1.5, -1.0, -1.0]]), None, OUTLIERS, [1, 1, 1], {"outlier_sequences": 0}),
        (([[-1.0, -1.0, -11.0]], [[-1.0] * 3]), None, {"outlier_token_is_threshold_low": 1e-4}, [0, 0, 0],
         {"outlier_sequences_low": 1, "outlier_sequences_high": 0}),
        (([[-1.0] * 3], [[-1.1] * 3]), None, {"tis_ratio_type": "token", **GEO, "geo_mask_high": 1.2, **OUTLIERS},
         [1.1052] * 3, {"capped_tokens": 0, "masked_sequences": 0}),
    ],
)  # fmt: skip
def test_corrections_of_skyrl(pair, mask, section, want, metrics):
    """tests/cpu/algorithms/test_off_policy_correction.py"""
    weights, found = corrected(*pair, mask, **section)
    assert weights == [pytest.approx(want, rel=1e-3)]
    assert {name: found[name] for name in metrics} == pytest.approx(metrics)


def test_corrections_of_verl():
    """tests/trainer/ppo/test_rollout_corr.py: ratios 0.368 and 1.649 with the bounds 0.5 and 2; and one of 3e-7."""
    bounds = {"token_mask_is_threshold_low": 0.5, "token_mask_is_threshold_high": 2.0}
    weights, metrics = corrected([[-2.0] * 5] * 2, [[-1.0] * 5, [-2.5] * 5], tis_ratio_type="token", **bounds)
    # verl keeps the weight of a token that it masks, and takes the token out of the denominator
    assert weights == [[0.0] * 5, pytest.approx([1.649] * 5, abs=1e-3)] and metrics["masked_tokens_low"] == 0.5
    old = [[-1.0] * 5] * 2
    weights, metrics = corrected(old, [[-1.0, -1.0, 14.0, -1.0, -1.0], [-1.0] * 5], outlier_token_is_threshold_low=1e-4)
    assert weights == [[0.0] * 5, [1.0] * 5] and metrics["outlier_sequences_low"] == 0.5


@pytest.mark.parametrize(("family", "name"), named("policy_loss"))
def test_rows_that_another_suite_has_as_one_number(family, name):
    """OpenRLHF, tests/test_loss_aggregation.py: what two ranks compute adds up to what one would."""
    x = torch.tensor([[-0.20, -0.40, -0.10], [-0.70, -0.30, -0.20], [-0.60, -0.10, -0.50]], dtype=torch.float64)
    old = x - torch.tensor([[0.03, -0.04, 0.01], [0.02, 0.05, -0.03], [0.04, 0.0, -0.02]])
    advantages = torch.tensor([[1.0, -0.5, 0.0], [0.3, -1.2, 0.5], [1.5, 0.0, -0.7]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, True]])
    subject = Subject(family, name, AlgorithmConfig())
    case = {"logprobs": x, "old_logprobs": old, "rollout_logprobs": old, "advantages": advantages, "mask": mask,
            "baseline": torch.zeros(3)}  # fmt: skip
    told = subject.chosen(case)
    weights = token_weights(mask, torch.arange(3), AlgorithmConfig())
    whole = weighted_sum(tensor_of(subject.call(case, **told)), weights)
    ranks = []
    for rows in (slice(0, 2), slice(2, 3)):
        share = {key: value[rows] for key, value in case.items()}
        result = subject.call(share, **{key: value[rows] for key, value in told.items()})
        ranks.append(weighted_sum(tensor_of(result), weights[rows]))
    torch.testing.assert_close(sum(ranks), whole)
