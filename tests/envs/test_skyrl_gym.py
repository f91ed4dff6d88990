"""Envs written for skyrl-gym, played by our runner."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import OmegaConf

from envs.conftest import a_config, a_prompt
from skyrl_train.config.environment import EnvironmentConfig
from skyrl_train.envs.registry import make_env
from skyrl_train.envs.runner import EnvRunner
from skyrl_train.errors import ConfigError, EnvError

skyrl_gym = pytest.importorskip("skyrl_gym")
from skyrl_gym.envs.base_text_env import BaseTextEnv  # noqa: E402

HERE = "envs.test_skyrl_gym"


class Echo(BaseTextEnv):
    """A game of ``max_turns`` turns; what its step returns can be spoiled by its settings."""

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.config, self.extras, self.closed = env_config, extras or {}, 0
        self.max_turns = self.extras.get("max_turns", 1)

    def init(self, prompt: Any) -> Any:
        if self.config.get("bad_init"):
            return prompt
        return [*prompt, {"role": "user", "content": f"in {self.max_turns} turns"}], {}

    def step(self, action: str) -> Any:
        self.turns += 1
        done = self.turns >= self.max_turns
        answer = {
            "observations": [{"role": "user", "content": action.upper()}],
            "reward": 0.5,
            "done": done,
            "metadata": {"turn": self.turns},
        }
        return (
            answer | dict(OmegaConf.to_container(self.config).get("answer", {}))
            if not self.config.get("bad_step")
            else (answer, 1)
        )

    def get_metrics(self) -> dict[str, Any]:
        return {"played": self.turns}

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def registered() -> Iterator[None]:
    skyrl_gym.register(id="echo", entry_point=f"{HERE}:Echo")
    yield
    skyrl_gym.envs.registration.deregister("echo")


@pytest.mark.parametrize("name", ["echo", "skyrl_gym:echo", f"{HERE}:Echo"])
def test_a_game_of_two_turns(registered: None, name: str) -> None:
    async def play() -> None:
        env: Any = make_env(a_prompt(name, max_turns=2), a_config(name, {"level": 3}))
        runner = EnvRunner(2, 5.0)
        assert (await runner.init(env))[-1]["content"] == "in 2 turns"
        assert env.env.config.level == 3 and env.env.extras["reward_spec"] == {"ground_truth": "1"}
        first = await runner.step(env, "ab")
        assert (first.observations, first.reward) == ([{"role": "user", "content": "AB"}], 0.5)
        last = await runner.step(env, "cd")
        assert (last.observations, last.terminated) == ([], True)
        assert last.metadata == {"turn": 2, "played": 2}
        await runner.close(env)
        assert env.env.closed == 1

    asyncio.run(play())


def test_the_generators_limit_is_given_where_the_row_has_none(registered: None) -> None:
    env: Any = make_env(a_prompt("echo"), EnvironmentConfig(), max_turns=7)
    assert env.env.max_turns == 7


def test_the_rows_data_is_not_shared_with_the_env(registered: None) -> None:
    prompt = a_prompt("echo", ["a"])
    env: Any = make_env(prompt, EnvironmentConfig())
    env.env.extras["reward_spec"]["ground_truth"].append("b")
    assert prompt.extras["reward_spec"]["ground_truth"] == ["a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bad_init": True}, r"init: returned .* not \(messages, info\)"),
        ({"bad_step": True}, "step: returned .* not a mapping"),
        ({"answer": {"reward": None}}, "step: reward=None"),
        ({"answer": {"done": "no"}}, "step: terminated='no'"),
        ({"answer": {"observations": [], "done": False}}, "step: neither .* no observations"),
        ({"answer": {"postprocessed_action": "other"}}, "step: it rewrote the response.*stop"),
    ],
)
def test_a_broken_one_is_one_error(registered: None, settings: dict[str, Any], message: str) -> None:
    async def play() -> None:
        env, runner = make_env(a_prompt("echo"), a_config("echo", settings)), EnvRunner(2, 5.0)
        await runner.init(env)
        await runner.step(env, "x")

    with pytest.raises(EnvError, match=rf"env echo of prompt source/7: {message}"):
        asyncio.run(play())


def test_the_packages_own_envs() -> None:
    env = make_env(a_prompt("skyrl_gym:gsm8k", "18"), EnvironmentConfig())
    assert env.step("#### 18").reward == 1 and env.step("#### 17").reward == 0
    env = make_env(a_prompt("aime", "204"), EnvironmentConfig())
    assert env.step("Answer: 204").terminated


def test_an_unknown_one_is_named() -> None:
    with pytest.raises(ConfigError, match=r"skyrl-gym has no env 'gsm9k'. Did you mean gsm8k"):
        make_env(a_prompt("skyrl_gym:gsm9k"), EnvironmentConfig())
    with pytest.raises(EnvError, match="making it raised AssertionError: db_id"):
        make_env(a_prompt("skyrl_gym:text2sql"), EnvironmentConfig())
