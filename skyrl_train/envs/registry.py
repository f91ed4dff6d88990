"""The env of a prompt: ours by name, a user's by import path or registered id, or one of skyrl-gym."""

from __future__ import annotations

import difflib
import inspect
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from skyrl_train.envs.base import Env
from skyrl_train.envs.lookup import ENVS, EnvFactory, find_env, known_names, register
from skyrl_train.errors import ConfigError, EnvError, EnvTimeoutError, SkyRLError
from skyrl_train.types import Prompt

if TYPE_CHECKING:
    from skyrl_train.config.environment import EnvironmentConfig

__all__ = ["ENVS", "EnvFactory", "check_env", "check_settings", "make_env", "register", "settings_name"]


def make_env(prompt: Prompt, config: EnvironmentConfig, *, max_turns: int | None = None) -> Env:
    """The env of one trajectory of ``prompt``, with its section of ``config`` as settings.

    Args:
        max_turns: the generator's limit, for skyrl-gym's envs, which end by their own count of turns.

    Raises:
        ConfigError: there is no such env, or a setting of it is wrong.
        MissingPackageError: the env needs a package that is not installed.
        EnvError: the row lacks what the env needs, or the env's constructor raised.
    """
    name = prompt.env_class
    factory, is_gym = find_env(name)
    settings = config.skyrl_gym.settings(settings_name(name))
    if not is_gym:
        return _called(factory, prompt, settings)
    from skyrl_train.envs.skyrl_gym import SkyRLGymEnv

    return _called(lambda p, s: SkyRLGymEnv(p, s, make=factory, max_turns=max_turns), prompt, settings)


def check_env(prompt: Prompt, config: EnvironmentConfig) -> None:
    """Makes and closes the env of one prompt, so that a wrong name or setting is found before anything heavy starts.

    Raises:
        SkyRLError: as ``make_env``; EnvTimeoutError if it takes over ``environment.timeout`` seconds.
    """
    problems: list[BaseException] = []

    def check() -> None:
        try:
            env = make_env(prompt, config)
            if not inspect.iscoroutinefunction(env.close):
                with suppress(Exception):  # it may rely on init; the runner reports what closing really raises
                    env.close()
        except BaseException as error:  # raised again where the caller stands
            problems.append(error)

    thread = threading.Thread(target=check, name="env-check", daemon=True)
    thread.start()
    thread.join(config.timeout)
    if thread.is_alive():
        where = f"env {prompt.env_class} of prompt {prompt.uid}"
        raise EnvTimeoutError(f"{where}: making it took over environment.timeout={config.timeout:g} s.")
    if problems:
        raise problems[0]


def check_settings(env_classes: Iterable[str], config: EnvironmentConfig) -> None:
    """Refuses a section ``environment.skyrl_gym.<env>`` that no env would ever read.

    Args:
        env_classes: those of the data.

    Raises:
        ConfigError: names the section and the nearest env.
    """
    known = {*known_names(), *map(settings_name, env_classes)}
    for name, section in config.skyrl_gym.others.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(sorted(known))}."
            raise ConfigError(f"environment.skyrl_gym.{name}", section, "there is no env of this name.", remedy)


def settings_name(env_class: str) -> str:
    """The name of an env's section: ``reasoning_gym:chess`` -> ``reasoning_gym``, ``my.envs:Mine`` -> ``mine``."""
    family, _, last = env_class.partition(":")
    if not last or family == "reasoning_gym":
        return family
    return last if family == "skyrl_gym" else last.lower()


def _called(factory: EnvFactory, prompt: Prompt, settings: dict[str, Any]) -> Env:
    try:
        env = factory(prompt, settings)
    except SkyRLError:
        raise
    except (Exception, SystemExit) as error:  # a user's constructor may raise anything
        raised = f"{type(error).__name__}: {error!s:.500}"
        raise EnvError(f"env {prompt.env_class} of prompt {prompt.uid}: making it raised {raised}") from error
    if not isinstance(env, Env):
        raise ConfigError("env_class", prompt.env_class, f"its function returned {env!r:.60}, which is not an Env.")
    if getattr(env, "prompt", None) is None:  # a constructor that does not call Env's
        env.prompt = prompt
    return env
