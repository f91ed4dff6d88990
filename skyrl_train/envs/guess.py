"""``guess``: find a hidden number. The env answers ``higher`` or ``lower``."""

from __future__ import annotations

import re
from typing import Any

from skyrl_train.envs.base import Env, StepResult
from skyrl_train.envs.facts import bad_truth, finish, mapping_truth, read_settings, reply, turn_limit
from skyrl_train.types import Prompt

_WHOLE = re.compile(r"(?<![0-9.])-?[0-9]{1,18}(?![0-9]|\.[0-9])")


class GuessEnv(Env):
    """1 if the number is named within the turns that are allowed, else 0.

    A guess is the last whole number of the response. A response without one costs its turn. The turns are
    ``extra_info.max_turns``, or as many as halving the range takes.
    """

    def __init__(self, prompt: Prompt, settings: dict[str, Any]) -> None:
        super().__init__(prompt, settings)
        read_settings("guess", settings)
        truth = mapping_truth(prompt, "secret", "low", "high")
        secret, low, high = truth["secret"], truth["low"], truth["high"]
        if not all(type(number) is int for number in (secret, low, high)) or not low <= secret <= high:
            raise bad_truth(prompt, truth, "whole numbers with low <= secret <= high")
        self.secret = secret
        self.turns_left = turn_limit(prompt, (high - low + 1).bit_length())
        self.turns = 0

    def step(self, response: str) -> StepResult:
        self.turns += 1
        self.turns_left -= 1
        said = _WHOLE.findall(response[-2000:])
        if said and int(said[-1]) == self.secret:
            return finish(1.0, won=True, turns=self.turns)
        if self.turns_left <= 0:
            return finish(0.0, won=False, turns=self.turns)
        if not said:
            return reply("number?")
        return reply("higher" if self.secret > int(said[-1]) else "lower")
