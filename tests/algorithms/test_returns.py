"""REINFORCE++ and GAE: what is still to come, discounted, whitened; worked on paper and against a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.returns import backward_sum, gae, reinforce_plus_plus, reinforce_plus_plus_baseline
from skyrl_train.algorithms.tensors import whiten
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.errors import ConfigError

from .helpers import random_case

CONFIG = AlgorithmConfig()
REWARDS = torch.tensor([[0.0, 0.0, 1.0], [2.0, 1.0, 9.0]])
VALUES = torch.tensor([[0.5, 0.25, 0.5], [1.0, 2.0, 9.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
GROUP = torch.tensor([0, 0])


def whitened(*values: float) -> list[float]:
    x = torch.tensor(values, dtype=torch.float64)
    return ((x - x.mean()) / (x.var() + 1e-8).sqrt()).tolist()


def test_reinforce_worked_on_paper():
    # gamma 0.5. Row 1: 1, then 0.5, then 0.25. Row 2, two tokens: 1, then 2 + 0.5 = 2.5.
    advantages, returns = reinforce_plus_plus(REWARDS, MASK, GROUP, AlgorithmConfig(gamma=0.5))
    assert returns.tolist() == [[0.25, 0.5, 1.0], [2.5, 1.0, 0.0]]
    assert advantages[MASK].tolist() == pytest.approx(whitened(0.25, 0.5, 1.0, 2.5, 1.0))
    assert advantages[1, 2] == 0


def test_reinforce_baseline_worked_on_paper():
    # scores 1 and 3, mean 2: -1 on three tokens, +1 on two; mean -0.2, unbiased variance 1.2
    advantages, returns = reinforce_plus_plus_baseline(REWARDS, MASK, GROUP, CONFIG)
    assert advantages[MASK].tolist() == pytest.approx([-0.8 / 1.2**0.5] * 3 + [1.2 / 1.2**0.5] * 2)
    assert torch.equal(advantages, returns)
    # alone, each is compared with 0: 1 on three tokens, 3 on two
    apart, _ = reinforce_plus_plus_baseline(REWARDS, MASK, torch.tensor([0, 1]), CONFIG)
    assert apart[MASK].tolist() == pytest.approx(whitened(1, 1, 1, 3, 3))


def test_gae_worked_on_paper():
    # gamma 1, lambda 0.5. Row 1: deltas 0 + 0.25 - 0.5 = -0.25; 0 + 0.5 - 0.25 = 0.25; 1 - 0.5 = 0.5
    #   sums 0.5; 0.25 + 0.25 = 0.5; -0.25 + 0.25 = 0      returns 0.5, 0.75, 1
    # Row 2: deltas 2 + 2 - 1 = 3; 1 - 2 = -1;  sums -1; 3 - 0.5 = 2.5      returns 3.5, 1
    advantages, returns = gae(REWARDS, MASK, GROUP, AlgorithmConfig(lambd=0.5), VALUES)
    torch.testing.assert_close(returns, torch.tensor([[0.5, 0.75, 1.0], [3.5, 1.0, 0.0]]))
    assert advantages[MASK].tolist() == pytest.approx(whitened(0, 0.5, 0.5, 2.5, -1))
    assert advantages[1, 2] == 0


def test_gae_with_lambda_1_is_the_return_minus_the_value():
    advantages, returns = gae(REWARDS, MASK, GROUP, CONFIG, VALUES)
    torch.testing.assert_close(returns, torch.tensor([[1.0, 1.0, 1.0], [3.0, 1.0, 0.0]]))
    assert advantages[MASK].tolist() == pytest.approx(whitened(0.5, 0.75, 0.5, 2.0, -1.0))


def test_gae_with_lambda_0_looks_one_token_ahead():
    _, returns = gae(REWARDS, MASK, GROUP, AlgorithmConfig(lambd=0.0), VALUES)
    # reward + next value: 0.25, 0.5, 1 and 2 + 2, 1
    torch.testing.assert_close(returns, torch.tensor([[0.25, 0.5, 1.0], [4.0, 1.0, 0.0]]))


def test_what_the_mask_leaves_out_does_not_exist():
    """The env's tokens in the middle: as if the policy's stood side by side."""
    rewards, values = torch.tensor([[0.5, 7.0, 7.0, 1.0]]), torch.tensor([[0.1, 5.0, 5.0, 0.2]])
    mask, config = torch.tensor([[True, False, False, True]]), AlgorithmConfig(gamma=0.9, lambd=0.8)
    short = gae(rewards[:, [0, 3]], mask[:, [0, 3]], GROUP[:1], config, values[:, [0, 3]])
    long = gae(rewards, mask, GROUP[:1], config, values)
    for got, want in zip(long, short, strict=True):
        torch.testing.assert_close(got[:, [0, 3]], want)
        assert got[0, 1] == got[0, 2] == 0
    assert reinforce_plus_plus(rewards, mask, GROUP[:1], config)[1].tolist() == [
        [pytest.approx(0.5 + 0.9), 0, 0, pytest.approx(1.0)]
    ]


def test_gae_needs_values():
    with pytest.raises(ConfigError, match=r"needs values, and there is no critic. Set trainer.critic.model.path"):
        gae(REWARDS, MASK, GROUP, CONFIG)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 0.97, 1.0]), st.sampled_from([0.0, 0.9, 1.0]))
def test_the_loop_says_the_same(seed, gamma, lambd):
    case = random_case(seed)
    mask = case["mask"]
    advantages, returns = gae(
        case["rewards"], mask, case["group"], AlgorithmConfig(gamma=gamma, lambd=lambd), case["values"]
    )
    plain = torch.zeros_like(case["rewards"])
    for row in range(len(mask)):
        following = running = 0.0
        for t in reversed(mask[row].nonzero()[:, 0].tolist()):
            delta = case["rewards"][row, t] + gamma * following - case["values"][row, t]
            running = delta + gamma * lambd * running
            following = case["values"][row, t]
            plain[row, t] = running
    torch.testing.assert_close(returns, torch.where(mask, plain + case["values"], 0.0))
    torch.testing.assert_close(advantages, whiten(plain, mask))


def test_without_decay_the_sum_is_the_same_as_with_hardly_any():
    case = random_case(7)
    torch.testing.assert_close(
        backward_sum(case["rewards"], case["mask"], 1.0), backward_sum(case["rewards"], case["mask"], 1 - 1e-12)
    )


def test_whiten_on_paper():
    # 1, 3, 5: mean 3, unbiased variance 4
    values, mask = torch.tensor([[1.0, 3.0], [5.0, 99.0]]), torch.tensor([[True, True], [True, False]])
    torch.testing.assert_close(whiten(values, mask), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    assert whiten(values, torch.tensor([[True, False], [False, False]])).tolist() == [[0.0, 0.0], [0.0, 0.0]]  # one
    assert (whiten(torch.full((2, 2), 0.1), mask) == 0).all()  # equals
