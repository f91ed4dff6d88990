"""Advantages, shaping and the KL controller at the numbers that the test suites of SkyRL, verl, TRL and OpenRLHF use.

Inputs and results are theirs. Where we differ on purpose, the test says so, and ``docs/algorithms.md`` why.
"""

import pytest
import torch

from skyrl_train.algorithms.kl_control import KLController
from skyrl_train.algorithms.shaping import overlong_penalty, zero_variance_filter
from skyrl_train.algorithms.table import resolve
from skyrl_train.algorithms.tensors import whiten
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.algorithm_sections import KLControlConfig


def estimate(name, rewards, group, mask=None, values=None, **settings):
    """Advantages and returns."""
    x = torch.tensor(rewards, dtype=torch.float32)
    given = torch.ones_like(x).bool() if mask is None else torch.tensor(mask).bool()
    values = None if values is None else torch.tensor(values)
    return resolve("advantage_estimator", name)(x, given, torch.tensor(group), AlgorithmConfig(**settings), values)


class TestSkyRL:
    """tests/backends/skyrl_train/utils/test_ppo_utils.py"""

    REWARDS, VALUES = [[1.0, 2.0, 3.0]], [[0.5, 1.0, 1.5]]

    @pytest.mark.parametrize(
        ("gamma", "lambd", "want"),
        [(1.0, 1.0, [6.0, 5.0, 3.0]), (0.5, 1.0, [2.75, 3.5, 3.0]), (1.0, 0.5, [3.625, 4.25, 3.0])],
    )
    def test_gae(self, gamma, lambd, want):
        _, returns = estimate("gae", self.REWARDS, [0], values=self.VALUES, gamma=gamma, lambd=lambd)
        assert returns.tolist() == [pytest.approx(want)]

    def test_gae_is_whitened_over_the_mask(self):
        """Their recursion runs over every position and their mask only chooses what is whitened; the same in two steps.
        (In a run both have one mask: the response's with ``observation_tokens=count``, SkyRL's convention.)"""
        _, returns = estimate("gae", self.REWARDS, [0], values=self.VALUES)
        mask = torch.tensor([[True, False, True]])
        advantages = whiten(returns - torch.tensor(self.VALUES), mask)
        assert advantages[mask].tolist() == pytest.approx([0.7071, -0.7071], abs=1e-4)

    def test_reinforce_plus_plus(self):
        # what stands behind the end is 3 there and 0 here; it is not part of the response
        advantages, returns = estimate("reinforce++", self.REWARDS, [0], mask=[[1, 1, 0]])
        assert returns.tolist() == [[3.0, 2.0, 0.0]] and advantages[0, 2] == 0
        assert estimate("reinforce++", self.REWARDS, [0], gamma=0.5)[1].tolist() == [[2.75, 3.5, 3.0]]

    SUMS = ([[1, 2, 3], [1, 1, 1], [3, 3, 3], [4, 4, 4]], [0, 0, 1, 1])  # 6, 3 | 9, 12

    @pytest.mark.parametrize(
        ("name", "settings", "want"),
        [
            ("grpo", {"grpo_norm_by_std": False}, [1.5, -1.5, -1.5, 1.5]),
            ("dr_grpo", {}, [1.5, -1.5, -1.5, 1.5]),
            ("maxrl", {}, [1.5 / 4.5, -1.5 / 4.5, -1.5 / 10.5, 1.5 / 10.5]),
        ],
    )
    def test_groups_of_two(self, name, settings, want):
        advantages, returns = estimate(name, *self.SUMS, **settings)
        assert torch.equal(advantages, returns)
        torch.testing.assert_close(advantages, torch.tensor(want)[:, None].expand(4, 3), atol=1e-5, rtol=0)

    def test_rloo(self):
        rewards = [[0, 0, 6], [0, 0, 3], [0, 0, 9], [0, 0, 12], [0, 0, 1]]
        advantages, _ = estimate("rloo", rewards, [0, 0, 1, 1, 2])
        assert advantages[:, 0].tolist() == [3.0, -3.0, -3.0, 3.0, 0.0]  # alone: 0


def test_gae_of_verl_passes_observations():
    """tests/trainer/ppo/test_core_algos_on_cpu.py: whatever the values at the env's tokens, the same advantages."""
    rewards = [[0.0, 0.0, 0.1, 0.1, 0.1, 0.0, 0.0, 0.1, 1.0, 0.0, 0.0]]
    mask = [[0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0]]
    made = []
    for seed in range(2):
        values = 100 * torch.randn(1, 11, generator=torch.Generator().manual_seed(seed))
        values[0, torch.tensor(mask[0]).bool()] = torch.tensor([4.0, 5.0, 6.0, 7.0, 9.0])
        made.append(estimate("gae", rewards, [0], mask=mask, values=values.tolist(), gamma=0.7, lambd=0.6))
    assert torch.equal(made[0][0], made[1][0]) and torch.equal(made[0][1], made[1][1])
    # without decay, what is still to come
    _, returns = estimate("gae", rewards, [0], mask=mask, values=values.tolist())
    assert returns[0, torch.tensor(mask[0]).bool()].tolist() == pytest.approx([1.4, 1.3, 1.2, 1.1, 1.0], abs=1e-5)


