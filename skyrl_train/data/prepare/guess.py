"""``guess``: a made-up game of several turns. The policy names a number, the env answers ``higher`` or ``lower``.

The worked games are those of a player that minds the answers half of the time: enough to teach the form and that the
answers matter, and far from enough to win, which is left to be learned.
"""

from __future__ import annotations

import random

from skyrl_train.data.prepare.options import PrepareOptions, Row, Splits, make_row
from skyrl_train.errors import ConfigError


def prepare(options: PrepareOptions) -> Splits:
    """Hidden numbers in turn, each with a game of its own; validation asks for each number once."""
    task = options.take(low=1, high=7, max_turns=3, size=4096, feedback=0.5)
    if task.low >= task.high:
        raise ConfigError("--high", task.high, f"must be above --low={task.low}.")
    if task.max_turns < 1:
        raise ConfigError("--max-turns", task.max_turns, "must be at least 1.")
    if not 0 <= task.feedback <= 1:
        raise ConfigError("--feedback", task.feedback, "must be from 0 to 1.")
    numbers = range(task.low, task.high + 1)
    rng = options.random("games")
    secrets = [numbers[i % len(numbers)] for i in range(task.size)]
    rng.shuffle(secrets)
    splits = {"train": secrets, "validation": list(numbers)}
    return {name: [_row(secret, task, rng) for secret in chosen] for name, chosen in splits.items()}


def play(secret: int, low: int, high: int, max_turns: int, feedback: float, rng: random.Random) -> list[str]:
    """One worked game: guess, answer, guess, ... With probability ``feedback`` a guess fits all answers so far."""
    first, last, said = low, high, []
    for turn in range(max_turns):
        guess = rng.randint(first, last) if rng.random() < feedback else rng.randint(low, high)
        said.append(str(guess))
        if guess == secret or turn == max_turns - 1:
            break
        said.append("higher" if secret > guess else "lower")
        if secret > guess:
            first = max(first, guess + 1)
        else:
            last = min(last, guess - 1)
    return said


def _row(secret: int, task: object, rng: random.Random) -> Row:
    low, high, max_turns, feedback = (getattr(task, name) for name in ("low", "high", "max_turns", "feedback"))
    return make_row(
        "guess",
        f"guess {low}-{high} in {max_turns}",
        {"secret": secret, "low": low, "high": high},
        extra_info={"max_turns": max_turns},
        worked=play(secret, low, high, max_turns, feedback, rng),
    )
