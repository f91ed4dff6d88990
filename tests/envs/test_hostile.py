"""Whatever the policy writes, every env answers in short time, with a reward of 0 or a reply, and without an error."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from envs.conftest import HOSTILE
from skyrl_train.envs.checks import checked_step

GAME = {"secret": 5, "low": 1, "high": 7}
ENVS: dict[str, tuple[Any, dict[str, Any]]] = {
    "addition": ("132", {}),
    "gsm8k": ("18", {}),
    "numeric": ("18", {}),
    "math": ("18", {"timeout": 1.0}),
    "countdown": ({"numbers": [3, 3, 8, 8], "target": 24}, {"format_score": 0.1}),
    "guess": (GAME, {}),
    "wordle": ("crane", {}),
    "text2sql": ({"gold": ["SELECT 1"]}, {}),
    "reasoning_gym:chain_sum": ({"question": "1 + 1", "answer": "2", "metadata": {}}, {"timeout": 1.0}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("db")
    with closing(sqlite3.connect(path / "shop.sqlite")) as db:
        db.execute("CREATE TABLE item(name TEXT)")
    return path


@pytest.mark.parametrize("env_class", ENVS)
def test_hostile_responses(make: Callable[..., Any], folder: Path, env_class: str) -> None:
    truth, settings = ENVS[env_class]
    if env_class == "text2sql":
        settings = {"db_path": str(folder)}
    make(env_class, truth, settings, db="shop").step("warm up")
    for name, response in HOSTILE.items():
        env = make(env_class, truth if isinstance(truth, str) else json.dumps(truth), settings, db="shop", max_turns=2)
        start = time.monotonic()
        result = checked_step(env.step(response), name)
        assert time.monotonic() - start < 4, name
        assert result.reward == 0, name
        assert sum(len(message["content"]) for message in result.observations) < 3000, name
