"""Read back with TensorBoard's own reader."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.sink import RunInfo
from skyrl_train.tracking.tracker import Tracker

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def run(folder: RunFolder, resume_after: int, last: int, value: float) -> None:
    with Tracker(folder, "tensorboard", RunInfo()) as tracker:
        tracker.resume_after(resume_after)
        for step in range(resume_after + 1, last + 1):
            with tracker.step(step) as log:
                log({"reward/mean": value + step, "policy/loss": math.nan})


def scalars(folder: RunFolder, tag: str) -> list[tuple[int, float]]:
    reader = accumulator.EventAccumulator(str(folder.path / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def test_scalars_come_back(folder: RunFolder):
    run(folder, 0, 3, 10.0)
    assert scalars(folder, "reward/mean") == [(1, 11.0), (2, 12.0), (3, 13.0)]
    assert all(math.isnan(value) for _, value in scalars(folder, "policy/loss"))
    assert len(scalars(folder, "time/step")) == 3


def test_a_resumed_run_shows_each_step_once(folder: RunFolder, monkeypatch):
    run(folder, 0, 5, 10.0)
    # The writer names files by the second; readers take them in that order.
    import time

    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + 5)
    run(folder, 3, 6, 20.0)
    assert scalars(folder, "reward/mean") == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 24.0), (5, 25.0), (6, 26.0)]


def test_a_kill_loses_nothing(python, folder: RunFolder):
    done = python(
        "import os, signal, sys\n"
        "from skyrl_train.tracking.run_folder import RunFolder\n"
        "from skyrl_train.tracking.tracker import Tracker\n"
        "tracker = Tracker(RunFolder(sys.argv[1]), 'tensorboard')\n"
        "for step in (1, 2):\n"
        "    with tracker.step(step) as log: log({'x': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
        Path(folder.path),
    )
    assert done.returncode == -9
    assert scalars(folder, "x") == [(1, 1.0), (2, 2.0)]
