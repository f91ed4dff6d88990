"""GRPO and the batch normalisation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.advantages import batch_normalize, grpo
from skyrl_train.algorithms.tensors import TensorError
from skyrl_train.config.algorithm import AlgorithmConfig

from .helpers import BAD, random_case

CONFIG = AlgorithmConfig()
NO_STD = AlgorithmConfig(grpo_norm_by_std=False)
REWARDS = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.5, -0.5]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
GROUP = torch.tensor([0, 0])
# On paper: the third token of the second row is padding, so the scores are 1 and 0.5, their mean 0.75.
# Deviations +0.25 and -0.25; unbiased variance (0.0625 + 0.0625) / 1 = 0.125, std 0.353553.
# Advantages +-0.25 / (0.353553 + 0.000001) = +-0.707105.


def test_worked_on_paper():
    advantages, returns = grpo(REWARDS, MASK, GROUP, CONFIG)
    a = 0.25 / (0.125**0.5 + 1e-6)
    torch.testing.assert_close(advantages, torch.tensor([[a, a, a], [-a, -a, 0.0]]))
    assert torch.equal(returns, advantages)
    assert advantages.dtype == torch.float32


def test_without_std():
    advantages, _ = grpo(REWARDS, MASK, GROUP, NO_STD)
    assert advantages.tolist() == [[0.25, 0.25, 0.25], [-0.25, -0.25, 0.0]]


def test_a_group_of_one_gets_its_score():
    # mean 0, std 1: 0.5 / 1.000001
    advantages, _ = grpo(torch.tensor([[0.5]]), torch.tensor([[True]]), torch.tensor([4]), CONFIG)
    assert advantages.item() == pytest.approx(0.5 / 1.000001)
    advantages, _ = grpo(torch.tensor([[0.5]]), torch.tensor([[True]]), torch.tensor([4]), NO_STD)
    assert advantages.item() == 0.5


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -7.3])
def test_equal_rewards_give_exactly_zero(value):
    rewards = torch.full((7, 1), value)
    advantages, _ = grpo(rewards, torch.ones(7, 1, dtype=torch.bool), torch.zeros(7, dtype=torch.long), CONFIG)
    assert (advantages == 0).all()


def test_one_token_and_no_token():
    rewards = torch.tensor([[1.0, 9.0], [0.0, 9.0]])
    mask = torch.tensor([[True, False], [False, False]])
    advantages, _ = grpo(rewards, mask, GROUP, NO_STD)
    assert advantages.tolist() == [[0.5, 0.0], [0.0, 0.0]]  # scores 1 and 0: the empty response counts as 0


@pytest.mark.parametrize("bad", BAD)
def test_masked_rewards_change_nothing(bad):
    dirty = torch.where(MASK, REWARDS, bad)
    assert torch.equal(grpo(dirty, MASK, GROUP, CONFIG)[0], grpo(REWARDS, MASK, GROUP, CONFIG)[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_permuting_rows_and_padding_change_nothing(seed, by_std):
    case = random_case(seed)
    config = CONFIG if by_std else NO_STD
    rewards, mask, group = case["advantages"], case["mask"], case["group"]
    expected, _ = grpo(rewards, mask, group, config)
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(grpo(rewards[order], mask[order], group[order], config)[0], expected[order])
    wider = torch.nn.functional.pad(rewards, (0, 2), value=float("nan"))
    padded, _ = grpo(wider, torch.nn.functional.pad(mask, (0, 2)), group, config)
    assert torch.equal(padded[:, :-2], expected)
    assert (padded[:, -2:] == 0).all()
    torch.testing.assert_close(grpo(rewards, mask, group * 5 - 3, config)[0], expected)  # the numbers are only names


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_the_loop_says_the_same(seed):
    case = random_case(seed)
    rewards, mask, group = case["advantages"], case["mask"], case["group"]
    got, _ = grpo(rewards, mask, group, CONFIG)
    score = (rewards * mask).sum(1)
    for row in range(len(group)):
        members = score[group == group[row]]
        want = score[row] if len(members) == 1 else (score[row] - members.mean()) / (members.std() + 1e-6)
        torch.testing.assert_close(got[row], torch.where(mask[row], want, 0.0), rtol=1e-5, atol=1e-5)


def test_half_precision_is_widened():
    advantages, _ = grpo(REWARDS.bfloat16(), MASK, GROUP, CONFIG)
    assert advantages.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rewards": REWARDS[:, :2]}, r"rewards: shape \[2, 2\], expected that of the mask, \[2, 3\]"),
        ({"rewards": REWARDS.long()}, "rewards: dtype torch.int64, expected a floating one"),
        ({"rewards": REWARDS.to("meta")}, "rewards: on device meta, the mask is on cpu"),
        ({"mask": MASK.float()}, "mask: dtype torch.float32, expected torch.bool"),
        ({"mask": MASK[0]}, r"mask: shape \[3\], expected \[B, T\]"),
        ({"group": torch.zeros(3, dtype=torch.long)}, r"group: shape \[3\], expected \[B\] = \[2\]"),
        ({"group": torch.zeros(2)}, "group: dtype torch.float32, expected an integer one"),
        ({"group": GROUP.to("meta")}, "group: on device meta"),
    ],
)
def test_errors_name_the_tensor(change, text):
    with pytest.raises(TensorError, match=text):
        grpo(**({"rewards": REWARDS, "mask": MASK, "group": GROUP, "config": CONFIG} | change))


def test_batch_normalize_on_paper():
    # Trained tokens: 1, 3, 5 -> mean 3, variance (4 + 0 + 4) / 3 = 2.6667, so -2 / 1.63299, 0, 2 / 1.63299
    values = torch.tensor([[1.0, 3.0, 99.0], [5.0, float("nan"), 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    z = 2 / (8 / 3) ** 0.5
    torch.testing.assert_close(batch_normalize(values, mask), torch.tensor([[-z, 0.0, 0.0], [z, 0.0, 0.0]]))


def test_batch_normalize_of_nothing_and_of_equals():
    ones = torch.ones(2, 3)
    assert (batch_normalize(ones, torch.zeros(2, 3, dtype=torch.bool)) == 0).all()
    assert (batch_normalize(ones, torch.ones(2, 3, dtype=torch.bool)) == 0).all()
