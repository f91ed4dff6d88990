from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from skyrl_train.errors import EnvError

Make = Callable[..., Any]
TRUTH = {"secret": 5, "low": 1, "high": 7}


def test_a_game_that_is_won(make: Make) -> None:
    env = make("guess", TRUTH, max_turns=3)
    assert env.init() == [{"role": "user", "content": "question"}]
    assert env.step("4").observations == [{"role": "user", "content": "higher"}]
    assert env.step("I think 6").observations == [{"role": "user", "content": "lower"}]
    last = env.step("5")
    assert (last.reward, last.terminated, last.observations) == (1.0, True, [])
    assert last.metadata == {"won": True, "turns": 3}


def test_a_game_that_is_lost(make: Make) -> None:
    env = make("guess", json.dumps(TRUTH), max_turns=2)
    assert not env.step("1").terminated
    last = env.step("1")
    assert (last.reward, last.terminated, last.observations) == (0.0, True, [])


def test_halving_the_range_wins_within_the_turns_given_by_default(make: Make) -> None:
    for secret in range(1, 101):
        env, low, high = make("guess", {"secret": secret, "low": 1, "high": 100}), 1, 100
        while True:
            middle = (low + high) // 2
            result = env.step(str(middle))
            if result.terminated:
                break
            low, high = (middle + 1, high) if result.observations[0]["content"] == "higher" else (low, middle - 1)
        assert result.reward == 1


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("1 or 2? 6!", "lower"),
        ("<guess>3</guess>", "higher"),
        ("-5", "higher"),
        ("99999999", "lower"),
        ("5.5", "number?"),
        ("five", "number?"),
        ("\u0665", "number?"),
        ("", "number?"),
        ("5" * 500_000, "number?"),
    ],
)
def test_reading_a_guess(make: Make, response: str, answer: str) -> None:
    assert make("guess", TRUTH, max_turns=9).step(response).observations[0]["content"] == answer


@pytest.mark.parametrize("turns", [0, -1, "3", 2.5, True])
def test_a_wrong_number_of_turns_is_named(make: Make, turns: Any) -> None:
    with pytest.raises(EnvError, match=r"extra_info\.max_turns"):
        make("guess", TRUTH, max_turns=turns)
