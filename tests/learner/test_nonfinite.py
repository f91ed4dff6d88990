"""Updates that are not finite: skipped, counted, and at last an end with advice."""

from __future__ import annotations

import math

import pytest

from skyrl_train.errors import DivergedError
from skyrl_train.learner.nonfinite import NonFiniteGuard

BAD = [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]


@pytest.mark.parametrize(("loss", "norm"), BAD)
def test_a_loss_or_gradient_that_is_no_number_is_not_admitted(loss: float, norm: float) -> None:
    guard = NonFiniteGuard(limit=2)
    assert guard.admits(0.5, 1.0)
    assert not guard.admits(loss, norm)
    assert (guard.in_a_row, guard.total) == (1, 1)


def test_only_a_row_without_a_good_one_between_stops_the_run() -> None:
    guard = NonFiniteGuard(limit=3)
    for _ in range(5):
        assert not guard.admits(math.nan, 1.0)
        assert not guard.admits(1.0, math.inf)
        assert guard.admits(1.0, 1.0)
    assert (guard.in_a_row, guard.total) == (0, 10)


def test_the_end_carries_the_numbers_and_the_advice() -> None:
    guard = NonFiniteGuard(limit=3)
    guard.admits(math.nan, 2.0)
    guard.admits(math.nan, 2.0)
    with pytest.raises(DivergedError, match="3 updates in a row") as raised:
        guard.admits(math.nan, 2.5)
    for part in ("loss nan", "norm 2.5", "trainer.max_skipped_updates=3", "optimizer_config.lr", "max_grad_norm",
                 "kl_loss_coef", "eps_clip_low"):  # fmt: skip
        assert part in str(raised.value)


def test_a_limit_of_one_stops_at_the_first() -> None:
    with pytest.raises(DivergedError):
        NonFiniteGuard(limit=1).admits(1.0, math.nan)
