"""Tasks with long worked text, for ``cpu_vs_trl.py``: keep adding until the sum is above 999, and write every column.

    195+143     5+3+0=8;9+4+0=13;1+1+1=3;=338;8+3+0=11;3+4+1=8;3+1+0=4;=481; ... =1053;

``uneven``: the lengths spread as those of real answers do, from 90 tokens to over 600. ``long``: small steps only, so
that a budget of 256 tokens cuts every response at the same length: the easiest case for an engine that runs a batch
until its longest row ends. One model serves both.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from skyrl_train.data.prepare.addition import work
from skyrl_train.data.prepare.command import write_splits
from skyrl_train.data.prepare.options import Row, make_row
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.types import Prompt

ENV = "benchmarks.long_sums:LongSumsEnv"
GRADED = 1
"""So many sums, from the start, must be right."""


class LongSumsEnv(Env):
    """1 if the response begins with the ground truth, else 0."""

    def __init__(self, prompt: Prompt, settings: dict[str, Any]) -> None:
        super().__init__(prompt, settings)
        self.truth = prompt.extras["reward_spec"]["ground_truth"]

    def step(self, response: str) -> StepResult:
        return StepResult(reward=float(response.startswith(self.truth)), terminated=True)


def write(kind: str, folder: Path, rows: int = 6000) -> None:
    """Writes the data of ``long`` or ``uneven``."""
    rng = random.Random(kind)
    folder.mkdir(parents=True, exist_ok=True)
    made = [_row(kind, rng) for _ in range(rows)]
    write_splits({"train": made[128:], "validation": made[:128]}, folder)


def _row(kind: str, rng: random.Random) -> Row:
    if kind == "long":
        a, b = rng.randrange(100, 200), rng.randrange(30, 60)
    else:
        a, b = rng.randrange(100, 600), rng.randrange(30, 200)
    sums = _sums(a, b, (999 - a) // b + 1)
    return make_row("long_sums", f"{a}+{b}", "".join(sums[:GRADED]), env_class=ENV, worked=["".join(sums)])


def _sums(a: int, b: int, count: int) -> list[str]:
    texts = []
    for _ in range(count):
        texts.append(work(a, b).split("<")[0] + f"={a + b};")
        a += b
    return texts
