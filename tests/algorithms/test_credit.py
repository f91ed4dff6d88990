"""``assign_credit``: the order of things, what stays untouched, and the metrics."""

import math

import pytest
import torch

from skyrl_train.algorithms.credit import assign_credit
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.errors import ConfigError, EnvError

from .helpers import BAD, batch

PLAIN = {"use_kl_loss": False, "grpo_norm_by_std": False}
# Two prompts, two samples each. Scores 1, 0 | 1, 1. The second row's middle token was the env's.
REWARDS = [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
RESPONSE = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
TRAINED = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0]]).bool()


def scored(**changes):
    made = batch(torch.tensor(REWARDS), RESPONSE, [0, 0, 1, 1], TRAINED.clone())
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_worked_on_paper():
    data = scored()
    metrics = assign_credit(data, AlgorithmConfig(**PLAIN))
    # group 0: mean 0.5, so +-0.5; group 1: equal, so 0
    assert data.advantages.tolist() == [[0.5] * 3, [-0.5] * 3, [0.0] * 3, [0.0] * 3]
    assert torch.equal(data.returns, data.advantages)
    assert torch.equal(data.loss_mask, TRAINED) and data.rewards.tolist() == REWARDS
    # scores 1, 0, 1, 1: mean 0.75, std sqrt(3/16); one of two groups is dead; stds sqrt(0.5) and 0
    assert metrics["reward/mean"] == 0.75
    assert metrics["reward/std"] == pytest.approx(math.sqrt(3 / 16))
    assert (metrics["reward/min"], metrics["reward/max"]) == (0.0, 1.0)
    assert metrics["groups/dead_fraction"] == pytest.approx(0.5)
    assert metrics["groups/std_mean"] == pytest.approx(math.sqrt(0.5) / 2)
    # eight trained tokens: three of 0.5, two of -0.5, three of 0
    assert metrics["advantage/mean"] == pytest.approx(0.5 / 8)
    assert metrics["advantage/abs_mean"] == pytest.approx(2.5 / 8)
    assert metrics["advantage/abs_max"] == 0.5
    assert metrics["advantage/std"] == pytest.approx(math.sqrt(5 * 0.25 / 8 - (0.5 / 8) ** 2))
    assert (metrics["return/mean"], metrics["return/std"]) == (metrics["advantage/mean"], metrics["advantage/std"])
    assert all(isinstance(value, float) for value in metrics.values())


def test_zero_variance_filter_narrows_the_loss_mask():
    data = scored()
    metrics = assign_credit(data, AlgorithmConfig(**PLAIN, zero_variance_filter=True))
    assert data.loss_mask.tolist() == TRAINED[:2].tolist() + [[False] * 3] * 2
    assert torch.equal(data.response_mask, RESPONSE)
    assert metrics["groups/filtered_sequences"] == 2
    assert metrics["advantage/abs_mean"] == 0.5  # only trained tokens count, and all that are left have 0.5


def test_a_sequence_left_out_of_the_loss_still_counts_in_its_group():
    data = scored()
    data.loss_mask[1] = False  # overlong filtering
    assign_credit(data, AlgorithmConfig(**PLAIN))
    assert data.advantages[0].tolist() == [0.5] * 3


def test_kl_in_reward_on_paper():
    # k1 with coef 0.1; the policy is 1 nat above the reference everywhere. Every trained token costs 0.1:
    # scores 1 - 0.3, 0 - 0.2, 1 - 0.2, 1 - 0.1 = 0.7, -0.2 | 0.8, 0.9: means 0.25 and 0.85
    zeros = torch.zeros(4, 3)
    data = scored(old_logprobs=zeros, ref_logprobs=zeros - 1)
    settings = AlgorithmConfig(**PLAIN, use_kl_in_reward=True, kl_estimator_type="k1", kl_loss_coef=0.1)
    metrics = assign_credit(data, settings)
    torch.testing.assert_close(data.advantages[:, 0], torch.tensor([0.45, -0.45, -0.05, 0.05]))
    assert data.rewards.tolist() == REWARDS
    assert metrics["kl/reward_mean"] == metrics["kl/reward_max"] == 1.0
    assert metrics["kl/reward_coef"] == pytest.approx(0.1)
    assert metrics["reward/mean"] == 0.75 and metrics["groups/dead_fraction"] == 0.5  # the env's rewards


