"""From the name of an env to what makes it. Importing this imports no env."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from skyrl_train.envs.base import Env
from skyrl_train.errors import ConfigError, SkyRLError
from skyrl_train.types import Prompt

EnvFactory = Callable[[Prompt, dict[str, Any]], Env]
"""An env's class, or a function ``(prompt, settings) -> Env``."""

_HERE = "skyrl_train.envs"
ENVS: dict[str, str] = {
    "addition": f"{_HERE}.addition:AdditionEnv",
    "countdown": f"{_HERE}.countdown:CountdownEnv",
    "gsm8k": f"{_HERE}.gsm8k:Gsm8kEnv",
    "guess": f"{_HERE}.guess:GuessEnv",
    "math": f"{_HERE}.math_env:MathEnv",
    "numeric": f"{_HERE}.gsm8k:NumericEnv",
    "reasoning_gym": f"{_HERE}.reasoning_gym:ReasoningGymEnv",
    "text2sql": f"{_HERE}.text2sql:Text2SqlEnv",
    "wordle": f"{_HERE}.wordle:WordleEnv",
}
"""Ours; each is imported when first asked for."""
_registered: dict[str, str | EnvFactory] = {}


def register(id: str, entry_point: str | EnvFactory) -> None:
    """Makes ``id`` a name for ``env_class``. A later call with the same id replaces the entry.

    Args:
        entry_point: ``package.module:Class``, a class, or a function ``(prompt, settings) -> Env``.

    Raises:
        ConfigError: an id that is one of ours or looks like an import path.
    """
    if not id or ":" in id:
        raise ConfigError("id", id, "must be a name without a colon.")
    if id in ENVS:
        raise ConfigError("id", id, "is an env of ours.", "Choose another name.")
    if isinstance(entry_point, str) and ":" not in entry_point:
        raise ConfigError("entry_point", entry_point, "must be written package.module:Class.")
    _registered[id] = entry_point


def find_env(name: str) -> tuple[Any, bool]:
    """What makes the env, and whether that is one of skyrl-gym's (called with ``env_config`` and ``extras``).

    Raises:
        ConfigError: no env has this name; the message has the nearest names.
        MissingPackageError: it is one of skyrl-gym's, which is not installed.
    """
    family, colon, last = name.partition(":")
    if name in ENVS or family == "reasoning_gym":
        return _imported(ENVS[family], name), False
    if name not in _registered and (family == "skyrl_gym" or (not colon and name in gym_ids())):
        from skyrl_train.envs.skyrl_gym import gym_maker

        return gym_maker(last or name, name), True
    if name in _registered or colon:
        entry = _registered.get(name, name)
        factory = _imported(entry, name) if isinstance(entry, str) else entry
        _check_kind(name, factory)
        return factory, _is_gym_class(factory)
    near = difflib.get_close_matches(name, known_names(), n=2)
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else f"There are {', '.join(sorted(ENVS))}."
    more = "" if find_spec("skyrl_gym") else ' Those of skyrl-gym need: pip install "skyrl-train[envs]".'
    hint += f" Yours is written package.module:Class.{more}"
    raise ConfigError("env_class", name, "no env has this name.", hint)


def known_names() -> list[str]:
    """Every name that is no import path."""
    return [*ENVS, *_registered, *gym_ids()]


def gym_ids() -> list[str]:
    """The ids of skyrl-gym's envs; none where the package is not installed."""
    if find_spec("skyrl_gym") is None:
        return []
    from skyrl_train.envs.skyrl_gym import gym_package

    return list(gym_package().registry)


def _imported(entry: str, name: str) -> Any:
    module_name, _, attribute = entry.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a console script, unlike `python -m`, does not look there
    try:
        module = importlib.import_module(module_name)
    except SkyRLError:
        raise
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        reason = f"the module {module_name} cannot be imported: {type(error).__name__}: {error}."
        absent = isinstance(error, ModuleNotFoundError)
        remedy = "It is looked for in the current folder and on PYTHONPATH." if absent else ""
        raise ConfigError("env_class", name, reason, remedy) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"Did you mean {module_name}:{near[0]}?" if near else ""
        raise ConfigError("env_class", name, f"{module_name} has no '{attribute}'.", hint) from None


def _check_kind(name: str, factory: Any) -> None:
    if not callable(factory):
        raise ConfigError("env_class", name, f"is {factory!r:.60}, neither a class nor a function.")
    if isinstance(factory, type) and not issubclass(factory, Env) and not _is_gym_class(factory):
        base = "skyrl_train.envs.base.Env, nor of skyrl_gym's BaseTextEnv"
        raise ConfigError("env_class", name, f"{factory.__name__} is not a subclass of {base}.")
    if missing := sorted(getattr(factory, "__abstractmethods__", ())):
        raise ConfigError("env_class", name, f"{factory.__name__} does not define {', '.join(missing)}.")


def _is_gym_class(factory: Any) -> bool:
    bases = factory.__mro__ if isinstance(factory, type) and not issubclass(factory, Env) else ()
    return any(base.__module__.partition(".")[0] == "skyrl_gym" for base in bases)
