"""The PPO clip: values, sides, gradients, masks."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.losses import merge_metrics, merge_updates, regular
from skyrl_train.algorithms.tensors import TensorError
from skyrl_train.config.algorithm import AlgorithmConfig

from .helpers import BAD, random_case

CONFIG = AlgorithmConfig(eps_clip_low=0.2, eps_clip_high=0.3)
OLD = torch.full((2, 3), -1.0, dtype=torch.float64)
RATIO = torch.tensor([[1.0, 1.5, 0.5], [1.5, 0.5, 1.1]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, 5.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
# On paper, bounds 0.8 and 1.3, loss = -min(r A, clip(r) A):
#   A = 1:  r = 1   -> -1          r = 1.5 -> -min(1.5, 1.3) = -1.3, clipped above    r = 0.5 -> -min(0.5, 0.8) = -0.5
#   A = -2: r = 1.5 -> -min(-3, -2.6) = 3        r = 0.5 -> -min(-1, -1.6) = 1.6, clipped below      masked -> 0
LOSS = torch.tensor([[-1.0, -1.3, -0.5], [3.0, 1.6, 0.0]], dtype=torch.float64)
# d loss / d logprob = -A r where it is not clipped, 0 where it is
GRADIENT = torch.tensor([[-1.0, 0.0, -0.5], [3.0, 0.0, 0.0]], dtype=torch.float64)


def logprobs() -> torch.Tensor:
    return (OLD + RATIO.log()).requires_grad_()


def test_worked_on_paper():
    x = logprobs()
    result = regular(x, OLD, ADVANTAGES, MASK, CONFIG)
    torch.testing.assert_close(result.per_token, LOSS)
    (gradient,) = torch.autograd.grad(result.per_token.sum(), x)
    torch.testing.assert_close(gradient, GRADIENT)
    metrics = {name: value.item() for name, value in result.metrics.items()}
    assert all(value.dim() == 0 and not value.requires_grad for value in result.metrics.values())
    # five trained tokens, ratios 1, 1.5, 0.5, 1.5, 0.5: mean 1, max 1.5; one clipped above, one below
    assert metrics["ratio_mean"] == pytest.approx(1.0)
    assert metrics["ratio_max"] == pytest.approx(1.5)
    assert metrics["clip_fraction_high"] == pytest.approx(0.2)
    assert metrics["clip_fraction_low"] == pytest.approx(0.2)
    # k3 to the old policy, r - log r - 1: (0 + 2 (0.5 - log 1.5) + 2 (-0.5 - log 0.5)) / 5
    assert metrics["old_kl"] == pytest.approx((2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5))) / 5)


def test_before_the_first_update_the_gradient_is_plain_policy_gradient():
    x = OLD.clone().requires_grad_()
    result = regular(x, OLD, ADVANTAGES, MASK, CONFIG)
    (gradient,) = torch.autograd.grad(result.per_token.sum(), x)
    torch.testing.assert_close(gradient, torch.where(MASK, -ADVANTAGES, 0.0))
    assert result.metrics["ratio_max"] == result.metrics["ratio_mean"] == 1
    assert result.metrics["old_kl"] == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_gradient_is_that_of_finite_differences(seed):
    case = random_case(seed, rows=2, width=3)
    ratio = (case["logprobs"] - case["old_logprobs"]).exp()
    kink = ((ratio - 0.8).abs() < 1e-3) | ((ratio - 1.3).abs() < 1e-3)
    mask = case["mask"] & ~kink  # there is no derivative at a bound
    x = case["logprobs"].clone().requires_grad_()
    loss = lambda t: regular(t, case["old_logprobs"], case["advantages"], mask, CONFIG).per_token  # noqa: E731
    assert torch.autograd.gradcheck(loss, (x,))


@pytest.mark.parametrize("bad", BAD)
def test_masked_positions_change_nothing(bad):
    x = logprobs()
    clean = regular(x, OLD, ADVANTAGES, MASK, CONFIG)
    (gradient,) = torch.autograd.grad(clean.per_token.sum(), x)
    y = torch.where(MASK, logprobs().detach(), bad).requires_grad_()
    dirty = regular(y, torch.where(MASK, OLD, bad), torch.where(MASK, ADVANTAGES, bad), MASK, CONFIG)
    (dirty_gradient,) = torch.autograd.grad(dirty.per_token.sum(), y)
    assert torch.equal(dirty.per_token, clean.per_token)
    assert torch.equal(dirty_gradient, gradient)
    assert dirty.metrics == clean.metrics


def test_empty_mask():
    x = logprobs()
    result = regular(x, OLD, ADVANTAGES, torch.zeros_like(MASK), CONFIG)
    (gradient,) = torch.autograd.grad(result.per_token.sum(), x)
    assert (result.per_token == 0).all() and (gradient == 0).all()
    assert all(value == 0 for value in result.metrics.values())


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
def test_small_shapes(shape):
    zeros, mask = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    result = regular(zeros, zeros, zeros, mask, CONFIG)
    assert result.per_token.shape == shape
    assert all(torch.isfinite(value) for value in result.metrics.values())


def test_a_huge_ratio_stays_finite():
    x = torch.zeros(1, 2, requires_grad=True)
    old = torch.tensor([[-500.0, 500.0]])
    result = regular(x, old, torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool), CONFIG)
    result.per_token.sum().backward()
    assert result.per_token[0, 0].item() == pytest.approx(math.exp(20), rel=1e-5)
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_no_gradient_to_the_old_policy_or_the_advantages():
    old, advantages = OLD.clone().requires_grad_(), ADVANTAGES.clone().requires_grad_()
    x = logprobs()
    regular(x, old, advantages, MASK, CONFIG).per_token.sum().backward()
    assert old.grad is None and advantages.grad is None and x.grad is not None


def test_half_precision_is_widened():
    x = logprobs().detach().bfloat16()
    assert regular(x, OLD.bfloat16(), ADVANTAGES.bfloat16(), MASK, CONFIG).per_token.dtype == torch.float32


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages"])
def test_errors_name_the_tensor(name):
    good = {"logprobs": OLD, "old_logprobs": OLD, "advantages": ADVANTAGES, "mask": MASK, "config": CONFIG}
    with pytest.raises(TensorError, match=rf"^{name}: shape \[2, 2\]"):
        regular(**(good | {name: OLD[:, :2]}))
    with pytest.raises(TensorError, match=rf"^{name}: dtype torch.int64"):
        regular(**(good | {name: OLD.long()}))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_metrics_of_micro_batches_merge_to_those_of_the_whole(seed, cuts):
    case = random_case(seed)
    names = ("logprobs", "old_logprobs", "advantages", "mask")

    def metrics(rows: slice) -> dict[str, float]:
        result = regular(*(case[name][rows] for name in names), CONFIG)
        return {name: value.item() for name, value in result.metrics.items()}

    edges = sorted({0, 6, *cuts})
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    merged = merge_metrics([metrics(p) for p in parts], [case["mask"][p].sum().item() for p in parts])
    assert merged == pytest.approx(metrics(slice(None)))


def test_merging_nothing():
    assert merge_metrics([], []) == {}
    assert merge_metrics([{"a": 0.0, "b_max": 0.0}], [0]) == {"a": 0.0, "b_max": 0.0}
    # the empty part's maximum of 0 does not count: all real ones are negative
    assert merge_metrics([{"b_max": 0.0}, {"b_max": -2.0}], [0, 3]) == {"b_max": -2.0}


def test_the_updates_of_a_step():
    updates = [{"a": 1.0, "b_max": 3.0, "c_min": -1.0}, {"a": 2.0, "b_max": 1.0, "c_min": 0.0}, {"a": 6.0, "d": 5.0}]
    assert merge_updates(updates) == {"a": 3.0, "b_max": 3.0, "c_min": -1.0, "d": 5.0}
    assert merge_updates([]) == {}
