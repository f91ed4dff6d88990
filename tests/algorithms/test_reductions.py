"""Reductions: one denominator for the whole mini-batch, however it is cut."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.losses import regular
from skyrl_train.algorithms.reductions import effective_denominator, token_weights, weighted_sum
from skyrl_train.algorithms.tensors import TensorError
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.errors import ConfigError

from .helpers import BAD, random_case

NAMES = ["token_mean", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean"]
LOSS = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0]])
MASK = torch.tensor([[True, True, True], [True, False, False]])
GROUP = torch.tensor([0, 1])
# On paper: token_mean (1 + 2 + 3 + 10) / 4 = 4;  sequence_mean (6 / 3 + 10 / 1) / 2 = 6;
# seq_mean_token_sum_norm with max_seq_len 8: (6 / 8 + 10 / 8) / 2 = 1; prompt_mean, two prompts of one sample each: 6
ON_PAPER = {"token_mean": 4.0, "sequence_mean": 6.0, "seq_mean_token_sum_norm": 1.0, "prompt_mean": 6.0}
DENOMINATOR = {"token_mean": 4.0, "sequence_mean": 4.0, "seq_mean_token_sum_norm": 16.0, "prompt_mean": 4.0}


def config(name: str) -> AlgorithmConfig:
    return AlgorithmConfig(loss_reduction=name, max_seq_len=8)


@pytest.mark.parametrize("name", NAMES)
def test_worked_on_paper(name):
    weights = token_weights(MASK, GROUP, config(name))
    assert weights.dtype == torch.float32
    assert weighted_sum(LOSS, weights).item() == pytest.approx(ON_PAPER[name])
    assert effective_denominator(weights) == pytest.approx(DENOMINATOR[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_without_tokens(name):
    mask = torch.tensor([[True, True, True], [False, False, False]])
    got = weighted_sum(LOSS, token_weights(mask, GROUP, config(name))).item()
    # token_mean 6 / 3; the others still divide by two sequences, or prompts: (2 + 0) / 2 and (6 / 8 + 0) / 2
    want = {"token_mean": 2.0, "sequence_mean": 1.0, "seq_mean_token_sum_norm": 0.375, "prompt_mean": 1.0}
    assert got == pytest.approx(want[name])


def test_prompt_mean_on_paper():
    # prompt 7 has the rows 0 and 2: (1 + 2 + 3 + 4 + 5) / 5 = 3; prompt 1 has the row 1: 10. (3 + 10) / 2 = 6.5
    loss = torch.tensor([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0], [4.0, 5.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    weights = token_weights(mask, torch.tensor([7, 1, 7]), config("prompt_mean"))
    assert weighted_sum(loss, weights).item() == pytest.approx(6.5)


def test_the_legacy_mean_on_paper():
    # micro-batches of two rows: (2 + 4 + 6) / 3 = 4 and (10 + 12 + 14 + 16) / 4 = 13; their mean 8.5
    loss = torch.tensor([[2.0, 4.0], [6.0, 8.0], [10.0, 12.0], [14.0, 16.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    group, legacy = torch.arange(4), config("token_mean_legacy")
    assert weighted_sum(loss, token_weights(mask, group, legacy, 2)).item() == pytest.approx(8.5)
    # of three rows: (2 + 4 + 6 + 10 + 12) / 5 = 6.8 and 15, the last one being short: 10.9
    assert weighted_sum(loss, token_weights(mask, group, legacy, 3)).item() == pytest.approx(10.9)
    # all in one: token_mean, 64 / 7
    whole = token_weights(mask, group, config("token_mean"))
    assert torch.equal(token_weights(mask, group, legacy, 4), whole)


def test_the_legacy_mean_needs_the_size_of_micro_batches():
    with pytest.raises(ConfigError, match="loss_reduction='token_mean_legacy': depends on the micro-batch size"):
        token_weights(MASK, GROUP, config("token_mean_legacy"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_no_token_at_all(name, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    weights = token_weights(mask, torch.zeros(shape[0], dtype=torch.long), config(name))
    assert (weights == 0).all() and weights.shape == shape
    assert effective_denominator(weights) == 0
    assert weighted_sum(torch.full(shape, float("nan")), weights) == 0


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_masked_losses_do_not_enter(name, bad):
    dirty = torch.where(MASK, LOSS, bad).requires_grad_()
    total = weighted_sum(dirty, token_weights(MASK, GROUP, config(name)))
    assert total.item() == pytest.approx(ON_PAPER[name])
    total.backward()
    assert dirty.grad is not None and torch.isfinite(dirty.grad).all() and (dirty.grad[1, 1:] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(6)), cuts=st.sets(st.integers(1, 5)))
def test_loss_and_gradient_do_not_depend_on_the_cut(name, seed, order, cuts):
    """Micro-batches of any sizes, or ranks, in any order of rows, with any padding."""
    case = random_case(seed)
    settings_ = config(name)

    def gradient(parts: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        wide = {k: v if k == "group" else torch.nn.functional.pad(v, (0, pad)) for k, v in case.items()}
        weights = token_weights(wide["mask"], wide["group"], settings_)
        x = wide["logprobs"].clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for rows in parts:
            result = regular(
                x[rows], wide["old_logprobs"][rows], wide["advantages"][rows], wide["mask"][rows], settings_
            )
            part = weighted_sum(result.per_token, weights[rows])
            part.backward()
            total += part.detach()
        assert x.grad is not None
        return total, x.grad[:, : x.shape[1] - pad]

    edges = sorted({0, 6} | cuts)
    whole, one_piece = gradient([list(range(6))], 0)
    split, pieces = gradient([list(order[a:b]) for a, b in itertools.pairwise(edges)], 2)
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(pieces, one_piece)


def test_a_mean_of_micro_batch_means_is_something_else():
    """What this design excludes: the mean over rows of each row's mean is sequence_mean, not token_mean."""
    weights = token_weights(MASK, GROUP, config("token_mean"))
    per_row = torch.stack([token_weights(MASK[i : i + 1], GROUP[i : i + 1], config("token_mean"))[0] for i in range(2)])
    assert weighted_sum(LOSS, per_row / 2).item() == pytest.approx(6.0)
    assert weighted_sum(LOSS, weights).item() == pytest.approx(4.0)


@pytest.mark.parametrize("length", [None, 0])
def test_max_seq_len_is_needed(length):
    settings_ = AlgorithmConfig(loss_reduction="seq_mean_token_sum_norm", max_seq_len=length)
    with pytest.raises(ConfigError, match=r"trainer\.algorithm\.max_seq_len=.*Set it to"):
        token_weights(MASK, GROUP, settings_)


def test_unknown_name():
    with pytest.raises(ConfigError, match="Did you mean 'token_mean'"):
        token_weights(MASK, GROUP, config("token_means"))


def test_a_users_own():
    weights = token_weights(MASK, GROUP, config(f"{__package__}.helpers:my_weights"))
    assert weights.tolist() == [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]


def test_errors_name_the_tensor():
    with pytest.raises(TensorError, match=r"^mask: dtype torch.int64"):
        token_weights(MASK.long(), GROUP, config("token_mean"))
    with pytest.raises(TensorError, match=r"^group: shape \[1\]"):
        token_weights(MASK, GROUP[:1], config("token_mean"))
