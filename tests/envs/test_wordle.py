from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.envs.wordle import marks
from skyrl_train.errors import EnvError

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("secret", "guess", "expected"),
    [
        ("crane", "crane", "GGGGG"),
        ("crane", "nacre", "YYYYG"),
        ("crane", "sissy", "-----"),
        ("abbey", "babes", "YYGG-"),  # two b of the secret: one at its place, one elsewhere
        ("abbey", "kebab", "-YGYY"),
        ("crane", "eerie", "--Y-G"),  # one e, and it is taken by the one at its place
        ("apple", "puppy", "Y-G--"),  # two p of the secret, three guessed
        ("speed", "erase", "Y--YY"),
        ("steal", "speed", "G-G--"),
    ],
)
def test_repeated_letters(secret: str, guess: str, expected: str) -> None:
    assert marks(secret, guess) == expected


def test_a_game(make: Make) -> None:
    env = make("wordle", "crane", max_turns=4)
    reply = env.step("<guess>nacre</guess>")
    assert reply.observations == [{"role": "user", "content": "n a c r e\nY Y Y Y G\n3 left."}]
    assert env.step("CRATE").observations[0]["content"] == "c r a t e\nG G G - G\n2 left."
    assert "5 letters" in env.step("<guess>cranes</guess>").observations[0]["content"]
    last = env.step("now <guess> Crane </guess>")
    assert (last.reward, last.terminated) == (1.0, True)
    assert last.metadata == {"won": True, "turns": 4, "wrong_form": 1}


def test_six_guesses_by_default(make: Make) -> None:
    env = make("wordle", "crane")
    assert [env.step("slimy").terminated for _ in range(6)] == [False] * 5 + [True]


def test_words_that_are_allowed(make: Make, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("crane\nslate\n")
    by_setting = make("wordle", "crane", {"words": str(tmp_path / "words.txt")})
    assert "not in the list" in by_setting.step("zzzzz").observations[0]["content"]
    assert "s l a t e" in by_setting.step("slate").observations[0]["content"]
    by_row = make("wordle", "crane", {"words": str(tmp_path / "words.txt")}, words=["CRANE", "ZZZZZ"])
    assert "z z z z z" in by_row.step("zzzzz").observations[0]["content"]
    with pytest.raises(EnvError, match=r"extra_info\.words"):
        make("wordle", "crane", words="crane")


def test_every_word_of_the_list_wins_its_own_game(make: Make, raw: Callable[[str], Path]) -> None:
    words = (raw("wordle") / "words.txt").read_text().split()[:2000]
    for secret, guess in pairwise(words):
        env = make("wordle", secret)
        found = env.step(f"<guess>{guess}</guess>").observations[0]["content"].split("\n")[1].split()
        assert found.count("G") == sum(a == b for a, b in zip(secret, guess, strict=True))
        shared = sum(min(secret.count(letter), guess.count(letter)) for letter in set(guess))
        assert found.count("G") + found.count("Y") == shared
        assert env.step(f"<guess>{secret}</guess>").reward == 1
