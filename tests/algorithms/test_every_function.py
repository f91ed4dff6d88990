"""What holds for every function of every family, whatever it computes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.algorithms.cases import LEARNED, Subject
from skyrl_train.algorithms.losses_covariance import chooser_of
from skyrl_train.algorithms.table import FAMILIES, resolve
from skyrl_train.algorithms.tensors import TensorError
from skyrl_train.config.algorithm_sections import CispoConfig

from .helpers import BAD, BUILT_IN, busy_config, call, named, random_case, tensor_of

ids = [f"{family}-{name}" for family, name in BUILT_IN]
every = pytest.mark.parametrize(("family", "name"), BUILT_IN, ids=ids)
learned = pytest.mark.parametrize(("family", "name"), named(*LEARNED))
BY_ROW = [*named("policy_loss", "value_loss", "kl_estimator", "off_policy_correction", "reward_shaping")]
BY_GROUP = [("advantage_estimator", name) for name in ("grpo", "dr_grpo", "rloo", "maxrl", "opo", "remax")]
"""Estimators that compare within groups only; the others whiten over the batch."""
WIDE = ("mask", "logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages", "rewards", "values",
        "old_values", "returns")  # fmt: skip


def with_gradient(family: str, name: str, case: dict, **extra) -> tuple[torch.Tensor, torch.Tensor | None, dict]:
    """The result, the gradient of its sum, and its metrics."""
    found = Subject(family, name, busy_config()).run(case, **extra)
    return found.tensor, found.gradient, found.metrics


def same(a, b) -> bool:
    return a is b is None or torch.equal(a, b)


@every
@pytest.mark.parametrize("bad", BAD)
def test_masked_positions_change_nothing(family, name, bad):
    """NaN and inf there: the same result, the same gradient, the same metrics, to the bit."""
    clean = random_case(5)
    dirty = {k: torch.where(clean["mask"], v, bad) if k in WIDE[1:] else v for k, v in clean.items()}
    want, got = with_gradient(family, name, clean), with_gradient(family, name, dirty)
    assert torch.equal(got[0], want[0]) and same(got[1], want[1]) and got[2] == want[2]
    assert torch.isfinite(got[0]).all() and (got[0][~clean["mask"]] == 0).all()


@every
def test_no_token_at_all(family, name):
    case = random_case(1)
    case["mask"] = torch.zeros_like(case["mask"])
    tensor, gradient, metrics = with_gradient(family, name, case)
    assert (tensor == 0).all() and (gradient is None or (gradient == 0).all())
    assert all(value == 0 for value in metrics.values()), metrics


@every
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1), (6, 1)])
def test_small_shapes(family, name, shape):
    case = {k: v[: shape[0], : shape[1]] if v.dim() == 2 else v[: shape[0]] for k, v in random_case(2).items()}
    case["mask"] = torch.ones_like(case["mask"])
    tensor, _, metrics = with_gradient(family, name, case)
    assert tensor.shape == shape and torch.isfinite(tensor).all()
    assert all(value == value for value in metrics.values())


@every
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_rows_and_more_padding_change_nothing(family, name, seed):
    case = random_case(seed)
    if name == "token_mean_legacy":
        return  # by definition it depends on which rows share a micro-batch
    want, gradient, metrics = with_gradient(family, name, case)
    order = torch.randperm(len(case["group"]), generator=torch.Generator().manual_seed(seed))
    moved = {k: v[order] for k, v in case.items()}
    got, moved_gradient, moved_metrics = with_gradient(family, name, moved)
    torch.testing.assert_close(got, want[order])
    assert gradient is None or torch.allclose(moved_gradient, gradient[order])
    assert moved_metrics == pytest.approx(metrics)
    pad = {k: torch.nn.functional.pad(v, (0, 3), value=False if k == "mask" else BAD[0]) for k, v in case.items()
           if v.dim() == 2}  # fmt: skip
    got, padded_gradient, padded_metrics = with_gradient(family, name, case | pad)
    torch.testing.assert_close(got[:, :-3], want)
    assert (got[:, -3:] == 0).all() and padded_metrics == pytest.approx(metrics)
    assert gradient is None or (padded_gradient[:, -3:] == 0).all()


@pytest.mark.parametrize(("family", "name"), BY_ROW)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.sets(st.integers(1, 5)))
def test_micro_batches_and_ranks_change_nothing(family, name, seed, cuts):
    """Rows are computed apart, however they are cut; what a loss must know of the others, its chooser has told it."""
    case, extra = random_case(seed), {}
    chooser = chooser_of(resolve(family, name))
    if chooser is not None:
        arguments = (case[n] for n in ("logprobs", "old_logprobs", "advantages", "mask"))
        extra["chosen"] = chooser(*arguments, busy_config())
    want, gradient, _ = with_gradient(family, name, case, **extra)
    for a, b in itertools.pairwise(sorted({0, 6} | cuts)):
        part = {k: v[a:b] for k, v in case.items()}
        got, part_gradient, _ = with_gradient(family, name, part, **{k: v[a:b] for k, v in extra.items()})
        torch.testing.assert_close(got, want[a:b])
        assert gradient is None or torch.allclose(part_gradient, gradient[a:b])


@pytest.mark.parametrize(("family", "name"), BY_GROUP)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_groups_may_be_scored_apart(family, name, seed):
    case = random_case(seed)
    want = tensor_of(call(family, name, case))
    for number in case["group"].unique():
        rows = case["group"] == number
        torch.testing.assert_close(tensor_of(call(family, name, {k: v[rows] for k, v in case.items()})), want[rows])


@pytest.mark.parametrize(("family", "name"), named("advantage_estimator"))
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -7.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_teach_nothing(family, name, value, dtype):
    """Exactly: no residue that a tiny deviation would blow up. (GAE compares with the values, and ReMax with a greedy
    trajectory: where those are right too, there is nothing to learn either.)"""
    rows, width = 7, 3
    case = random_case(0, rows, width, dtype) | {
        "mask": torch.ones(rows, width, dtype=torch.bool), "group": torch.tensor([0, 0, 0, 1, 1, 1, 1]),
        "rewards": torch.tensor([[0.0, 0.0, value]] * rows, dtype=dtype),
        "values": torch.full((rows, width), value, dtype=dtype), "baseline": torch.full((rows,), value, dtype=dtype),
    }  # fmt: skip
    for leave_one_out in (False, True):
        config = busy_config(gamma=1.0, lambd=1.0, leave_one_out_baseline=leave_one_out)
        advantages, returns = call(family, name, case, config)
        assert (advantages == 0).all(), advantages
        assert torch.isfinite(returns).all()


@learned
def test_gradients_flow_to_what_is_learned_and_nowhere_else(family, name):
    case = random_case(3)
    for key in WIDE[1:]:
        case[key] = case[key].requires_grad_()
    tensor_of(call(family, name, case)).sum().backward()
    moved = {key for key in WIDE[1:] if case[key].grad is not None and (case[key].grad != 0).any()}
    assert moved == {LEARNED[family]}


@pytest.mark.parametrize(("family", "name"), [f for f in BUILT_IN if f[0] not in LEARNED])
def test_the_others_carry_no_gradient(family, name):
    case = random_case(3)
    for key in WIDE[1:]:
        case[key] = case[key].requires_grad_()
    assert not tensor_of(call(family, name, case)).requires_grad


@every
@pytest.mark.parametrize(("given_as", "comes_back"), [("bfloat16", "float32"), ("float32", "float32")])
def test_half_precision_is_widened(family, name, given_as, comes_back):
    dtype = getattr(torch, given_as)
    case = {k: v.to(dtype) if v.is_floating_point() else v for k, v in random_case(4).items()}
    assert tensor_of(call(family, name, case)).dtype == getattr(torch, comes_back)


@every
def test_errors_name_the_tensor(family, name):
    case = random_case(0)
    for key in FAMILIES[family].parameters:
        if key in ("mask", "group", "config") or (name == "cross_entropy" and key == "advantages"):
            continue
        unread = key == "values" and name not in ("gae", "clipped")
        if unread or (key == "rollout_logprobs" and family == "policy_loss" and name not in ANCHORED):
            continue
        for wrong, text in ((case[key][:, :2], r"shape \[6, 2\]"), (case[key].long(), "dtype torch.int64"),
                            (case[key].to("meta"), "on device meta")):  # fmt: skip
            with pytest.raises(TensorError, match=rf"^{key}: {text}"):
                call(family, name, case | {key: wrong})
    if family == "loss_reduction":
        return  # token_weights looks at the mask and the group for all of them
    with pytest.raises(TensorError, match=r"^mask: dtype torch\.float32"):
        call(family, name, case | {"mask": case["mask"].float()})
    if "group" in FAMILIES[family].parameters:
        with pytest.raises(TensorError, match=r"^group: shape \[5\], expected \[B\] = \[6\]"):
            call(family, name, case | {"group": case["group"][:5]})
        with pytest.raises(TensorError, match=r"^group: dtype torch\.float32"):
            call(family, name, case | {"group": case["group"].float()})


ANCHORED = ("cispo", "rollout_is", "dppo", "decoupled")


@pytest.mark.parametrize("name", ["rollout_is", "decoupled"])
def test_losses_relative_to_the_engine_need_its_log_probs(name):
    from skyrl_train.errors import ConfigError

    case = random_case(0)
    with pytest.raises(ConfigError, match=rf"policy_loss_type='{name}': needs the engine's log-probs"):
        call("policy_loss", name, case | {"rollout_logprobs": None})


SMOOTH = ("regular", "dual_clip", "sapo", "dppo", "decoupled", "importance_sampling", "reinforce", "cross_entropy",
          "clip_cov", "kl_cov")  # fmt: skip
"""Policy losses whose gradient is that of their value; the others hold a part of it still."""


@pytest.mark.parametrize("name", SMOOTH)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_gradients_of_policy_losses_are_those_of_finite_differences(name, seed):
    case = random_case(seed, rows=2, width=3)
    config = busy_config()
    ratios = (case["logprobs"] - case["old_logprobs"]).exp(), (case["logprobs"] - case["rollout_logprobs"]).exp()
    for bound in (0.8, 1.0, 1.3, config.clip_ratio_c):  # there is no derivative at a bound
        for ratio in ratios:
            case["mask"] &= (ratio - bound).abs() > 1e-2
    moved = (case["logprobs"].exp() - case["rollout_logprobs"].exp()).abs()
    case["mask"] &= (moved - config.dppo.delta_low).abs() > 1e-3
    chooser = chooser_of(resolve("policy_loss", name))
    extra = {}
    if chooser is not None:
        names = ("logprobs", "old_logprobs", "advantages", "mask")
        extra["chosen"] = chooser(*(case[n] for n in names), config)
    x = case["logprobs"].clone().requires_grad_()

    def loss(logprobs):
        return call("policy_loss", name, case | {"logprobs": logprobs}, config, **extra).per_token

    assert torch.autograd.gradcheck(loss, (x,))


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_gspos_gradient_is_that_of_the_sequences_ratio(seed):
    """A sequence has one advantage, as GRPO gives it; the token form then sums to the sequence form."""
    case = random_case(seed, rows=3, width=4)
    case["advantages"] = case["advantages"][:, :1].expand(-1, 4)
    config = busy_config(eps_clip_low=10.0, eps_clip_high=10.0)  # there is no derivative at a bound
    x = case["logprobs"].clone().requires_grad_()

    def loss(logprobs):
        return call("policy_loss", "gspo", case | {"logprobs": logprobs}, config).per_token.sum()

    assert torch.autograd.gradcheck(loss, (x,))


@pytest.mark.parametrize(("name", "behaviour"), [("cispo", "old_logprobs"), ("rollout_is", "rollout_logprobs")])
def test_inside_the_bounds_a_weighted_log_prob_has_the_gradient_of_the_ratio(name, behaviour):
    """``sg(r) grad log p = grad r``; that of ``importance_sampling`` is compared with finite differences above."""
    case = random_case(3)
    wide = busy_config(eps_clip_low=1.0, eps_clip_high=100.0, cispo=CispoConfig(cispo_eps_clip_high=100.0))
    got = Subject("policy_loss", name, wide).run(case).gradient
    want = Subject("policy_loss", "importance_sampling", wide).run(case | {"old_logprobs": case[behaviour]}).gradient
    assert got is not None and want is not None and want.any()
    torch.testing.assert_close(got, want)
