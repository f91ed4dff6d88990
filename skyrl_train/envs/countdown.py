"""``countdown``: reach a target with given numbers."""

from __future__ import annotations

from typing import Any

from skyrl_train.envs.answers import last_tag
from skyrl_train.envs.arithmetic import evaluate, parse
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.envs.facts import bad_truth, finish, mapping_truth, read_settings
from skyrl_train.types import Prompt


class CountdownEnv(Env):
    """1 if ``<answer>EXPRESSION</answer>`` uses each number exactly once and equals the target.

    Settings: ``format_score`` is the reward of an expression that can be read and is wrong. It is 0 by default, so that
    scores are rates of success; 0.1 is usual for models that do not know the form yet.
    """

    def __init__(self, prompt: Prompt, settings: dict[str, Any]) -> None:
        super().__init__(prompt, settings)
        self.format_score = read_settings("countdown", settings, format_score=0.0).format_score
        truth = mapping_truth(prompt, "numbers", "target")
        numbers, target = truth["numbers"], truth["target"]
        if not isinstance(numbers, list) or not numbers or not all(type(n) is int for n in [*numbers, target]):
            raise bad_truth(prompt, truth, "a mapping with whole numbers 'numbers' and a whole 'target'")
        self.numbers, self.target = sorted(numbers), target

    def step(self, response: str) -> StepResult:
        text = last_tag(response, "answer")
        try:
            tokens = parse(text or "", limit=50 * len(self.numbers))
        except ValueError:
            return finish(0.0, readable=False, solved=False)
        used = sorted(token for token in tokens if isinstance(token, int))
        # Looked at first: with the right numbers nothing can grow large.
        solved = used == self.numbers and evaluate(tokens) == self.target
        return finish(1.0 if solved else self.format_score, readable=True, solved=solved)
