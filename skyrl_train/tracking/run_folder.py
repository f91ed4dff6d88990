"""``RunFolder``: everything a run leaves behind, in one folder that tools read and nothing else.

    config.yaml            the resolved config
    metrics.jsonl          one line a step
    events.jsonl           one line for each start and end of a phase: the timeline
    memory.json            peaks of memory by model, worker and phase: predicted and measured
    trajectories/          step_000012.jsonl, eval_step_000012.jsonl: one line a trajectory
    console.log            the lines the user saw
    logs/<role>.log        one log per process
    superseded/            what a resume from an earlier checkpoint took out of the history

Every row is appended and flushed at once; no file stays open, so nothing is lost by a kill but the row being written.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from skyrl_train.errors import ConfigError
from skyrl_train.tracking import json_lines
from skyrl_train.types import Trajectory

Kind = Literal["train", "eval"]
_STEP_FILE = re.compile(r"(?:eval_)?step_(\d+)\.jsonl")


class RunFolder:
    """The folder of one run, made where it is absent, and repaired where a kill left it torn.

    Args:
        path: for instance ``outputs/2026-01-31/12-00-00``. One process writes; any number may read.

    Raises:
        ConfigError: the folder cannot be made or written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        try:
            for folder in (self.path, self.path / "trajectories", self.path / "logs"):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                "hydra.run.dir", str(path), f"the run folder cannot be made: {error.strerror}.", "Choose another."
            ) from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise ConfigError("hydra.run.dir", str(path), "the run folder cannot be written.", "Choose another.")
        for file in (self.metrics, self.events):
            json_lines.repair(file)
        for draft in (*self.path.glob("*.tmp"), *self.trajectories.glob("*.tmp")):
            draft.unlink()

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def trajectories(self) -> Path:
        return self.path / "trajectories"

    @property
    def console_log(self) -> Path:
        return self.path / "console.log"

    def write_memory(self, peaks: Mapping[str, Any]) -> None:
        """Replaces ``memory.json``: by model, worker and phase, GiB predicted and measured at the peak so far."""
        draft = self.path / "memory.json.tmp"
        draft.write_text(json.dumps(peaks, indent=1) + "\n", encoding="utf-8")
        draft.rename(self.path / "memory.json")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes the resolved config; ``config`` holds plain values only.

        A file that says the same below a comment stays: the command has written there what was typed.
        """
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        if self.config.exists() and self.config.read_text(encoding="utf-8").partition("\n")[2] == text:
            return
        json_lines.replace_with(self.config, [text])

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the line of a step."""
        json_lines.append(self.metrics, {"step": step, "time": round(time.time(), 3), **metrics})

    def append_event(self, event: str, /, **fields: Any) -> None:
        """Adds an event; ``time`` is now, in seconds since 1970, unless given."""
        json_lines.append(self.events, {"event": event, "time": round(time.time(), 4), **fields})

    def append_console(self, line: str) -> None:
        """Adds a line to ``console.log``."""
        json_lines.append_text(self.console_log, line + "\n")

    def was_cut(self, step: int) -> bool:
        """Whether a run in this folder began ``step`` and was killed before it wrote the line of metrics."""
        if any(row.get("step") == step for row in json_lines.read(self.metrics)):
            return False
        return any(row.get("step") == step and row["event"] == "phase_start" for row in json_lines.read(self.events))

    def trajectory_file(self, step: int, kind: Kind = "train") -> Path:
        """Where the trajectories of a step are."""
        return self.trajectories / f"{'eval_' if kind == 'eval' else ''}step_{step:06d}.jsonl"

    def write_trajectories(self, step: int, trajectories: Iterable[Trajectory], kind: Kind = "train") -> Path:
        """Writes the trajectories of a step, whatever their fate, in place of an earlier file of that step."""
        path = self.trajectory_file(step, kind)
        json_lines.replace_with(path, (json_lines.dumps(trajectory_row(t)) + "\n" for t in trajectories))
        return path

    def truncate_after(self, step: int) -> int:
        """Makes the history end with ``step``, which a run resumes after; the number of metric lines taken out.

        0 means that nothing has been done: the whole history goes, an evaluation before the first step too. What is
        taken out is moved to ``superseded/``. The timeline keeps all its events, for the time was spent.
        """
        keep_to = step if step > 0 else -1
        superseded = self.path / "superseded"
        later = [file for file in self.trajectories.iterdir() if _step_of(file) > keep_to]
        with json_lines.translate_errors(superseded):
            superseded.mkdir(exist_ok=True)
            for file in later:
                file.replace(superseded / file.name)
        removed = json_lines.cut(
            self.metrics, lambda row: (json_lines.number(row.get("step")) or 0) <= keep_to, superseded / "metrics.jsonl"
        )
        if not any(superseded.iterdir()):
            superseded.rmdir()
        return removed


def trajectory_row(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as the run folder keeps it: enough to read it, to check it and to play it again."""
    t = trajectory
    return {
        "prompt": t.prompt.uid,
        "sample": t.sample,
        "env_class": t.prompt.env_class,
        "data_source": t.prompt.data_source,
        "extras": t.prompt.extras,
        "outcome": t.outcome,
        "cause": t.cause,
        "stop_reason": t.stop_reason,
        "reward": t.reward,
        "baseline": t.baseline,
        "metrics": t.metrics,
        "messages": t.messages,
        "turns": t.turns,
        "prompt_ids": t.prompt_ids,
        "response_ids": t.response_ids,
        "loss_mask": t.loss_mask,
        "rollout_logprobs": t.rollout_logprobs,
        "rewards": t.rewards,
    }


def _step_of(file: Path) -> int:
    """The step of a trajectory file; -1 for a file that is none of ours."""
    match = _STEP_FILE.fullmatch(file.name)
    return int(match[1]) if match else -1
