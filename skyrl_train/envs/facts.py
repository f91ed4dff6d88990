"""What an env reads from its row and from its settings, checked once for all envs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from skyrl_train.data.truth import decode
from skyrl_train.envs.base import StepResult
from skyrl_train.errors import ConfigError, EnvError
from skyrl_train.types import Prompt


def ground_truth(prompt: Prompt) -> Any:
    """``reward_spec.ground_truth`` of the row.

    Raises:
        EnvError: the row has none.
    """
    spec = prompt.extras.get("reward_spec")
    if not isinstance(spec, Mapping) or spec.get("ground_truth") is None:
        raise EnvError(
            f"prompt {prompt.uid}: env {prompt.env_class} needs reward_spec.ground_truth, which the row lacks."
        )
    return spec["ground_truth"]


def text_truth(prompt: Prompt) -> str:
    """The ground truth as a text; a number counts as its text."""
    truth = ground_truth(prompt)
    if isinstance(truth, bool) or not isinstance(truth, str | int | float) or not str(truth).strip():
        raise bad_truth(prompt, truth, "a text")
    return str(int(truth) if isinstance(truth, float) and truth.is_integer() else truth).strip()


def mapping_truth(prompt: Prompt, *names: str) -> dict[str, Any]:
    """The ground truth as a mapping that has ``names``; JSON text of one will do."""
    truth, wanted = ground_truth(prompt), f"a mapping with {', '.join(names)}"
    if isinstance(truth, str):
        try:
            truth = decode(truth)
        except ValueError as error:
            raise bad_truth(prompt, truth, wanted) from error
    if not isinstance(truth, Mapping) or any(truth.get(name) is None for name in names):
        raise bad_truth(prompt, truth, wanted)
    return dict(truth)


def bad_truth(prompt: Prompt, truth: object, wanted: str) -> EnvError:
    """The error of a ground truth that the env cannot use."""
    where = f"prompt {prompt.uid}: reward_spec.ground_truth={truth!r:.100}"
    return EnvError(f"{where} must be {wanted} for env {prompt.env_class}.")


def extra_info(prompt: Prompt, name: str, default: Any = None) -> Any:
    """A field of the row's ``extra_info``, or ``default`` where it is absent."""
    info = prompt.extras.get("extra_info")
    value = info.get(name) if isinstance(info, Mapping) else None
    return default if value is None else value


def turn_limit(prompt: Prompt, default: int) -> int:
    """``extra_info.max_turns`` of the row, or ``default``."""
    turns = extra_info(prompt, "max_turns", default)
    if isinstance(turns, float) and turns.is_integer():
        turns = int(turns)
    if isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
        raise EnvError(f"prompt {prompt.uid}: extra_info.max_turns={turns!r:.40} must be a whole number above 0.")
    return turns


def read_settings(env: str, settings: Mapping[str, Any], **defaults: Any) -> SimpleNamespace:
    """The settings over their defaults, whose types they must have (a whole number serves as a float).

    Args:
        env: the section's name, ``environment.skyrl_gym.<env>``.
        defaults: every setting of the env. A tuple of texts lists the choices, its first being the default; None
            stands for an optional text.

    Raises:
        ConfigError: an unknown setting or a wrong value.
    """
    chosen = {name: value[0] if isinstance(value, tuple) else value for name, value in defaults.items()}
    for name, value in settings.items():
        key = f"environment.skyrl_gym.{env}.{name}"
        if name not in defaults:
            near = difflib.get_close_matches(str(name), defaults, n=1)
            remedy = f"Did you mean '{near[0]}'?" if near else f"It has: {', '.join(defaults) or 'none'}."
            raise ConfigError(key, value, f"env {env} has no such setting.", remedy)
        if wanted := _mismatch(value, defaults[name]):
            raise ConfigError(key, value, f"must be {wanted}.")
        chosen[name] = float(value) if isinstance(defaults[name], float) else value
    return SimpleNamespace(**chosen)


def _mismatch(value: Any, default: Any) -> str:
    """What the value should be; empty if it is that."""
    if isinstance(default, tuple):
        return "" if value in default else f"one of {', '.join(default)}"
    if default is None or isinstance(default, str):
        return "" if isinstance(value, str | None) else "a text"
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    kinds, name = (int, "a whole number") if isinstance(default, int) else (int | float, "a number")
    return "" if isinstance(value, kinds) and not isinstance(value, bool) and value >= 0 else f"{name}, 0 or above"


def finish(reward: float, **metadata: Any) -> StepResult:
    """The reply that ends the episode."""
    return StepResult(reward=float(reward), terminated=True, metadata=metadata)


def reply(text: str, **metadata: Any) -> StepResult:
    """The reply that asks for another turn."""
    return StepResult(observations=[{"role": "user", "content": text}], metadata=metadata)
