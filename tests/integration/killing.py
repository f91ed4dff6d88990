"""Kills a run at a chosen moment: SIGKILL, from inside, so that the moment is met however slow the machine is."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conftest import Run, Spawn, World

PHASES = ("generate", "old_logprobs", "update", "checkpoint", "weight_sync")
"""Generating, scoring, updating, saving, syncing."""


@dataclass(frozen=True)
class Moment:
    """Some time after a phase has begun for the n-th time in a process."""

    phase: str
    nth: int = 1
    delay: float = 0.0
    victim: str = "driver"
    """Or "rank": the last process that the driver has started, which then has to notice."""

    def arm(self) -> None:
        """In the process that is to die."""
        from skyrl_train.tracking.run_folder import RunFolder

        write, left = RunFolder.append_event, self.nth

        def watch(folder: RunFolder, event: str, /, **fields: Any) -> None:
            nonlocal left
            write(folder, event, **fields)
            if event == "phase_start" and fields["name"] == self.phase and fields["step"] is not None:
                left -= 1
                if left == 0:
                    threading.Thread(target=self._strike, daemon=True).start()
                    if self.delay < 0.002 and self.victim == "driver":
                        time.sleep(60)  # what is over sooner than a thread starts

        RunFolder.append_event = watch  # type: ignore[method-assign]

    def _strike(self) -> None:
        time.sleep(self.delay)
        os.kill(os.getpid() if self.victim == "driver" else children()[-1], signal.SIGKILL)


def children() -> list[int]:
    """Process ids of this process's children, in the order of their start."""
    lists = (file.read_text().split() for file in Path("/proc/self/task").glob("*/children"))
    return sorted(int(pid) for pids in lists for pid in pids)


def moments(draw: random.Random, whole: Run, phases: tuple[str, ...] = PHASES) -> list[Moment]:
    """One in each phase, in random order, somewhere within the time that it takes in an undisturbed run.

    Checkpoints are due every other step, so that of a process's second step is one that is written.
    """
    longest: dict[str, float] = {}
    for event in whole.events:
        if event["event"] == "phase" and event["step"] is not None:
            longest[event["name"]] = max(longest.get(event["name"], 0.0), event["end"] - event["start"])
    return [
        Moment(phase, 2 if phase == "checkpoint" else draw.randint(1, 2), draw.uniform(0, longest[phase]))
        for phase in draw.sample(phases, len(phases))
    ]


def kill_and_finish(spawn: Spawn, world: World, folder: Path, times: list[Moment], *more: str) -> Run:
    """Starts the run and kills it, once for each moment, and at last lets it end."""
    run = Run(folder / "run")
    arguments = world.overrides(folder, *more, f"hydra.run.dir={run.folder}")
    for moment in times:
        command = spawn(*arguments, moment=moment)
        code = command.wait(120)
        assert code == (-signal.SIGKILL if moment.victim == "driver" else 2), (code, command.err.read_text())
        if moment.victim == "rank":
            assert "policy worker, rank 1, died" in command.err.read_text()
    last = spawn(*arguments)
    assert last.wait(120) == 0, last.err.read_text()
    return run


def prompts(run: Run) -> list[list[str]]:
    """Which each step was given, in order."""
    return [list(dict.fromkeys(t["prompt"] for t in run.trajectories(step))) for step in run.steps]


def samples(run: Run) -> list[Any]:
    """What was said and what it was worth, of every step."""
    names = ("prompt", "sample", "response_ids", "rollout_logprobs", "reward", "outcome")
    return [[t[name] for name in names] for step in run.steps for t in run.trajectories(step)]
