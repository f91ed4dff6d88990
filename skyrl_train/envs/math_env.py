"""``math``: competition problems, whose answers are compared as mathematics by the package math-verify."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from skyrl_train.envs.answers import last_boxed
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.envs.facts import finish, read_settings, text_truth
from skyrl_train.envs.killable import CallKilledError, shared_pool
from skyrl_train.errors import EnvError, MissingPackageError
from skyrl_train.types import Prompt

_LONGEST = 1000
"""Characters of an answer, or of the end of a response without a box, that are looked at."""


class MathEnv(Env):
    """1 if the answer equals the ground truth, else 0: ``\\frac12``, ``0.5`` and ``1/2`` are the same.

    The answer is what stands in the last ``\\boxed{...}``. Without one it is what math-verify finds at the end of the
    response, unless ``method=boxed``.

    Settings: ``method``; ``timeout``, seconds to compare one answer. An answer that takes longer, or that math-verify
    cannot work out, scores 0 and is counted under ``timed_out`` or ``failed``.
    """

    def __init__(self, prompt: Prompt, settings: dict[str, Any]) -> None:
        super().__init__(prompt, settings)
        self.chosen = read_settings("math", settings, method=("any", "boxed"), timeout=5.0)
        truth = text_truth(prompt)
        self.answer = last_boxed(truth) or truth
        if find_spec("math_verify") is None:
            raise MissingPackageError("math-verify", "the env math", 'pip install "skyrl-train[envs]"')

    def step(self, response: str) -> StepResult:
        boxed = last_boxed(response)
        if boxed is None and self.chosen.method == "boxed":
            return finish(0.0, answered=False)
        if boxed is not None and "".join(boxed.split()) == "".join(self.answer.split()):
            return finish(1.0, answered=True)
        if boxed is not None and len(boxed) > _LONGEST:
            return finish(0.0, answered=True)
        text = response[-_LONGEST:] if boxed is None else boxed
        try:
            pool = shared_pool("skyrl_train.envs.math_compare:compare")
            verdict = pool.call(self.answer, text, boxed is not None, timeout=self.chosen.timeout)
        except CallKilledError:
            verdict = "timed_out"
        if verdict == "bad truth":
            raise EnvError(f"prompt {self.prompt.uid}: math-verify cannot read the ground truth {self.answer!r:.200}.")
        return finish(
            verdict == "same",
            answered=verdict != "no answer",
            timed_out=verdict == "timed_out",
            failed=verdict == "failed",
        )
