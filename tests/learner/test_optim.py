import math

import pytest
import torch

from skyrl_train.config.models import OptimizerConfig
from skyrl_train.errors import ConfigError
from skyrl_train.learner.optim import go_to, make_optimizer, make_scheduler


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([2.0, -3.0]))


def test_one_step_of_adamw_worked_out_by_hand():
    p = parameter()
    optimizer = make_optimizer([p], OptimizerConfig(lr=0.1, adam_betas=[0.9, 0.95], weight_decay=0.5))
    p.grad = torch.tensor([4.0, -1.0])
    optimizer.step()
    # decay: p * (1 - 0.1 * 0.5); the first step of Adam is lr * sign(gradient)
    assert p.tolist() == pytest.approx([2.0 * 0.95 - 0.1, -3.0 * 0.95 + 0.1], abs=1e-6)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def rates(name: str, warmup: int, total: int, updates: int) -> list[float]:
    p = parameter()
    optimizer = make_optimizer([p], OptimizerConfig(lr=1.0))
    scheduler = make_scheduler(optimizer, name, warmup, total)
    found = []
    for _ in range(updates):
        found.append(scheduler.get_last_lr()[0])
        p.grad = torch.zeros(2)
        optimizer.step()
        scheduler.step()
    return found


def test_schedules():
    assert rates("constant_with_warmup", 2, 6, 4) == pytest.approx([0, 0.5, 1, 1])
    assert rates("linear", 0, 4, 5) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert rates("cosine", 1, 5, 5) == pytest.approx([0, *((1 + math.cos(math.pi * k / 4)) / 2 for k in range(4))])


@pytest.mark.parametrize("name", ["cosin", "", "reduce"])
def test_an_unknown_schedule_names_the_key(name):
    with pytest.raises(ConfigError, match=r"trainer.policy.optimizer_config.scheduler"):
        rates(name, 0, 10, 1)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine_with_restarts", "polynomial", "inverse_sqrt"])
def test_going_to_a_place_in_a_schedule_is_having_walked_there(name):
    walked = rates(name, 2, 9, 9)
    for place in range(9):
        optimizer = make_optimizer([parameter()], OptimizerConfig(lr=1.0))
        scheduler = make_scheduler(optimizer, name, 2, 9)
        go_to(scheduler, place)
        assert scheduler.get_last_lr() == [walked[place]] == [optimizer.param_groups[0]["lr"]]
        optimizer.step()
        scheduler.step()
        assert place == 8 or scheduler.get_last_lr() == [walked[place + 1]]
