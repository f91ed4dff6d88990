"""``reasoning_gym:<task>``: any task of the package reasoning-gym, scored by the package."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from skyrl_train.data.truth import encode
from skyrl_train.envs.answers import last_tag
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.envs.facts import bad_truth, extra_info, finish, mapping_truth, read_settings
from skyrl_train.envs.killable import CallKilledError, shared_pool
from skyrl_train.errors import ConfigError, MissingPackageError
from skyrl_train.types import Prompt


class ReasoningGymEnv(Env):
    """The package's score, mostly from 0 to 1, of ``<answer>...</answer>``, or of the whole response without such.

    The task is named by ``env_class`` (``reasoning_gym:countdown``) or by ``extra_info.task``; the ground truth is the
    package's entry: question, answer and metadata.

    Settings: ``timeout``, seconds to score one answer. One that takes longer, or at which the package's scoring raises,
    scores 0 and is counted under ``timed_out`` or ``failed``.
    """

    def __init__(self, prompt: Prompt, settings: dict[str, Any]) -> None:
        super().__init__(prompt, settings)
        self.timeout = read_settings("reasoning_gym", settings, timeout=5.0).timeout
        self.task = prompt.env_class.partition(":")[2] or extra_info(prompt, "task", "")
        _check_task(self.task, prompt)
        truth = mapping_truth(prompt, "metadata")
        if not isinstance(truth["metadata"], Mapping):
            raise bad_truth(prompt, truth, "an entry of reasoning-gym, with question, answer and metadata")
        self.entry = encode({"question": "", "answer": None, **truth})

    def step(self, response: str) -> StepResult:
        tagged = last_tag(response, "answer")
        answer = (response if tagged is None else tagged).strip()
        score, timed_out = None, False
        try:
            pool = shared_pool("skyrl_train.envs.reasoning_score:score")
            score = pool.call(self.task, answer, self.entry, timeout=self.timeout)
        except CallKilledError:
            timed_out = True
        failed = score is None and not timed_out
        return finish(score or 0.0, answered=tagged is not None, timed_out=timed_out, failed=failed)


def _check_task(task: str, prompt: Prompt) -> None:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MissingPackageError("reasoning-gym", "its env", 'pip install "skyrl-train[envs]"') from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3)
        hint = f"Did you mean {', '.join(near)}?" if near else "Write reasoning_gym:<task>."
        raise ConfigError("env_class", prompt.env_class, f"reasoning-gym has no task '{task}'.", hint)