@pytest.mark.parametrize("missing", ["ref_logprobs", "old_logprobs"])
def test_kl_in_reward_needs_a_reference(missing):
    data = scored(old_logprobs=torch.zeros(4, 3), ref_logprobs=torch.zeros(4, 3))
    setattr(data, missing, None)
    with pytest.raises(ConfigError, match=rf"use_kl_in_reward=True: the KL penalty needs {missing}"):
        assign_credit(data, AlgorithmConfig(use_kl_in_reward=True))


def test_batch_normalize_is_over_trained_tokens():
    data = scored()
    assign_credit(data, AlgorithmConfig(**PLAIN, advantage_batch_normalize=True))
    trained = data.advantages[TRAINED]
    assert trained.mean().item() == pytest.approx(0, abs=1e-6)
    assert trained.square().mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("bad", BAD)
def test_padding_may_hold_anything(bad):
    settings = AlgorithmConfig(use_kl_in_reward=True, advantage_batch_normalize=True, zero_variance_filter=True)
    clean = scored(old_logprobs=torch.zeros(4, 3), ref_logprobs=torch.full((4, 3), -0.5))
    dirty = scored(old_logprobs=torch.zeros(4, 3), ref_logprobs=torch.full((4, 3), -0.5))
    for name in ("rewards", "old_logprobs", "ref_logprobs"):
        setattr(dirty, name, torch.where(RESPONSE, getattr(dirty, name), bad))
    assert assign_credit(dirty, settings) == assign_credit(clean, settings)
    assert torch.equal(dirty.advantages, clean.advantages)


@pytest.mark.parametrize("bad", BAD)
def test_a_reward_that_is_not_finite_is_named(bad):
    data = scored()
    data.rewards[2, 1] = bad
    with pytest.raises(EnvError, match=r"sequence 2 of the batch \(prompt 1 of the step\)"):
        assign_credit(data, AlgorithmConfig())


def test_one_sequence_of_one_token_and_no_trained_token():
    one = torch.ones(1, 1, dtype=torch.bool)
    metrics = assign_credit(batch(torch.tensor([[1.0]]), one, [0]), AlgorithmConfig())
    assert metrics["groups/dead_fraction"] == 0 and metrics["advantage/mean"] == pytest.approx(1, rel=1e-5)
    metrics = assign_credit(batch(torch.tensor([[0.0]]), ~one, [0]), AlgorithmConfig(advantage_batch_normalize=True))
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_users_estimator():
    data = scored()
    assign_credit(data, AlgorithmConfig(advantage_estimator=f"{__package__}.helpers:my_estimator"))
    assert torch.equal(data.advantages, data.rewards * 2) and torch.equal(data.returns, data.rewards)


