"""``addition``: the sum of two numbers, worked out on the way. The quickstart's task."""

from __future__ import annotations

from typing import Any

from skyrl_train.envs.base import Env, StepResult
from skyrl_train.envs.facts import finish, read_settings, text_truth
from skyrl_train.types import Prompt


class AdditionEnv(Env):
    """1 if the response ends with ``<answer>N</answer>``, N being the ground truth digit for digit; else 0."""

    def __init__(self, prompt: Prompt, settings: dict[str, Any]) -> None:
        super().__init__(prompt, settings)
        read_settings("addition", settings)
        self.ending = f"<answer>{text_truth(prompt)}</answer>"

    def step(self, response: str) -> StepResult:
        response = response.rstrip()
        return finish(response.endswith(self.ending), answered=response.endswith("</answer>"))
