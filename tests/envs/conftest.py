"""What the tests of envs share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.config.environment import EnvironmentConfig, EnvSettingsConfig, Text2SQLConfig
from skyrl_train.envs.base import Env
from skyrl_train.envs.killable import close_shared_pools
from skyrl_train.envs.registry import make_env
from skyrl_train.types import Prompt

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def raw() -> Callable[[str], Path]:
    """The folder of one data set's raw files; the test is skipped where it is absent."""

    def folder(name: str) -> Path:
        path = ROOT.parent / "shared" / "data" / name
        if not path.is_dir():
            pytest.skip(f"no raw files of {name} beside the repository")
        return path

    return folder


@pytest.fixture(scope="session", autouse=True)
def helpers_end() -> Iterator[None]:
    """Ends the helper processes that the tests started."""
    yield
    close_shared_pools()


@pytest.fixture
def make() -> Callable[..., Env]:
    """``make("guess", truth, max_turns=3)``: an env by name; keyword arguments are the row's extra_info."""

    def build(env_class: str, truth: Any = "1", settings: dict[str, Any] | None = None, **info: Any) -> Env:
        return make_env(a_prompt(env_class, truth, **info), a_config(env_class, settings))

    return build


def a_prompt(env_class: str = "mine", truth: Any = "1", **info: Any) -> Prompt:
    return Prompt(
        uid="source/7",
        messages=({"role": "user", "content": "question"},),
        env_class=env_class,
        extras={"reward_spec": {"ground_truth": truth}, "extra_info": info},
    )


def a_config(env_class: str = "mine", settings: dict[str, Any] | None = None, **fields: Any) -> EnvironmentConfig:
    """A config whose section of ``env_class`` holds ``settings``."""
    settings = settings or {}
    if env_class == "text2sql":
        sections = EnvSettingsConfig(text2sql=Text2SQLConfig(**settings))
    else:
        name = env_class.partition(":")[0 if env_class.startswith("reasoning_gym") else 2] or env_class
        sections = EnvSettingsConfig(others={name.lower(): settings})
    return EnvironmentConfig(skyrl_gym=sections, **fields)


HOSTILE = {
    "empty": "",
    "long": "x" * 600_000,
    "digits": "7" * 600_000,
    "open tags": "<answer>" * 80_000,
    "close tags": "</answer>" * 70_000,
    "tags": "<answer></answer>" * 35_000,
    "long answer": "<answer>" + "1+" * 300_000 + "1</answer>",
    "nested": "<answer>" + "(" * 300_000 + "1" + ")" * 300_000 + "</answer>",
    "power": "<answer>9**9**9**9</answer> \\boxed{9^{9^{9^9}}} #### 9**9**9",
    "boxes": "\\boxed{" * 90_000,
    "braces": "\\boxed{" + "{" * 300_000 + "}" * 300_000,
    "hashes": "#### " * 120_000,
    "signs": "-" * 600_000 + "#### " + "-$ " * 1000,
    "commas": "#### " + "1," * 200_000,
    "unicode digits": "#### \u0661\u0662 <answer>\uff11\uff18</answer> \\boxed{\u0968}",
    "surrogate": "\ud800 #### \udfff <answer>\ud800</answer> <guess>\udfff</guess>",
    "null": "\0 <answer>\0</answer> <sql>\0</sql>",
    "spaces": " \n\t" * 200_000,
    "sql tags": "<sql>" * 60_000 + "<solution>" * 20_000,
    "words": "<guess>" + "a" * 500_000 + "</guess>",
}
"""Responses that must be scored 0 or replied to in short time, whatever the env."""
