"""The value loss and the explained variance, on paper."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.tensors import TensorError
from skyrl_train.algorithms.values import clipped, explained_variance
from skyrl_train.config.algorithm import AlgorithmConfig

from .helpers import BAD, random_case

CONFIG = AlgorithmConfig(value_clip=0.2)
OLD = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 9.0]], dtype=torch.float64)
NEW = torch.tensor([[1.1, 1.5, 0.5], [0.1, -0.5, 9.0]], dtype=torch.float64)
RETURNS = torch.tensor([[2.0, 2.0, 0.0], [1.0, 1.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
# On paper, bounded values old + clip(new - old): 1.1, 1.2, 0.8 | 0.1, -0.2. Errors squared, new | bounded:
#   0.81 | 0.81    0.25 | 0.64    0.25 | 0.64    0.81 | 0.81    2.25 | 1.44        the larger one, halved
LOSS = torch.tensor([[0.405, 0.32, 0.32], [0.405, 1.125, 0.0]], dtype=torch.float64)
# derivative: new - return where that is the larger error, 0 where the bounded one is
GRADIENT = torch.tensor([[-0.9, 0.0, 0.0], [-0.9, -1.5, 0.0]], dtype=torch.float64)


def test_worked_on_paper():
    values = NEW.clone().requires_grad_()
    result = clipped(values, OLD, RETURNS, MASK, CONFIG)
    torch.testing.assert_close(result.per_token.detach(), LOSS)
    (gradient,) = torch.autograd.grad(result.per_token.sum(), values)
    torch.testing.assert_close(gradient, GRADIENT)
    metrics = {name: value.item() for name, value in result.metrics.items()}
    assert metrics["clip_fraction"] == pytest.approx(0.4)
    assert metrics["mean"] == pytest.approx((1.1 + 1.5 + 0.5 + 0.1 - 0.5) / 5)
    assert metrics["error"] == pytest.approx((0.9 + 0.5 + 0.5 + 0.9 + 1.5) / 5)


def test_without_a_clip_it_is_the_squared_error():
    result = clipped(NEW, OLD, RETURNS, MASK, AlgorithmConfig(value_clip=None))
    torch.testing.assert_close(result.per_token, torch.where(MASK, 0.5 * (NEW - RETURNS) ** 2, 0.0))
    assert result.metrics["clip_fraction"] == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.2, None]))
def test_gradient_is_that_of_finite_differences(seed, bound):
    case = random_case(seed, rows=2, width=3)
    moved, error = (case["values"] - case["old_values"]).abs(), case["values"] - case["returns"]
    other = case["old_values"] + (case["values"] - case["old_values"]).clamp(-0.2, 0.2) - case["returns"]
    mask = case["mask"] & ((moved - 0.2).abs() > 1e-2) & ((error.abs() - other.abs()).abs() > 1e-2)
    mask = mask | (case["mask"] & (moved < 0.19))  # there the two are one
    values = case["values"].clone().requires_grad_()
    config = AlgorithmConfig(value_clip=bound)
    loss = lambda v: clipped(v, case["old_values"], case["returns"], mask, config).per_token  # noqa: E731
    assert torch.autograd.gradcheck(loss, (values,))


def test_explained_variance_on_paper():
    # returns 2, 2, 0, 1, 1: variance 0.56; differences to the old values 1, 1, -1, 1, 1: variance 0.64
    assert explained_variance(OLD, RETURNS, MASK).item() == pytest.approx(1 - 0.64 / 0.56)
    assert explained_variance(RETURNS, RETURNS, MASK).item() == 1
    assert explained_variance(torch.zeros_like(OLD), RETURNS, MASK).item() == pytest.approx(0)
    assert explained_variance(OLD, torch.ones_like(OLD), MASK).item() == 0  # nothing to explain
    assert explained_variance(OLD, RETURNS, torch.zeros_like(MASK)).item() == 0


@pytest.mark.parametrize("bad", BAD)
def test_explained_variance_ignores_what_is_masked(bad):
    dirty = [torch.where(MASK, x, bad) for x in (OLD, RETURNS)]
    assert explained_variance(*dirty, MASK) == explained_variance(OLD, RETURNS, MASK)
    with pytest.raises(TensorError, match=r"^returns: shape \[2, 2\]"):
        explained_variance(OLD, RETURNS[:, :2], MASK)
