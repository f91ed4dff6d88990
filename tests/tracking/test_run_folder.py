from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from skyrl_train.errors import ConfigError
from skyrl_train.tracking import json_lines
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.types import Outcome
from tracking.conftest import a_trajectory, clean_environment


def steps(file: Path) -> list[int]:
    return [row["step"] for row in json_lines.read(file)]


def test_a_trajectory_is_kept_whole(folder: RunFolder):
    failed = a_trajectory(1, outcome=Outcome.FAILED, cause="EnvError: the game broke")
    failed.rollout_logprobs[0] = -math.inf
    path = folder.write_trajectories(12, [a_trajectory(), failed])
    assert path == folder.path / "trajectories" / "step_000012.jsonl"
    first, second = json_lines.read(path)
    assert first["prompt"] == "guess/3" and first["sample"] == 0 and first["extras"] == {"hidden": 9}
    assert first["prompt_ids"] == [1, 2] and first["response_ids"] == [7, 0, 5, 6, 9, 0]
    assert first["loss_mask"] == [1, 1, 0, 0, 1, 1] and first["rewards"] == [0, 0, 0, 0, 0, 1.0]
    assert first["rollout_logprobs"] == [-0.9, -0.01, 0.0, 0.0, -0.4, -0.02] and first["reward"] == 1.0
    assert [(t["start"], t["end"], t["stop_reason"], t["weight_version"]) for t in first["turns"]] == [
        (0, 2, "stop", 4), (4, 6, "stop", 4),
    ]  # fmt: skip
    assert first["messages"][1] == {"role": "assistant", "content": "7"} and first["metrics"] == {"won": 1.0}
    assert (first["outcome"], first["cause"]) == ("finished", None)
    assert (second["outcome"], second["cause"]) == ("failed", "EnvError: the game broke")
    assert second["rollout_logprobs"][0] == "-Infinity"


def test_eval_trajectories_lie_apart_and_a_step_done_again_replaces_its_file(folder: RunFolder):
    folder.write_trajectories(3, [a_trajectory(), a_trajectory(1)])
    folder.write_trajectories(3, [a_trajectory()], kind="eval")
    folder.write_trajectories(3, [a_trajectory(5)])
    assert [row["sample"] for row in json_lines.read(folder.trajectory_file(3))] == [5]
    assert sorted(p.name for p in folder.trajectories.iterdir()) == ["eval_step_000003.jsonl", "step_000003.jsonl"]


def test_text_that_is_no_unicode_is_kept(folder: RunFolder):
    odd = a_trajectory()
    odd.messages[1]["content"] = "half a pair \ud83d, a line\u2028break\n"
    (row,) = json_lines.read(folder.write_trajectories(1, [odd]))
    assert row["messages"][1]["content"] == odd.messages[1]["content"]


def test_config(folder: RunFolder):
    config = {"trainer": {"seed": 3, "lr": 1e-6, "name": "größe"}, "data": {"train_data": ["a", "b"]}}
    folder.write_config(config)
    assert yaml.safe_load(folder.config.read_text()) == config


def test_reopening_repairs(folder: RunFolder):
    folder.append_metrics(1, {"reward/mean": math.nan})
    folder.append_event("phase", name="generate")
    with folder.metrics.open("a") as file:
        file.write('{"step":2,"rew')
    draft = folder.trajectories / "step_000002.jsonl.tmp"
    draft.write_text("half")
    again = RunFolder(folder.path)
    again.append_metrics(2, {"reward/mean": 0.5})
    assert [json.loads(line)["reward/mean"] for line in again.metrics.read_text().splitlines()] == ["NaN", 0.5]
    assert not draft.exists()


@pytest.mark.parametrize(
    ("resume", "kept"), [(3, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4, 5]), (9, [0, 1, 2, 3, 4, 5]), (0, [])]
)
def test_truncate_after(folder: RunFolder, resume: int, kept: list[int]):
    for step in range(6):
        folder.append_metrics(step, {"x": float(step)})
        folder.write_trajectories(step, [a_trajectory()])
        folder.write_trajectories(step, [a_trajectory()], kind="eval")
    notes = folder.trajectories / "my_notes.jsonl"
    notes.write_text("mine")
    assert folder.truncate_after(resume) == 6 - len(kept)
    assert steps(folder.metrics) == kept
    present = [s for s in range(6) if folder.trajectory_file(s).exists() and folder.trajectory_file(s, "eval").exists()]
    assert present == kept and notes.exists()
    superseded = folder.path / "superseded"
    assert superseded.exists() == (len(kept) < 6)
    assert steps(superseded / "metrics.jsonl") == list(range(len(kept), 6))
    assert folder.truncate_after(resume) == 0


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"hydra.run.dir=.*file/run'.*cannot be made: Not a directory"):
        RunFolder(tmp_path / "file" / "run")


WRITER = """
import sys
from skyrl_train.tracking.run_folder import RunFolder
from tracking.conftest import a_trajectory
folder = RunFolder(sys.argv[1])
step = 0
while True:
    step += 1
    folder.append_metrics(step, {f"metric/{i}": i / 7 for i in range(400)})
    folder.append_event("phase", name="generate", step=step)
    folder.write_trajectories(step % 5, [a_trajectory(i) for i in range(20)])
"""


def test_killed_while_writing_leaves_readable_files(tmp_path: Path):
    """Every line written is whole after SIGKILL, wherever it struck, except at most the last one of a file."""
    run, tests = tmp_path / "run", Path(__file__).parents[1]
    env = clean_environment()
    env["PYTHONPATH"] += os.pathsep + str(tests)
    for delay in (0.02, 0.05, 0.11):
        metrics = run / "metrics.jsonl"
        before = metrics.stat().st_size if metrics.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(run)], env=env)
        deadline = time.monotonic() + 60
        while not metrics.exists() or metrics.stat().st_size <= before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        lines = metrics.read_bytes().split(b"\n")
        assert all(len(json.loads(line)) == 402 for line in lines[:-1])
        folder = RunFolder(run)
        assert folder.metrics.read_bytes().endswith(b"\n") and folder.events.read_bytes().endswith(b"\n")
        for file in folder.trajectories.iterdir():
            assert len([json.loads(line) for line in file.read_text().splitlines()]) == 20


def test_a_step_that_was_begun_and_has_no_line_was_cut(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    assert not folder.was_cut(3)  # a new folder knows nothing
    folder.append_event("phase_start", name="generate", step=3)
    assert folder.was_cut(3) and not folder.was_cut(2)
    folder.append_metrics(3, {"reward/mean": 1.0})
    assert not folder.was_cut(3)


def test_what_was_typed_stays_above_the_config(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.write_config({"a": 1})
    plain = folder.config.read_text()
    folder.config.write_text(f"# a=1\n{plain}")
    folder.write_config({"a": 1})
    assert folder.config.read_text() == f"# a=1\n{plain}"
    folder.write_config({"a": 2})
    assert folder.config.read_text() == plain.replace("1", "2")
