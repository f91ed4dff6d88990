"""What is done to rewards, and the zero-variance filter."""

import pytest
import torch

from skyrl_train.algorithms.shaping import last_true, standard, zero_variance_filter
from skyrl_train.algorithms.tensors import TensorError
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.errors import ConfigError

from .helpers import BAD

ALL = torch.ones(6, 2, dtype=torch.bool)


def rewards(*last: float) -> torch.Tensor:
    return torch.stack([torch.zeros(len(last)), torch.tensor(last)], dim=1)


def test_worked_on_paper():
    # group 0: 1, 0 differ; group 1: 1, 1 equal; group 2: one row; group 3: one row
    group = torch.tensor([0, 1, 0, 1, 2, 3])
    keep = zero_variance_filter(rewards(1, 1, 0, 1, 0, 1), ALL, group)
    assert keep.tolist() == [True, False, True, False, True, True]


def test_scores_are_compared_not_tokens():
    two_ways = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    assert zero_variance_filter(two_ways, ALL[:2], torch.tensor([0, 0])).tolist() == [False, False]


def test_nearly_equal_is_equal():
    group = torch.tensor([0, 0, 1, 1])
    keep = zero_variance_filter(rewards(0.3, 0.3 + 5e-7, 0.3, 0.3 + 5e-6), ALL[:4], group)
    assert keep.tolist() == [False, False, True, True]


def test_only_live_rows_are_compared():
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    live = torch.tensor([True, True, False, True, False, False])
    keep = zero_variance_filter(rewards(1, 1, 0, 1, 1, 0), ALL, group, live)
    # group 0 differs only through the row that is not trained; group 1 has one live row
    assert keep[live].tolist() == [False, False, True]


def test_no_live_row_and_no_row():
    group = torch.tensor([0, 0])
    assert zero_variance_filter(rewards(1, 0), ALL[:2], group, torch.tensor([False, False])).shape == (2,)
    assert zero_variance_filter(torch.zeros(0, 2), ALL[:0], torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("bad", BAD)
def test_masked_rewards_change_nothing(bad):
    mask = torch.tensor([[True, False], [True, False]])
    dirty = torch.tensor([[1.0, bad], [1.0, 0.0]])
    assert zero_variance_filter(dirty, mask, torch.tensor([0, 0])).tolist() == [False, False]


def test_errors_name_the_tensor():
    with pytest.raises(TensorError, match=r"^rewards: shape"):
        zero_variance_filter(torch.zeros(2, 3), ALL, torch.zeros(6, dtype=torch.long))


class TestStandard:
    REWARDS = torch.tensor([[0.5, 0.0, 1.0, 0.0], [0.0, 2.0, 9.0, 9.0]])
    MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
    GROUP = torch.tensor([0, 0])

    def shaped(self, **settings):
        return standard(self.REWARDS, self.MASK, self.GROUP, AlgorithmConfig(**settings)).tolist()

    def test_by_default_the_envs_rewards(self):
        assert self.shaped() == [[0.5, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 0.0]]

    def test_scale_then_clip(self):
        assert self.shaped(reward_scale=2.0, reward_clip=[-1.0, 1.5]) == [[1.0, 0.0, 1.5, 0.0], [0.0, 1.5, 0.0, 0.0]]

    def test_a_trajectorys_rewards_on_its_last_token(self):
        assert self.shaped(reward_level="trajectory") == [[0.0, 0.0, 0.0, 1.5], [0.0, 2.0, 0.0, 0.0]]

    @pytest.mark.parametrize(
        ("kind", "longest", "last"),
        [
            # lengths 4 and 2, buffer 2, factor 0.5; the rewards there are 0 and 2
            ("soft", 4, (-0.5, 2.0)),  # 4 of 4: whole; 2 of 4: before the buffer
            ("soft", 5, (-0.25, 2.0)),  # 4 is one of two into the buffer 3 to 5
            ("soft", 3, (-0.5, 1.75)),  # 4 is beyond; 2 is one of two into the buffer 1 to 3
            ("hard", 5, (0.0, 2.0)),
            ("hard", 4, (-0.5, 2.0)),
            ("hard", 2, (-0.5, 1.5)),
            ("zero", 4, (-0.5, 2.0)),
        ],
    )
    def test_overlong(self, kind, longest, last):
        settings = {"overlong_buffer_len": 2, "overlong_buffer_penalty_factor": 0.5, "overlong_max_len": longest}
        got = self.shaped(overlong_penalty=kind, **settings)
        assert (got[0][3], got[1][1]) == last
        assert got[0][:3] == [0.5, 0.0, 1.0] and got[1][0] == 0.0  # only the last token pays

    def test_beyond_the_maximum_nothing_is_paid(self):
        got = self.shaped(overlong_penalty="zero", overlong_buffer_len=1, overlong_max_len=3)
        assert got == [[0.0] * 4, [0.0, 2.0, 0.0, 0.0]]

    def test_the_maximum_is_needed(self):
        with pytest.raises(ConfigError, match=r"overlong_max_len=None: the overlong penalty needs the maximum"):
            self.shaped(overlong_penalty="soft")


def test_the_last_true_position():
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    assert last_true(mask).tolist() == [[False, True, False], [False, False, True], [False] * 3]


def test_the_tolerance_is_a_choice():
    group, close = torch.tensor([0, 0]), rewards(0.3, 0.31)
    assert zero_variance_filter(close, ALL[:2], group, tolerance=0.1).tolist() == [False, False]
    assert zero_variance_filter(close, ALL[:2], group, tolerance=0.0).tolist() == [True, True]
