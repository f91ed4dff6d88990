"""What the policy acts in. An env is made for one trajectory, used once, and closed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from skyrl_train.types import Message, Prompt


@dataclass(slots=True, kw_only=True)
class StepResult:
    """The env's reply to one completion."""

    observations: list[Message] = field(default_factory=list)
    """Messages for the policy's next turn; empty when the episode is over."""
    reward: float = 0.0
    terminated: bool = False
    """The task is over (won, lost, answered)."""
    truncated: bool = False
    """Cut short by a limit of the env's own."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Numbers in here are averaged into ``env/<env_class>/<name>``; the rest goes to the run folder."""


class Env(ABC):
    """An environment for one trajectory: ``init``, then ``step`` until terminated or truncated, then ``close``.

    ``init`` and ``step`` may be plain or ``async``. Plain ones run in a thread with a deadline
    (``environment.timeout``); an env that raises or hangs costs its own trajectory only.
    """

    def __init__(self, prompt: Prompt, settings: dict[str, Any]) -> None:
        """``settings`` is the config section ``environment.skyrl_gym.<env_class>``, empty if there is none."""
        self.prompt = prompt
        self.settings = settings

    def init(self) -> list[Message]:
        """The conversation's opening messages: the prompt's, unless the env wants others."""
        return list(self.prompt.messages)

    @abstractmethod
    def step(self, response: str) -> StepResult:
        """Judges one completion. ``response`` is its text without special tokens."""

    def close(self) -> None:  # noqa: B027 - optional
        """Frees what the env holds. Called exactly once, also after a failure."""
