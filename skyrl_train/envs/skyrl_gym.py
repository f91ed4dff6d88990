"""Envs of the package skyrl-gym, and users' envs written for it, as envs of ours."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from skyrl_train.envs.base import Env, StepResult
from skyrl_train.errors import ConfigError, EnvError, MissingPackageError
from skyrl_train.types import Message, Prompt


class SkyRLGymEnv(Env):
    """Plays one of skyrl-gym's envs.

    It is given ``env_config``, its settings, and ``extras``, the row's columns with ``max_turns`` added, as usual for
    these envs: the row's own, ``extra_info.max_turns``, or the generator's.

    Args:
        make: takes ``env_config`` and ``extras`` and returns the env.
    """

    def __init__(
        self, prompt: Prompt, settings: dict[str, Any], *, make: Callable[..., Any], max_turns: int | None = None
    ) -> None:
        super().__init__(prompt, settings)
        from omegaconf import OmegaConf

        extras = copy.deepcopy(dict(prompt.extras))
        extras.setdefault("reward_model", extras.get("reward_spec"))  # some of its envs look there
        info = extras.get("extra_info")
        turns = extras.get("max_turns", info.get("max_turns") if isinstance(info, Mapping) else None)
        if (turns := turns or max_turns) is not None:
            extras["max_turns"] = turns
        self.env = make(env_config=OmegaConf.create(settings), extras=extras)

    def init(self) -> list[Message]:
        answer = self.env.init([dict(message) for message in self.prompt.messages])
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise EnvError(f"returned {answer!r:.80}, which is not (messages, info).")
        return answer[0]

    def step(self, response: str) -> StepResult:
        answer = self.env.step(response)
        if not isinstance(answer, Mapping) or not {"observations", "reward", "done"} <= answer.keys():
            raise EnvError(f"returned {answer!r:.80}, which is not a mapping with observations, reward and done.")
        rewritten = answer.get("postprocessed_action")
        if rewritten is not None and rewritten != response:
            reason = "it rewrote the response (postprocessed_action), but what was sampled is never changed."
            raise EnvError(f"{reason} Let generator.sampling_params.stop end it where the env cuts.")
        done = answer["done"]
        metadata = dict(answer.get("metadata") or {})
        if done and hasattr(self.env, "get_metrics"):
            metadata.update(self.env.get_metrics() or {})
        observations = [] if done else answer["observations"]
        return StepResult(observations=observations, reward=answer["reward"], terminated=done, metadata=metadata)

    def close(self) -> None:
        self.env.close()


def gym_maker(id: str, name: str) -> Callable[..., Any]:
    """What makes a registered env of skyrl-gym. ``name`` is what the user wrote.

    Raises:
        MissingPackageError: skyrl-gym is not installed.
        ConfigError: it has no such env.
    """
    gym = gym_package()
    if id not in gym.registry:
        near = difflib.get_close_matches(id, gym.registry, n=2)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"It has {', '.join(sorted(gym.registry))}."
        raise ConfigError("env_class", name, f"skyrl-gym has no env '{id}'.", hint)
    return partial(gym.make, id)


def gym_package() -> Any:
    """The package.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import skyrl_gym
    except ImportError as error:
        raise MissingPackageError("skyrl-gym", "its envs", 'pip install "skyrl-train[envs]"') from error
    return skyrl_gym