class TestWhatTheEstimatorSees:
    def test_observation_tokens_count_or_not(self):
        # Row 1: the middle token was the env's; its reward of 4 is at the last. gamma 0.5 halves the way back at
        # every token that exists: 1, 2, 4 where it counts, 2, -, 4 where it does not
        rewards = torch.tensor(REWARDS)
        rewards[1, 2] = 4.0
        settings = {"advantage_estimator": "reinforce++", "gamma": 0.5}
        for tokens, expected in (("count", [1.0, 2.0, 4.0]), ("skip", [2.0, 0.0, 4.0])):
            data = scored(rewards=rewards)
            assign_credit(data, AlgorithmConfig(**PLAIN, **settings, observation_tokens=tokens))
            assert data.returns[1].tolist() == expected

    def test_a_reward_for_each_turn_or_for_the_whole(self):
        # Row 0: 0.5 for its first turn and 1 for its last. gamma 0.5. Turn: 0.5 + 1 / 4, 1 / 2, 1.
        # Trajectory: all 1.5 at the end: 1.5 / 4, 1.5 / 2, 1.5
        rewards = torch.tensor(REWARDS)
        rewards[0] = torch.tensor([0.5, 0.0, 1.0])
        settings = {"advantage_estimator": "reinforce++", "gamma": 0.5}
        for level, expected in (("turn", [0.75, 0.5, 1.0]), ("trajectory", [0.375, 0.75, 1.5])):
            data = scored(rewards=rewards)
            metrics = assign_credit(data, AlgorithmConfig(**PLAIN, **settings, reward_level=level))
            assert data.returns[0].tolist() == expected
            assert metrics["reward/max"] == metrics["reward/mean"] * 4 - 2 == 1.5  # scores 1.5, 0, 1, 1

    def test_a_reward_on_a_token_of_the_env_is_not_lost(self):
        rewards = torch.tensor(REWARDS)
        rewards[1, 1] = 3.0
        data = scored(rewards=rewards)
        assign_credit(data, AlgorithmConfig(**PLAIN))
        assert data.advantages[0].tolist() == [-1.0] * 3  # scores 1 and 3

    def test_the_filter_looks_at_shaped_rewards(self):
        # Prompt 1 has the scores 1 and 1. Three tokens and more are too long, which takes 0.5 from rows 0 and 1; with
        # two and more, row 2 loses it too, and its group is not all equal any more
        settings = {"zero_variance_filter": True, "overlong_penalty": "hard", "overlong_buffer_penalty_factor": 0.5}
        data = scored()
        metrics = assign_credit(data, AlgorithmConfig(**PLAIN, **settings, overlong_max_len=2))
        assert metrics["reward/mean"] == 0.75 and metrics["reward/shaped_mean"] == pytest.approx(0.375)
        assert metrics["groups/filtered_sequences"] == 0
        assert data.advantages[2].tolist() == [-0.25, -0.25, 0.0]

    def test_values_make_returns_and_their_metrics(self):
        # gamma and lambda 1: returns are 1 | 0 | 1 | 1; the critic says 0.5 everywhere, so advantages are +-0.5
        # before whitening, and the values explain nothing of the returns
        data = scored(values=torch.full((4, 3), 0.5))
        metrics = assign_credit(data, AlgorithmConfig(**PLAIN, advantage_estimator="gae", gamma=1.0, lambd=1.0))
        assert data.returns.tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 0, 0]]
        # of eight trained tokens six return 1 and two 0
        assert metrics["return/mean"] == 0.75 and metrics["value/mean"] == 0.5
        assert metrics["value/std"] == 0 and metrics["return/std"] == pytest.approx(math.sqrt(3 / 16))
        assert metrics["value/explained_variance"] == pytest.approx(0.0, abs=1e-6)

    def test_baselines_reach_the_estimator(self):
        data = scored(baselines=torch.tensor([0.25, 0.25, 1.0, 1.0]))
        assign_credit(data, AlgorithmConfig(**PLAIN, advantage_estimator="remax"))
        assert data.advantages[:, 0].tolist() == [0.75, -0.25, 0.0, 0.0]

    def test_the_controllers_coefficient_goes_before_the_configs(self):
        # as on paper above, with 0.2: scores 0.4, -0.4 | 0.6, 0.8
        zeros = torch.zeros(4, 3)
        data = scored(old_logprobs=zeros, ref_logprobs=zeros - 1)
        settings = AlgorithmConfig(**PLAIN, use_kl_in_reward=True, kl_estimator_type="k1", kl_loss_coef=0.1)
        metrics = assign_credit(data, settings, kl_coef=0.2)
        torch.testing.assert_close(data.advantages[:, 0], torch.tensor([0.4, -0.4, -0.1, 0.1]))
        assert metrics["kl/reward_coef"] == 0.2

    def test_a_users_shaping(self):
        data = scored()
        shaping = f"{__package__}.helpers:my_rewards"
        metrics = assign_credit(data, AlgorithmConfig(**PLAIN, reward_shaping=shaping))
        # one from every written token: row 1 wrote two, the others 3, 2 and 1
        assert metrics["reward/shaped_mean"] == pytest.approx(0.75 - 8 / 4)
