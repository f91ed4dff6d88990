"""Does it learn? Each task from nothing, with several seeds, through the real commands.

    python benchmarks/learning_curves.py [--tasks addition guess] [--seeds 0 1 2] [--threads 2]
    python benchmarks/learning_curves.py --algorithms all [--seeds 0 1 2] [--threads 1]

For each task and seed: ``skyrl data``, ``skyrl warmup`` and ``skyrl train +experiment=...``, each in a process of its
own. Prints where each run started and ended; writes ``benchmarks/results/learning_curves-<date>.json`` and, for each
task, a picture beside it. With ``--algorithms``, the addition task with every variant of ``algorithm_variants.py`` (or
those named), from the same warm model; see ``algorithm_curves.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.common import RESULTS, SKYRL, WORK
from skyrl_train.tracking.curves import plot

SCORE = "eval/all/avg_score"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How a task is made, warmed up and trained, and what is promised of it."""

    data: tuple[str, ...]
    warmup: tuple[str, ...]
    experiment: str
    gain: float
    """Every seed rises by this much, in percentage points."""
    start: float = 100.0
    """Every seed starts at this score or below, in per cent."""
    end: float = 0.0
    """Every seed ends at this score or above."""
    minutes: float = 1e9
    """Of training, at most."""


TASKS = {
    "addition": Task(data=("addition",), warmup=(), experiment="quickstart", gain=20, start=60, end=85, minutes=5),
    "guess": Task(
        data=("guess", "--high", "15", "--max-turns", "5"),
        warmup=("--steps", "200", "--until-accuracy", "1"),
        experiment="guess",
        gain=20,
    ),
}


def learn(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Data, warm-up and training of one seed. Returns its curve and times."""
    task, folder = TASKS[name], WORK / "curves" / name
    warmup_s = prepare(name, seed, options)
    out = folder / f"run-{seed}"
    steps, train_s = train(name, seed, out, options, *options.override)
    facts = {"warmup_s": round(warmup_s, 1), "train_s": round(train_s, 1)}
    result = outcome(task, steps, train_s)
    return {"task": name, "seed": seed, **facts, "load_1_minute": common.machine()["load_1_minute"], **result}


def prepare(name: str, seed: int, options: argparse.Namespace) -> float:
    """Makes the data and the warm model of one seed; the seconds that the warm-up took."""
    task, folder = TASKS[name], WORK / "curves" / name
    data, model = folder / "data", folder / f"model-{seed}"
    (model / "warmup.json").unlink(missing_ok=True)
    threads = ("--threads", str(options.threads), "--seed", str(seed))
    skyrl(folder / f"data-{seed}.log", options, "data", *task.data, "--out", str(data))
    arguments = ("--data", str(data), "--out", str(model), *task.warmup, *threads)
    return skyrl(folder / f"warmup-{seed}.log", options, "warmup", *arguments)


def train(
    name: str, seed: int, out: Path, options: argparse.Namespace, *more: str
) -> tuple[list[dict[str, float]], float]:
    """Trains from the warm model of a seed into ``out``; the lines of ``metrics.jsonl``, and the seconds it took."""
    task, folder = TASKS[name], WORK / "curves" / name
    data, model = folder / "data", folder / f"model-{seed}"
    (out / "metrics.jsonl").unlink(missing_ok=True)
    changed = {
        "data.train_data": f"[{data}/train.parquet]",
        "data.val_data": f"[{data}/validation.parquet]",
        "trainer.policy.model.path": model,
        "trainer.ckpt_path": out / "checkpoints",
        "trainer.export_path": out / "exports",
        "trainer.num_threads": options.threads,
        "trainer.seed": seed,
        "hydra.run.dir": out,
    }
    overrides = [f"{key}={value}" for key, value in changed.items()]
    overrides += [text.format(model=model) for text in more]
    train_s = skyrl(out.parent / f"{out.name}.log", options, "train", f"+experiment={task.experiment}", *overrides)
    return read(out), train_s


def read(out: Path) -> list[dict[str, float]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def skyrl(log: Path, options: argparse.Namespace, *arguments: str) -> float:
    """Runs one of our commands; the seconds it took."""
    start = time.perf_counter()
    common.run([*SKYRL, *arguments], threads=options.threads, timeout=options.timeout, log=log)
    return time.perf_counter() - start


def outcome(task: Task, steps: list[dict[str, float]], train_s: float) -> dict[str, Any]:
    """The curves, start and end, and which promises were not kept."""
    scores = {int(step["step"]): round(100 * step[SCORE], 1) for step in steps if SCORE in step}
    rewards = [step["reward/mean"] for step in steps if "reward/mean" in step]
    start, end = scores[min(scores)], scores[max(scores)]
    broken = {
        f"starts at {start}, above {task.start:g}": start > task.start,
        f"ends at {end}, below {task.end:g}": end < task.end,
        f"gains {end - start:.1f}, less than {task.gain:g}": end - start < task.gain,
        f"trains for {train_s / 60:.1f} minutes, more than {task.minutes:g}": train_s > 60 * task.minutes,
    }
    return {
        "start": start,
        "end": end,
        "gain": round(end - start, 1),
        "reward_first_10": _mean(rewards[:10]),
        "reward_last_10": _mean(rewards[-10:]),
        "steps": len(rewards),
        "scores": scores,
        "broken": [text for text, is_broken in broken.items() if is_broken],
    }


def draw(name: str, seeds: list[int]) -> Path:
    """The picture of a task's runs."""
    runs = {f"seed {seed}": WORK / "curves" / name / f"run-{seed}" for seed in seeds}
    return plot(runs, RESULTS / f"learning_curves-{name}.png", title=name)


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 3)


def main() -> int:
    """Runs, prints, draws and writes; exit status 1 if a promise was not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one command")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--algorithms", nargs="+", metavar="NAME", help="all, or names of algorithm_variants.py")
    parser.add_argument("--resume", action="store_true", help="with --algorithms: keep runs that have ended")
    parser.add_argument("--minutes", type=float, default=1e9, help="with --algorithms: begin no variant after so long")
    parser.add_argument("--override", nargs="*", default=[], metavar="KEY=VALUE", help="further keys for skyrl train")
    options = parser.parse_args()
    if options.algorithms:
        from benchmarks.algorithm_curves import compare

        return compare(options)
    machine, rows = common.machine(), []
    print(f"{'task':10}{'seed':>5}{'start %':>9}{'end %':>7}{'gain':>7}{'reward':>15}{'warm-up':>9}{'training':>10}")
    for name in options.tasks:
        for seed in options.seeds:
            row = learn(name, seed, options)
            rows.append(row)
            reward = f"{row['reward_first_10']:.2f} -> {row['reward_last_10']:.2f}"
            print(
                f"{name:10}{seed:5}{row['start']:9.1f}{row['end']:7.1f}{row['gain']:+7.1f}{reward:>15}"
                f"{row['warmup_s']:8.0f}s{row['train_s']:9.0f}s  {'; '.join(row['broken'])}",
                flush=True,
            )
    if not options.no_save:
        for name in options.tasks:
            print(draw(name, options.seeds))
        tasks = {name: asdict(TASKS[name]) for name in options.tasks}
        print(common.write_report("learning_curves", {"machine": machine, "tasks": tasks, "rows": rows}))
    return int(any(row["broken"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
