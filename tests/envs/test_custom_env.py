"""examples/custom_env, as its README runs it: found by import path, its rows read by the loader."""

from __future__ import annotations

import asyncio

import pytest

from envs.conftest import ROOT
from skyrl_train.config.door import load_config
from skyrl_train.data import load_prompts
from skyrl_train.envs.registry import check_env, make_env
from skyrl_train.envs.runner import EnvRunner

FOLDER = ROOT / "examples" / "custom_env"


def test_every_row_can_be_won_and_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    given = [word for word in readme.split() if word.startswith("environment.") and "=" in word]
    assert len(given) == 2
    config = load_config([*given, "trainer.policy.model.path=x"]).environment
    prompts = load_prompts([str(FOLDER / "rows.jsonl")], env_class_default=config.env_class)
    assert len(prompts) == 32
    check_env(prompts[0], config)

    async def play(prompt, *responses: str):
        env, runner = make_env(prompt, config), EnvRunner(4, 5.0)
        assert await runner.init(env) == list(prompt.messages)
        results = [await runner.step(env, response) for response in responses]
        await runner.close(env)
        return results

    for prompt in prompts:
        word = prompt.extras["reward_spec"]["ground_truth"]
        hint, won = asyncio.run(play(prompt, "?", word[::-1]))
        assert hint.observations[0]["content"] == "0 right" and won.reward == 1 and won.metadata == {"solved": True}
        _, lost = asyncio.run(play(prompt, "?", word[::-1][:-1]))
        assert lost.terminated and 0 < lost.reward < 0.5


def test_the_env_is_as_short_as_the_readme_says() -> None:
    assert len((FOLDER / "backwards.py").read_text(encoding="utf-8").splitlines()) <= 30