def test_rloo_of_trl():
    """tests/test_rloo_trainer.py: three prompts, four answers each, prompt by prompt in turn."""
    scores = [1, 2, 3, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    advantages, _ = estimate("rloo", [[s] for s in scores], [0, 1, 2] * 4)
    assert advantages[0].item() == pytest.approx(1 - (2 + 5 + 8) / 3)
    assert advantages[7].item() == pytest.approx(6 - (3 + 2 + 9) / 3)


def test_whitening_of_trl():
    """tests/test_core.py: 1, 2, 3, 4, of which the middle two count; mean 2.5, unbiased variance 0.5."""
    mask = torch.tensor([[False, True, True, False]])
    got = whiten(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), mask)
    assert got.tolist() == [pytest.approx([0, -(0.5**0.5), 0.5**0.5, 0], abs=1e-6)]


def test_a_sequence_that_is_not_trained_counts_in_its_group():
    """OpenRLHF, tests/test_experience_maker.py, leaves the 100 out and has -1 and 1. Here and in SkyRL a trajectory
    that is left out of the loss was an answer like any other: mean 104 / 3."""
    advantages, _ = estimate("dr_grpo", [[100.0, 0], [1.0, 0], [3.0, 0]], [0, 0, 0])
    assert advantages[1:, 0].tolist() == pytest.approx([1 - 104 / 3, 3 - 104 / 3])


@pytest.mark.parametrize(
    ("suite", "start", "target", "kl", "want"),
    [("SkyRL, test_ppo_utils.py", 0.2, 0.1, 0.2, 0.204), ("OpenRLHF, test_kl_controller.py", 0.1, 1.0, 1.2, 0.102)],
)
def test_adaptive_coefficient(suite, start, target, kl, want):
    """Both with a horizon of 100 and 10 sequences."""
    control = KLControlConfig(type="adaptive", kl_target=target, horizon=100)
    controller = KLController(AlgorithmConfig(kl_loss_coef=start, kl_ctrl=control))
    controller.update(kl, 10)
    assert controller.value == pytest.approx(want), suite


class TestOverlong:
    @pytest.mark.parametrize(
        ("longest", "buffer", "factor", "lengths", "rewards", "want"),
        [
            (10, 4, 2.0, [3, 7, 11], [1.0, 2.0, 3.0], [1.0, 1.5, 0.0]),
            (8, 4, 1.0, [6], [1.0], [0.5]),
            (5, 4, 1.0, [6], [1.0], [0.0]),
        ],
    )
    def test_skyrl(self, longest, buffer, factor, lengths, rewards, want):
        """tests/train/utils/test_reward_shaping.py: DAPO's penalty, and 0 beyond the maximum; ours is called zero."""
        mask = torch.arange(12) < torch.tensor(lengths)[:, None]
        given = torch.zeros(len(lengths), 12)
        given[range(len(lengths)), [n - 1 for n in lengths]] = torch.tensor(rewards)
        config = AlgorithmConfig(
            overlong_penalty="zero", overlong_max_len=longest, overlong_buffer_len=buffer,
            overlong_buffer_penalty_factor=factor,
        )  # fmt: skip
        assert overlong_penalty(given, mask, config).sum(1).tolist() == pytest.approx(want)

    @pytest.mark.parametrize(
        ("mask", "want"), [([1, 1, 0, 0, 0, 1, 1, 1, 0], 1.0), ([1, 1, 1, 0, 0, 1, 1, 1, 1], 1 / 3)]
    )
    def test_openrlhf(self, mask, want):
        """tests/test_length_penalty.py: a maximum of 8 and a buffer of 3; a tool's tokens are not counted."""
        given, rewards = torch.tensor([mask]).bool(), torch.zeros(1, 9)
        rewards[0, given[0].nonzero()[-1]] = 1.0
        config = AlgorithmConfig(overlong_penalty="soft", overlong_max_len=8, overlong_buffer_len=3)
        assert overlong_penalty(rewards, given, config).sum().item() == pytest.approx(want)


@pytest.mark.parametrize(
    ("rewards", "group", "live", "tolerance", "want"),
    [
        ([1, 2, 3, 3, 5], [0, 0, 1, 1, 2], None, 1e-6, [0, 1, 4]),
        ([1, 1, 2, 2], [0, 0, 1, 1], None, 1e-6, []),
        ([1, 1, 1], [0, 1, 2], None, 1e-6, [0, 1, 2]),
        ([0.6667, 0.66670001, 1, 0], [0, 0, 1, 1], None, 0.0, [0, 1, 2, 3]),
        ([0.6667, 0.66670001, 1, 0], [0, 0, 1, 1], None, 1e-6, [2, 3]),
        ([1, 1, 0, 0], [0] * 4, [1, 1, 0, 0], 1e-6, []),
        ([1, 0], [0, 0], [1, 0], 1e-6, [0, 1]),
    ],
)
def test_zero_variance_filter_of_skyrl(rewards, group, live, tolerance, want):
    """tests/train/test_trainer_utils.py. Rows that are not trained have nothing to lose: we may keep what they drop."""
    given = torch.tensor(rewards, dtype=torch.float64)[:, None]
    trained = torch.ones(len(rewards)).bool() if live is None else torch.tensor(live).bool()
    mask = torch.ones_like(given, dtype=torch.bool)
    keep = zero_variance_filter(given, mask, torch.tensor(group), trained, tolerance)
    assert (keep & trained).nonzero()[:, 0].tolist() == [row for row in want if trained[row]]
