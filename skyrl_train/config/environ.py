"""The environment variables that mean something to a run, read once and typed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from skyrl_train.config.fields import one_of
from skyrl_train.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error", "critical")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentVariables:
    """Typed values of the variables."""

    skyrl_log_level: str = "info"
    """``SKYRL_LOG_LEVEL``: level of our own logs."""
    sglang_log_level: str | None = None
    """``SGLANG_LOG_LEVEL``: level of the SGLang servers that we start; None: theirs."""
    sglang_admin_key: str | None = None
    """``SGLANG_ADMIN_KEY``: the key of the servers that we attach to, if they want one."""
    nccl_debug: str | None = None
    """``NCCL_DEBUG``: read by NCCL itself, in every process."""
    nccl_timeout: float | None = None
    """``NCCL_TIMEOUT``: seconds until a collective that hangs is given up; None: torch's default."""
    ray_runtime_env_hook: str | None = None
    """``RAY_RUNTIME_ENV_HOOK``: Ray's hook, which makes workers reinstall the environment when it is uv's."""


def read_environment(variables: Mapping[str, str] | None = None) -> EnvironmentVariables:
    """The variables of this process, or of ``variables``.

    Raises:
        ConfigError: a value that cannot be used.
    """
    get = (os.environ if variables is None else variables).get
    return EnvironmentVariables(
        skyrl_log_level=_level(get, "SKYRL_LOG_LEVEL") or "info",
        sglang_log_level=_level(get, "SGLANG_LOG_LEVEL"),
        sglang_admin_key=get("SGLANG_ADMIN_KEY") or None,
        nccl_debug=get("NCCL_DEBUG") or None,
        nccl_timeout=_seconds(get, "NCCL_TIMEOUT"),
        ray_runtime_env_hook=get("RAY_RUNTIME_ENV_HOOK") or None,
    )


def set_log_level(variables: EnvironmentVariables) -> None:
    """Applies ``SKYRL_LOG_LEVEL`` to our loggers, all of which are below ``skyrl`` or ``skyrl_train``."""
    for name in ("skyrl", "skyrl_train"):
        logging.getLogger(name).setLevel(variables.skyrl_log_level.upper())


def _level(get: Callable[[str], str | None], name: str) -> str | None:
    text = get(name)
    if not text:
        return None
    if text.lower() not in LEVELS:
        raise ConfigError(name, text, f"is not one of {one_of(LEVELS)}.", f"Correct it, or: unset {name}")
    return text.lower()


def _seconds(get: Callable[[str], str | None], name: str) -> float | None:
    text = get(name)
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(name, text, "expects a number of seconds above 0.", f"Correct it, or: unset {name}")
    return seconds
