"""Environment variables: typed, or refused by name."""

from __future__ import annotations

import logging

import pytest

from skyrl_train.config.environ import EnvironmentVariables, read_environment, set_log_level
from skyrl_train.errors import ConfigError


def test_absent_and_empty_are_the_defaults() -> None:
    assert (
        read_environment({}) == read_environment({"SKYRL_LOG_LEVEL": "", "NCCL_TIMEOUT": ""}) == EnvironmentVariables()
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("SKYRL_LOG_LEVEL", "verbose"), ("SGLANG_LOG_LEVEL", "2"), ("NCCL_TIMEOUT", "30min"), ("NCCL_TIMEOUT", "-1"),
     ("NCCL_TIMEOUT", "inf"), ("NCCL_TIMEOUT", "nan")],
)  # fmt: skip
def test_a_bad_value_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='{value}'.*unset {name}"):
        read_environment({name: value})


def test_our_log_level_is_honoured() -> None:
    loggers = [logging.getLogger(name) for name in ("skyrl", "skyrl_train")]
    before = [logger.level for logger in loggers]
    try:
        set_log_level(read_environment({"SKYRL_LOG_LEVEL": "DEBUG"}))
        assert logging.getLogger("skyrl.build").isEnabledFor(logging.DEBUG)
        set_log_level(read_environment({"SKYRL_LOG_LEVEL": "error"}))
        assert not logging.getLogger("skyrl.build").isEnabledFor(logging.WARNING)
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
