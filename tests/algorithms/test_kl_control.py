"""The KL controller: worked on paper, bounded, and taken back from a checkpoint."""

import pytest

from skyrl_train.algorithms.kl_control import KLController
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.algorithm_sections import KLControlConfig


def controller(coef: float = 0.2, **changes) -> KLController:
    control = KLControlConfig(**({"type": "adaptive", "kl_target": 0.1, "horizon": 100} | changes))
    return KLController(AlgorithmConfig(kl_loss_coef=coef, kl_ctrl=control))


@pytest.mark.parametrize(
    ("kl", "sequences", "factor"),
    [
        (0.2, 10, 1.02),  # error 1, bounded to 0.2: 1 + 0.2 * 10 / 100
        (0.11, 10, 1.01),  # error 0.1
        (0.1, 10, 1.0),
        (0.09, 10, 0.99),
        (0.0, 10, 0.98),  # error -1, bounded to -0.2
        (-5.0, 10, 0.98),  # k1 of a batch may be negative
        (0.2, 1000, 3.0),
    ],
)
def test_one_step_on_paper(kl, sequences, factor):
    one = controller()
    one.update(kl, sequences)
    assert one.value == pytest.approx(0.2 * factor)


def test_a_fixed_one_stays():
    one = controller(type="fixed")
    one.update(5.0, 1000)
    assert one.value == 0.2 and not one.adaptive


def test_it_settles_where_the_kl_is_the_target():
    """A policy whose KL falls as the coefficient rises: kl = 0.02 / coef."""
    one = controller()
    for _ in range(200):
        one.update(0.02 / one.value, 10)
    assert one.value == pytest.approx(0.2, rel=1e-3)
    one.value = 3.0
    for _ in range(400):
        one.update(0.02 / one.value, 10)
    assert one.value == pytest.approx(0.2, rel=1e-2)


def test_the_state_goes_on_and_a_fixed_one_is_the_configs():
    one, two = controller(), controller()
    one.update(1.0, 50)
    two.load_state_dict(one.state_dict())
    assert two.value == one.value != 0.2
    lowered = controller(coef=0.01, type="fixed")
    lowered.load_state_dict({"value": 0.2})
    assert lowered.value == 0.01
