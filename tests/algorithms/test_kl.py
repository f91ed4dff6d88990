"""KL estimators, their gradients, and the penalty in the reward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.kl import (
    absolute,
    absolute_straight,
    apply_kl_to_rewards,
    k1,
    k1_straight,
    k2,
    k3,
    k3_straight,
)
from skyrl_train.algorithms.table import resolve
from skyrl_train.algorithms.tensors import TensorError

from .helpers import BAD, random_case

ALL = [k1, k2, k3, absolute]
STRAIGHT = {k1_straight: k1, k3_straight: k3, absolute_straight: absolute}
LN2 = math.log(2)
REF = torch.full((2, 3), -1.0, dtype=torch.float64)
X = torch.tensor([[0.0, LN2, -LN2], [2 * LN2, -2 * LN2, 5.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
# On paper, x = logprob - ref: 0, ln 2, -ln 2, 2 ln 2, -2 ln 2 and one masked. ln 2 = 0.693147.
# k3 = exp(-x) - 1 + x:  0;  0.5 - 1 + 0.693147 = 0.193147;  2 - 1 - 0.693147 = 0.306853;
#                        0.25 - 1 + 1.386294 = 0.636294;  4 - 1 - 1.386294 = 1.613706
EXPECTED = {
    k1: [[0, LN2, -LN2], [2 * LN2, -2 * LN2, 0]],
    k2: [[0, LN2**2 / 2, LN2**2 / 2], [2 * LN2**2, 2 * LN2**2, 0]],
    k3: [[0, 0.193147181, 0.306852819], [0.636294361, 1.613705639, 0]],
    absolute: [[0, LN2, LN2], [2 * LN2, 2 * LN2, 0]],
}
# derivative by x:  k1: 1   k2: x   k3: 1 - exp(-x) = 0, 0.5, -1, 0.75, -3   abs: sign
SLOPE = {
    k1: [[1, 1, 1], [1, 1, 0]],
    k2: [[0, LN2, -LN2], [2 * LN2, -2 * LN2, 0]],
    k3: [[0, 0.5, -1], [0.75, -3, 0]],
    absolute: [[0, 1, -1], [1, -1, 0]],
}


@pytest.mark.parametrize("estimator", ALL)
def test_worked_on_paper(estimator):
    logprobs = (REF + X).requires_grad_()
    kl = estimator(logprobs, REF, MASK)
    torch.testing.assert_close(kl, torch.tensor(EXPECTED[estimator], dtype=torch.float64), atol=1e-8, rtol=1e-8)
    kl.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor(SLOPE[estimator], dtype=torch.float64))


@pytest.mark.parametrize("estimator", ALL)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_gradient_is_that_of_finite_differences(estimator, seed):
    case = random_case(seed, rows=2, width=3)
    away = (case["logprobs"] - case["ref_logprobs"]).abs() > 1e-3  # |x| has a kink at 0
    x = case["logprobs"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: estimator(t, case["ref_logprobs"], case["mask"] & away), (x,))


@pytest.mark.parametrize("estimator", STRAIGHT)
def test_the_straight_through_forms_have_the_number_of_one_and_the_gradient_of_k2(estimator):
    logprobs = (REF + X).requires_grad_()
    kl = estimator(logprobs, REF, MASK)
    torch.testing.assert_close(
        kl, torch.tensor(EXPECTED[STRAIGHT[estimator]], dtype=torch.float64), atol=1e-8, rtol=1e-8
    )
    kl.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor(SLOPE[k2], dtype=torch.float64))


def test_k2_is_its_own_straight_through_form():
    assert resolve("kl_estimator", "k2+") is k2


@pytest.mark.parametrize("estimator", ALL)
def test_kl_loss_has_a_gradient_and_the_reference_has_none(estimator):
    logprobs, ref = (REF + X).requires_grad_(), REF.clone().requires_grad_()
    kl = estimator(logprobs, ref, MASK)
    assert kl.requires_grad
    kl.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.abs().sum() > 0 and ref.grad is None


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("estimator", ALL)
def test_masked_positions_change_nothing(estimator, bad):
    logprobs = torch.where(MASK, REF + X, bad).requires_grad_()
    kl = estimator(logprobs, torch.where(MASK, REF, bad), MASK)
    assert torch.equal(kl, estimator(REF + X, REF, MASK))
    kl.sum().backward()
    assert torch.isfinite(logprobs.grad).all() and logprobs.grad[1, 2] == 0


@pytest.mark.parametrize("estimator", ALL)
def test_no_token(estimator):
    assert (estimator(REF + X, REF, torch.zeros_like(MASK)) == 0).all()
    nothing = torch.zeros(0, 3)
    assert estimator(nothing, nothing, torch.zeros(0, 3, dtype=torch.bool)).shape == (0, 3)


def test_k3_is_bounded_and_never_negative():
    x = torch.tensor([[-1e4, -30.0, -3.0, -1e-9, 0.0, 1e-9, 30.0, 1e4]], dtype=torch.float64).requires_grad_()
    kl = k3(x, torch.zeros_like(x), torch.ones(1, 8, dtype=torch.bool))
    assert kl[0, [0, 1, 2, 6, 7]].tolist() == [10.0] * 5  # exp(3) - 1 - 3 = 16.1 is over the limit as well
    assert (kl >= 0).all()
    kl.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_exact_near_zero(dtype):
    # x^2 / 2 to leading order: 5e-9. Computed as exp(-x) - 1 + x, float32 would be off by up to 6e-8.
    x = torch.tensor([[1e-4, -1e-4]], dtype=dtype)
    kl = k3(x, torch.zeros_like(x), torch.ones(1, 2, dtype=torch.bool))
    assert kl[0].tolist() == pytest.approx([5e-9, 5e-9], rel=2e-2)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_unbiased(estimator):
    # Over a vocabulary of three, the mean under the policy is the KL itself.
    p, q = torch.tensor([[0.2, 0.3, 0.5]]).double(), torch.tensor([[0.4, 0.4, 0.2]]).double()
    kl = estimator(p.log(), q.log(), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close((p * kl).sum(), (p * (p.log() - q.log())).sum())


def test_penalty_on_paper():
    # coef 0.1, k1: rewards minus 0.1 x where the policy wrote; the env's token and the padding keep theirs
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.5, 7.0]], dtype=torch.float64)
    new, kl = apply_kl_to_rewards(rewards, REF + X, REF, MASK, k1, 0.1)
    want = [[0.0, -0.1 * LN2, 1 + 0.1 * LN2], [-0.2 * LN2, 0.5 + 0.2 * LN2, 7.0]]
    torch.testing.assert_close(new, torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(kl, k1(REF + X, REF, MASK))
    assert rewards[0, 1] == 0  # the env's rewards stay as they were


def test_penalty_ignores_masked_nan():
    dirty = torch.where(MASK, REF + X, float("nan"))
    new, kl = apply_kl_to_rewards(torch.zeros_like(REF), dirty, REF, MASK, k3, 1.0)
    assert torch.isfinite(new).all() and torch.isfinite(kl).all()


@pytest.mark.parametrize("estimator", ALL)
def test_errors_name_the_tensor(estimator):
    with pytest.raises(TensorError, match=r"^ref_logprobs: shape \[2, 2\]"):
        estimator(REF, REF[:, :2], MASK)
    with pytest.raises(TensorError, match=r"^logprobs: dtype torch.int64"):
        estimator(REF.long(), REF, MASK)
    with pytest.raises(TensorError, match=r"^ref_logprobs: on device meta"):
        estimator(REF, REF.to("meta"), MASK)
