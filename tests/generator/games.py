"""Envs and texts that several tests of this folder play with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from skyrl_train.envs.base import Env, StepResult
from skyrl_train.types import Message, Prompt


def user(text: str) -> Message:
    return {"role": "user", "content": text}


class Replies(Env):
    """Says its lines one after the other, each turn with its reward; the turn after the last line ends the episode."""

    def __init__(self, prompt: Prompt, lines: Sequence[str] = (), rewards: Sequence[float] = ()) -> None:
        super().__init__(prompt, {})
        self.lines, self.rewards = lines, rewards
        self.heard: list[str] = []

    def step(self, response: str) -> StepResult:
        turn = len(self.heard)
        self.heard.append(response)
        reward = self.rewards[turn] if turn < len(self.rewards) else 0.0
        if turn < len(self.lines):
            return StepResult(observations=[user(self.lines[turn])], reward=reward)
        return StepResult(reward=reward, terminated=True, metadata={"turns": turn + 1})


class Book:
    """Makes envs and notes which were made and how often each was closed."""

    def __init__(self, kind: Any, *args: Any) -> None:
        self.kind, self.args = kind, args
        self.envs: list[Env] = []
        self.closed: Counter[int] = Counter()

    def __call__(self, prompt: Prompt) -> Env:
        env = self.kind(prompt, *self.args)
        inner = env.close

        def close() -> None:
            self.closed[id(env)] += 1
            inner()

        env.close = close
        self.envs.append(env)
        return env

    @property
    def each_closed_once(self) -> bool:
        return [self.closed[id(env)] for env in self.envs] == [1] * len(self.envs)
