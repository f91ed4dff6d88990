"""What the tests of tracking share."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.types import Outcome, Prompt, Trajectory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def clean_logging() -> Iterator[None]:
    """Puts the loggers back that ``setup_logging`` changes."""
    logs = [logging.getLogger(name) for name in ("skyrl", "skyrl_train", "")]
    before = [(log, log.level, log.propagate, list(log.handlers)) for log in logs]
    yield
    for log, level, propagate, handlers in before:
        for handler in log.handlers:
            if handler not in handlers:
                handler.close()
        log.handlers[:] = handlers
        log.setLevel(level)
        log.propagate = propagate


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in another process, without a terminal."""

    def run(script: str, *args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, *map(str, args)]
        return subprocess.run(
            command, cwd=tmp_path, env=clean_environment(**environment), capture_output=True, text=True, timeout=120
        )

    return run


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what changes consoles, with this repository's package importable."""
    dropped = ("TERM", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "SKYRL_LOG_LEVEL")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("WANDB_")}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "100", "LINES": "30"} | more


def a_trajectory(sample: int = 0, **fields) -> Trajectory:
    """A game of two turns that was won."""
    prompt = Prompt(
        uid="guess/3", messages=({"role": "user", "content": "guess"},), env_class="guess", extras={"hidden": 9}
    )
    trajectory = Trajectory(prompt=prompt, sample=sample, prompt_ids=[1, 2], metrics={"won": 1.0}, **fields)
    trajectory.messages = [{"role": "user", "content": "guess"}, {"role": "assistant", "content": "7"}]
    trajectory.append_sampled([7, 0], [-0.9, -0.01], "stop", 4)
    trajectory.append_observed([5, 6])
    trajectory.append_sampled([9, 0], [-0.4, -0.02], "stop", 4)
    trajectory.reward_turn(1.0)
    trajectory.outcome = fields.get("outcome", Outcome.FINISHED)
    return trajectory
