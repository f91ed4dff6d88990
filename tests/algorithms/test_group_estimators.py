"""Estimators that compare within a group, worked on paper; GRPO's own cases are in test_advantages.py."""

import pytest
import torch

from skyrl_train.algorithms.advantages import dr_grpo, grpo, maxrl, opo, remax, rloo
from skyrl_train.algorithms.tensors import TensorError
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.errors import ConfigError

CONFIG = AlgorithmConfig()
LEAVE_ONE_OUT = AlgorithmConfig(leave_one_out_baseline=True, grpo_norm_by_std=False)
REWARDS = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.5, -0.5]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
GROUP = torch.tensor([0, 0])
# On paper: the third token of the second row is padding, so the scores are 1 and 0.5, their mean 0.75.


def on_tokens(first: float, second: float) -> torch.Tensor:
    return torch.tensor([[first, first, first], [second, second, 0.0]])


@pytest.mark.parametrize(
    ("estimator", "first", "second"),
    [
        (dr_grpo, 0.25, -0.25),  # minus 0.75
        (rloo, 0.5, -0.5),  # each minus the other
        (maxrl, 0.25 / 0.750001, -0.25 / 0.750001),  # divided by the mean
        (opo, 0.2, -0.3),  # lengths 3 and 2: (3 * 1 + 2 * 0.5) / 5 = 0.8
    ],
)
def test_worked_on_paper(estimator, first, second):
    advantages, returns = estimator(REWARDS, MASK, GROUP, CONFIG)
    torch.testing.assert_close(advantages, on_tokens(first, second))
    assert torch.equal(returns, advantages)


def test_three_in_a_group_and_one_alone():
    # scores 3, 0, 0 | 5. rloo: 3 - 0, 0 - 1.5, 0 - 1.5 | 0.  dr_grpo: 2, -1, -1 | 5.  maxrl: 2, -1, -1 | 5.
    # opo with lengths 1, 2, 1: baseline 3/4 -> 2.25, -0.75, -0.75 | 5
    rewards = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0], [5.0, 0.0]])
    mask = torch.tensor([[True, False], [True, True], [True, False], [True, False]])
    group = torch.tensor([9, 9, 9, 2])
    want = {rloo: [3, -1.5, -1.5, 0], dr_grpo: [2, -1, -1, 5], maxrl: [2, -1, -1, 5], opo: [2.25, -0.75, -0.75, 5]}
    for estimator, first_tokens in want.items():
        advantages, _ = estimator(rewards, mask, group, CONFIG)
        assert advantages[:, 0].tolist() == pytest.approx(first_tokens, abs=1e-5), estimator.__name__


def test_leave_one_out():
    # scores 3, 0, 0: means of the others 0, 1.5, 1.5 (grpo and dr_grpo are then rloo)
    rewards, mask, group = (
        torch.tensor([[3.0], [0.0], [0.0]]),
        torch.ones(3, 1, dtype=torch.bool),
        torch.zeros(3).long(),
    )
    for estimator in (grpo, dr_grpo, rloo):
        assert estimator(rewards, mask, group, LEAVE_ONE_OUT)[0][:, 0].tolist() == [3.0, -1.5, -1.5]
    # opo, lengths 1, 3, 1: others of the first (3 * 0 + 1 * 0) / 4, of the second (3 + 0) / 2, of the third 3 / 4
    rewards = torch.tensor([[3.0, 0, 0], [0, 0, 0], [0, 0, 0]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 0, 0]]).bool()
    assert opo(rewards, mask, group, LEAVE_ONE_OUT)[0][:, 0].tolist() == [3.0, -1.5, -0.75]


def test_std_over_the_batch():
    # scores 1, 0 | 4, 4: deviations 0.5, -0.5 | 0, 0; of all four, mean 2.25, unbiased variance
    # (1.5625 + 5.0625 + 3.0625 + 3.0625) / 3 = 4.25
    rewards, mask = torch.tensor([[1.0], [0.0], [4.0], [4.0]]), torch.ones(4, 1, dtype=torch.bool)
    advantages, _ = grpo(rewards, mask, torch.tensor([0, 0, 1, 1]), AlgorithmConfig(grpo_std_over="batch"))
    half = 0.5 / (4.25**0.5 + 1e-6)
    assert advantages[:, 0].tolist() == pytest.approx([half, -half, 0, 0])


def test_opo_with_lengths_of_nothing_is_the_plain_mean():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert (opo(REWARDS, nothing, GROUP, CONFIG)[0] == 0).all()


class TestRemax:
    BASELINE = torch.tensor([0.25, 0.25])

    def test_worked_on_paper(self):
        # rewards still to come 1, 1, 1 and 0.5, 0.5; the greedy trajectory got 0.25
        advantages, returns = remax(REWARDS, MASK, GROUP, CONFIG, None, self.BASELINE)
        torch.testing.assert_close(returns, on_tokens(1.0, 0.5))
        torch.testing.assert_close(advantages, on_tokens(0.75, 0.25))

    def test_a_reward_counts_for_the_tokens_before_it(self):
        # turns of 0.5 and 1: 1.5, 1, 1 to come
        rewards = torch.tensor([[0.5, 0.0, 1.0]])
        advantages, returns = remax(rewards, MASK[:1], GROUP[:1], CONFIG, None, torch.tensor([1.0]))
        assert returns.tolist() == [[1.5, 1.0, 1.0]] and advantages.tolist() == [[0.5, 0.0, 0.0]]

    def test_it_needs_the_baseline(self):
        with pytest.raises(ConfigError, match="advantage_estimator='remax': needs the score of a greedy"):
            remax(REWARDS, MASK, GROUP, CONFIG)

    @pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)])
    def test_a_wrong_baseline_is_named(self, wrong):
        with pytest.raises(TensorError, match=r"^baseline: .*expected floating \[B\] = \[2\]"):
            remax(REWARDS, MASK, GROUP, CONFIG, None, wrong)
