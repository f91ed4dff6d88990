"""Our seconds a step against TRL's ``GRPOTrainer`` on the CPU: same model, task, batch, updates, threads.

    python benchmarks/cpu_vs_trl.py [--lengths short long uneven] [--updates 1 2] [--threads 1 2] [--repeats 3]

Each side runs in a process of its own, in turn, ``repeats`` times; start-up and the first steps are left out. See
``benchmarks/README.md`` for what is matched and how. Writes ``benchmarks/results/cpu_vs_trl-<length>-<date>.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.common import SKYRL, WORK

PROMPTS, SAMPLES, LR = 32, 8, 2e-4
NOT_COUNTED = 2
"""Steps at the start that are left out."""
SIDES = ("trl", "ours")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task and the model warmed up on it."""

    max_tokens: int
    steps: int
    trl_rows: int
    """TRL's micro-batch: of 32 to 256 rows the fastest, measured."""
    warmup: tuple[str, ...] = ()
    model: str = ""
    """The task whose model is used; empty: its own."""


TASKS = {
    "short": Task(max_tokens=40, steps=14, trl_rows=256),
    "long": Task(max_tokens=256, steps=6, trl_rows=64, model="uneven"),
    "uneven": Task(
        max_tokens=640,
        steps=6,
        trl_rows=64,
        warmup=("--batch-size", "32", "--eval-rows", "32", "--until-accuracy", "0.3", "--steps", "400"),
    ),
}


@dataclass(slots=True, kw_only=True)
class Job:
    """One run of one side."""

    side: str
    length: str
    updates: int
    threads: int
    steps: int
    trl_rows: int
    data: str
    model: str
    folder: str

    @property
    def max_tokens(self) -> int:
        """The budget of a response."""
        return TASKS[self.length].max_tokens


def prepare(length: str) -> tuple[Path, Path]:
    """The task's data and a warm model, made if they are not there."""
    folder, task = WORK / length, TASKS[length]
    data, model = folder / "data", folder / "model"
    if not (data / "train.parquet").exists():
        if length == "short":
            common.run([*SKYRL, "data", "addition", "--out", str(data)], threads=2, timeout=300, log=folder / "log")
        else:
            from benchmarks.long_sums import write

            write(length, data)
    if task.model:
        return data, prepare(task.model)[1]
    if not (model / "warmup.json").exists():
        print(f"{length}: warming up a model, {model}", flush=True)
        command = [*SKYRL, "warmup", "--data", str(data), "--out", str(model), *task.warmup]
        common.run(command, threads=2, timeout=3600, log=folder / "log")
    return data, model


def compare(length: str, updates: int, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Runs both sides in turn and gives their medians, ratios and all single runs."""
    data, model = prepare(length)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat, side in itertools.product(range(options.repeats), SIDES):
        folder = WORK / "runs" / f"{length}-{updates}-{threads}-{side}-{repeat}"
        job = Job(
            side=side,
            length=length,
            updates=updates,
            threads=threads,
            steps=options.steps or TASKS[length].steps,
            trl_rows=options.trl_rows or TASKS[length].trl_rows,
            data=str(data),
            model=str(model),
            folder=str(folder),
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(asdict(job)))
        script = [sys.executable, "-m", "benchmarks.cpu_vs_trl_side", str(folder)]
        common.run(script, threads=threads, timeout=options.timeout, log=folder / "log")
        steps = json.loads((folder / "steps.json").read_text())
        runs[side].append(summary(steps) | {"load_1_minute": common.machine()["load_1_minute"]})
    return {"length": length, "updates": updates, "threads": threads} | judged(runs)


def summary(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Means over the counted steps of one run; ``..._fraction`` of its CPU seconds."""
    counted = steps[NOT_COUNTED:]

    def mean(name: str) -> float:
        return float(f"{sum(step[name] for step in counted) / len(counted):.4g}")

    names = ("cpu_s", "wall_s", "generate_cpu_s", "update_cpu_s", "rest_cpu_s", "tokens")
    result: dict[str, Any] = {name: mean(name) for name in names}
    result["tokens_per_cpu_s"] = round(result["tokens"] / result["cpu_s"])
    result["reward"] = float(f"{sum(step['reward'] for step in steps) / len(steps):.4g}")  # over every step
    return result


def judged(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each side, and the ratios of the runs that stood side by side."""
    sides = {side: {name: common.median([run[name] for run in runs[side]]) for name in runs[side][0]} for side in SIDES}
    pairs = list(zip(runs["trl"], runs["ours"], strict=True))
    cpu, wall = ([trl[name] / ours[name] for trl, ours in pairs] for name in ("cpu_s", "wall_s"))
    # A token of ours must not be cheaper because there are fewer of them.
    token = [ours["tokens_per_cpu_s"] / trl["tokens_per_cpu_s"] for trl, ours in pairs]
    ratios = {"cpu": cpu, "wall": wall, "per_token": token}
    return {
        **sides,
        "ratio": {name: common.median(values) for name, values in ratios.items()},
        "ratios": {name: [round(value, 2) for value in values] for name, values in ratios.items()},
        "runs": runs,
    }


HEAD = (
    f"{'length':7}{'updates':>8}{'threads':>8} | {'TRL cpu-s':>9}{'wall':>7}{'tok/s':>7}{'reward':>7} | "
    f"{'ours':>6}{'wall':>7}{'tok/s':>7}{'reward':>7} | "
    "generate, update, rest: TRL, ours | ratio cpu (all)      wall"
)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    trl, ours, ratio = row["trl"], row["ours"], row["ratio"]
    parts = "  ".join(
        f"{side['generate_cpu_s']:.2f} {side['update_cpu_s']:.2f} {side['rest_cpu_s']:.2f}" for side in (trl, ours)
    )
    ratios = f"{ratio['cpu']:.2f} ({', '.join(f'{value:.2f}' for value in row['ratios']['cpu'])})  {ratio['wall']:.2f}"
    return (
        f"{row['length']:7}{row['updates']:8}{row['threads']:8} | {trl['cpu_s']:9.2f}{trl['wall_s']:7.2f}"
        f"{trl['tokens_per_cpu_s']:7.0f}{trl['reward']:7.2f} | {ours['cpu_s']:6.2f}{ours['wall_s']:7.2f}"
        f"{ours['tokens_per_cpu_s']:7.0f}{ours['reward']:7.2f} | {parts:33} | {ratios}"
    )


def main() -> None:
    """Runs, prints and writes the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--updates", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="updates a batch")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="OMP_NUM_THREADS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps of a run (14 short, 6 long)")
    parser.add_argument("--trl-rows", type=int, help="rows of TRL's micro-batch")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one run")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    print(HEAD, flush=True)
    for length in options.lengths:
        start, rows = common.machine(), []
        for updates, threads in itertools.product(options.updates, options.threads):
            rows.append(compare(length, updates, threads, options))
            print(line(rows[-1]), flush=True)
        if not options.no_save:
            matched = {"prompts": PROMPTS, "samples": SAMPLES, "lr": LR, "steps_not_counted": NOT_COUNTED}
            report = {"machine": start, "options": vars(options) | matched, "task": asdict(TASKS[length]), "rows": rows}
            print(common.write_report(f"cpu_vs_trl-{length}", report))


if __name__ == "__main__":
    main()
