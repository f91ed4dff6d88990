"""Group statistics against a plain loop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.groups import group_stats, scores

from .helpers import BAD


def test_worked_on_paper():
    # group 7: 1, 4 -> mean 2.5, std sqrt((1.5^2 + 1.5^2) / 1) = 2.1213, spread 3; group 2: 5 alone -> mean 5, std 0
    stats = group_stats(torch.tensor([1.0, 5.0, 4.0]), torch.tensor([7, 2, 7]))
    assert stats.size.tolist() == [2, 1, 2]
    assert stats.mean.tolist() == [2.5, 5.0, 2.5]
    torch.testing.assert_close(stats.std, torch.tensor([4.5**0.5, 0.0, 4.5**0.5], dtype=torch.float64))
    assert stats.spread.tolist() == [3.0, 0.0, 3.0]


def test_scores_ignore_what_is_masked():
    rewards = torch.tensor([[1.0, BAD[0], 2.0], [BAD[1], BAD[2], 0.5]])
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert scores(rewards, mask).tolist() == [3.0, 0.5]


def test_equal_scores_deviate_by_exactly_nothing():
    for value in (0.1, 1 / 3, 1e-7, 12345.678):
        stats = group_stats(torch.full((7,), value), torch.zeros(7, dtype=torch.long))
        assert stats.std.tolist() == [0.0] * 7, value
        assert (stats.mean.float() == torch.tensor(value)).all()


def test_no_rows():
    stats = group_stats(torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert stats.size.shape == stats.mean.shape == stats.std.shape == stats.spread.shape == (0,)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-10, 10, width=32)), min_size=1, max_size=12))
def test_the_loop_says_the_same(rows):
    group = torch.tensor([g for g, _ in rows])
    values = torch.tensor([v for _, v in rows], dtype=torch.float64)
    stats = group_stats(values, group)
    for row, number in enumerate(group.tolist()):
        members = values[group == number]
        std = members.std() if len(members) > 1 else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(stats.mean[row], members.mean())
        torch.testing.assert_close(stats.std[row], std, atol=1e-9, rtol=1e-7)
        assert stats.spread[row] == members.max() - members.min()
        assert stats.size[row] == len(members)
