"""The worked games keep to the rules of the game."""

from __future__ import annotations

import random

import pytest

from skyrl_train.data.prepare.guess import play
from skyrl_train.errors import ConfigError


@pytest.mark.parametrize(("low", "high", "turns"), [(1, 7, 3), (1, 15, 5), (-3, 3, 1)])
def test_games_are_legal(low, high, turns):
    rng = random.Random(0)
    for _ in range(500):
        secret = rng.randint(low, high)
        game = play(secret, low, high, turns, 0.5, rng)
        guesses, answers = [int(text) for text in game[::2]], game[1::2]
        assert 1 <= len(guesses) <= turns
        assert len(answers) == len(guesses) - 1
        assert all(low <= guess <= high for guess in guesses)
        assert answers == ["higher" if secret > guess else "lower" for guess in guesses[:-1]]
        assert secret not in guesses[:-1]
        assert guesses[-1] == secret or len(guesses) == turns


def test_feedback_is_what_wins():
    def won(feedback: float) -> float:
        rng = random.Random(1)
        games = [(s, play(s, 1, 7, 3, feedback, rng)) for s in [1, 2, 3, 4, 5, 6, 7] * 300]
        return sum(game[-1] == str(secret) for secret, game in games) / len(games)

    never, half, always = won(0.0), won(0.5), won(1.0)
    assert never == pytest.approx(1 - (6 / 7) ** 3, abs=0.03)
    assert 0.48 < half < 0.57
    assert always > half + 0.1


def test_rows(prepared):
    splits = prepared("guess", high=15, max_turns=5, size=60)
    assert [len(splits["train"]), len(splits["validation"])] == [60, 15]
    truths = [prompt.extras["reward_spec"]["ground_truth"] for prompt in splits["validation"]]
    assert truths == [{"secret": n, "low": 1, "high": 15} for n in range(1, 16)]
    one = splits["train"][0]
    assert one.messages == ({"role": "user", "content": "guess 1-15 in 5"},)
    assert (one.env_class, one.extras["extra_info"]["max_turns"]) == ("guess", 5)
    assert [m["role"] for m in one.extras["extra_info"]["worked"]][:3] in (
        ["assistant"],
        ["assistant", "user", "assistant"],
    )
    secrets = [prompt.extras["reward_spec"]["ground_truth"]["secret"] for prompt in splits["train"]]
    assert sorted(secrets) == sorted(list(range(1, 16)) * 4)


@pytest.mark.parametrize(
    "option", [{"high": 1}, {"low": 9}, {"max_turns": 0}, {"feedback": 1.5}, {"feedback": -0.1}, {"size": 0}]
)
def test_options_that_cannot_be(prepared, option):
    with pytest.raises(ConfigError):
        prepared("guess", **option)
