"""wandb as it is, offline: no network, the files it would upload read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_train.tracking import json_lines

pytest.importorskip("wandb", reason="wandb is not installed")
RUN = """
import sys
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.sink import RunInfo
from skyrl_train.tracking.tracker import Tracker
after, last = int(sys.argv[2]), int(sys.argv[3])
with Tracker(RunFolder(sys.argv[1]), "wandb", RunInfo(project="proj_x", name="name_y", config={"seed": 77})) as tracker:
    tracker.resume_after(after)
    for step in range(after + 1, last + 1):
        with tracker.step(step) as log:
            log({"reward/mean": step / 10})
    tracker.summary({"best_thing": 5})
"""


def test_offline_and_resumed(python, tmp_path: Path):
    run = tmp_path / "run"
    done = python(RUN, run, "0", "2", WANDB_MODE="offline", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "wandb" not in done.stdout and done.stderr == ""
    known = (run / "wandb_id.txt").read_text().strip()
    (offline,) = run.glob("wandb/offline-run-*")
    assert offline.name.endswith(known)
    content = (offline / f"run-{known}.wandb").read_bytes()
    for text in (b"proj_x", b"name_y", b"reward/mean", b"time/step", b"best_thing", b"77"):
        assert text in content, text

    done = python(RUN, run, "2", "3", WANDB_MODE="offline", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    # two runs that start in one second: the second's folder ends in -1
    assert all(known in path.name.split("-") for path in run.glob("wandb/offline-run-*"))

    done = python(RUN, run, "0", "1", WANDB_MODE="offline", HOME=str(tmp_path))
    assert done.returncode == 0 and (run / "wandb_id.txt").read_text().strip() != known


def test_without_an_account_the_run_is_refused_with_the_way_out(python, tmp_path: Path):
    done = python(RUN, tmp_path / "run", "0", "1", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("skyrl_train.errors.ConfigError: trainer.logger='wandb': the run cannot be started:")
    assert "WANDB_MODE=offline" in last
    (end,) = [e for e in json_lines.read(tmp_path / "run" / "events.jsonl") if e["event"] == "run_end"]
    assert end["error"].startswith("ConfigError")
