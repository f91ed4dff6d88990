"""``wordle``: find a hidden word; each guess is answered letter by letter."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from skyrl_train.envs.answers import last_tag
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.envs.facts import bad_truth, extra_info, finish, read_settings, reply, text_truth, turn_limit
from skyrl_train.errors import ConfigError, EnvError
from skyrl_train.types import Prompt


class WordleEnv(Env):
    """1 if the word is guessed within ``extra_info.max_turns`` (6), else 0.

    A guess is what stands in the last ``<guess>...</guess>``, or the response itself if it is one word. A guess that is
    no word of the right length, or not in the list of allowed words where there is one, costs its turn.

    Settings: ``words`` is a file of allowed words, one a line; ``extra_info.words`` of the row goes before it.
    """

    def __init__(self, prompt: Prompt, settings: dict[str, Any]) -> None:
        super().__init__(prompt, settings)
        path = read_settings("wordle", settings, words=None).words
        self.secret = text_truth(prompt).lower()
        if not self.secret.isalpha():
            raise bad_truth(prompt, self.secret, "one word")
        words = extra_info(prompt, "words")
        if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise EnvError(f"prompt {prompt.uid}: extra_info.words={words!r:.60} must be a list of words.")
        self.words = frozenset(word.lower() for word in words) if words else _words_of(path) if path else None
        self.turns_left = turn_limit(prompt, 6)
        self.turns = self.wrong_form = 0

    def step(self, response: str) -> StepResult:
        self.turns += 1
        self.turns_left -= 1
        guess = (last_tag(response, "guess") or response[:100]).strip().lower()
        problem = self._problem(guess)
        self.wrong_form += bool(problem)
        won = guess == self.secret
        if won or self.turns_left <= 0:
            return finish(won, won=won, turns=self.turns, wrong_form=self.wrong_form)
        if problem:
            return reply(f"{problem} {self.turns_left} left.")
        return reply(f"{' '.join(guess)}\n{' '.join(marks(self.secret, guess))}\n{self.turns_left} left.")

    def _problem(self, guess: str) -> str:
        size = len(self.secret)
        if len(guess) != size or not guess.isalpha():
            return f"Write one word of {size} letters as <guess>WORD</guess>."
        if self.words is not None and guess not in self.words and guess != self.secret:
            return f"{guess} is not in the list of words."
        return ""


def marks(secret: str, guess: str) -> str:
    """``G`` right place, ``Y`` elsewhere in the word, ``-`` not in it. A letter is marked as often as the word has it::

    secret  a b b e y
    guess   b a b e s
    marks   Y Y G G -
    """
    found = ["G" if a == b else "-" for a, b in zip(secret, guess, strict=True)]
    left = Counter(a for a, b in zip(secret, guess, strict=True) if a != b)
    for place, letter in enumerate(guess):
        if found[place] == "-" and left[letter]:
            found[place] = "Y"
            left[letter] -= 1
    return "".join(found)


@lru_cache(maxsize=8)
def _words_of(path: str) -> frozenset[str]:
    try:
        words = frozenset(Path(path).expanduser().read_text(encoding="utf-8").lower().split())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("environment.skyrl_gym.wordle.words", path, f"cannot be read ({error}).") from error
    if not words:
        raise ConfigError("environment.skyrl_gym.wordle.words", path, "holds no word.")
    return words
