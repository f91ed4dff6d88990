"""Envs that misbehave, named by import path as a user's own would be: ``integration.toy_envs:Unreliable``."""

from __future__ import annotations

import random
import time
import zlib
from typing import Any

from skyrl_train.envs.addition import AdditionEnv
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.types import Prompt


class Slow(AdditionEnv):
    """Answers after a time that no seed decides."""

    def step(self, response: str) -> StepResult:
        time.sleep(random.SystemRandom().uniform(0, self.settings.get("longest", 0.01)))
        return super().step(response)

    def __init__(self, prompt: Prompt, settings: dict[str, Any]) -> None:
        super().__init__(prompt, {})
        self.settings = settings


class Unreliable(AdditionEnv):
    """Goes wrong on the prompts whose row numbers its settings name."""

    def __init__(self, prompt: Prompt, settings: dict[str, Any]) -> None:
        super().__init__(prompt, {})
        number = int(prompt.uid.rsplit("/")[-1])
        self.fault = next((fault for fault, rows in settings.items() if rows == "all" or number in rows), "")

    def step(self, response: str) -> StepResult:
        if self.fault == "raises":
            raise KeyError("no such table")
        if self.fault == "hangs":
            time.sleep(30)
        if self.fault == "nan":
            return StepResult(reward=float("nan"), terminated=True)
        if self.fault == "foreign":
            return "correct"  # type: ignore[return-value]
        return super().step(response)


class Coin(Env):
    """Rewards what no model can know, the number of letters: every answer has its own."""

    def step(self, response: str) -> StepResult:
        return StepResult(reward=len(response) % 3 - 1.0, terminated=True)


class Brief(Env):
    """The shorter the better: easy to learn, from the first step on."""

    def step(self, response: str) -> StepResult:
        return StepResult(reward=1.0 - len(response) / 24, terminated=True)


class Half(Env):
    """Every other prompt has nothing to teach; on the rest the rewards of different answers differ."""

    def step(self, response: str) -> StepResult:
        teaches = int(self.prompt.uid.rsplit("/")[-1]) % 2
        return StepResult(reward=zlib.crc32(response.encode()) % 97 / 97 if teaches else 1.0, terminated=True)


class Constant(Env):
    """Always satisfied: no group has anything to teach."""

    def step(self, response: str) -> StepResult:
        return StepResult(reward=1.0, terminated=True)


class Repeated(Slow):
    """Says ``again`` after a random time, until the generator's turns are used up; the last answer is judged."""

    def step(self, response: str) -> StepResult:
        judged = super().step(response)
        observations = [{"role": "user", "content": "again"}]
        return StepResult(observations=observations, reward=judged.reward, metadata=judged.metadata)  # type: ignore[arg-type]
