"""Every estimator, loss, reduction and filter on the quickstart task, from the same warm model: see learning_curves.py.

Writes ``results/learning_curves-algorithms-<date>.json`` and one picture, each variant beside GRPO.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from benchmarks import common, learning_curves
from benchmarks.algorithm_variants import MAIN, VARIANTS, Variant
from benchmarks.common import RESULTS, WORK

TASK = "addition"
PROMISE = 0.8
"""Part of GRPO's gain that every variant reaches."""
LATE = 3
"""Evaluations at the end of a run whose mean is what it reached: one alone swings by some points from step to step."""
WITHOUT_FILES = ("trainer.ckpt_interval=-1", "trainer.hf_save_interval=-1", "trainer.dump_trajectories=false")


def compare(options: argparse.Namespace) -> int:
    """Runs, prints, draws and writes; exit status 1 if a promise was not kept."""
    names = list(VARIANTS) if options.algorithms == ["all"] else ["grpo", *options.algorithms]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise SystemExit(f"no variant {', '.join(unknown)}; there are: {', '.join(VARIANTS)}")
    machine, started, left_out = common.machine(), time.monotonic(), []
    rows: list[dict[str, Any]] = []
    print(f"{'variant':28}{'seed':>5}{'start %':>9}{'end %':>7}{'gain':>7}{'of GRPO':>9}{'reward':>15}{'training':>10}")
    for seed in options.seeds:
        folder = WORK / "curves" / TASK / f"algorithms-{seed}"
        if not (options.resume and folder.exists()):
            learning_curves.prepare(TASK, seed, options)
        every = options.algorithms != ["all"] or seed == options.seeds[0]
        for name in dict.fromkeys(names if every else MAIN):
            out = folder / slug(name)
            late = time.monotonic() - started > 60 * options.minutes
            if late and not (options.resume and (out / "seconds").exists()):
                left_out.append(f"{name}, seed {seed}")
                continue
            rows.append(_row(name, VARIANTS[name], seed, out, options, rows))
            _print(rows[-1])
    print(f"left out, for want of time: {'; '.join(left_out) or 'none'}")
    if not options.no_save:
        picture = draw(rows, RESULTS / "learning_curves-algorithms.png")
        asked = {"seeds": options.seeds, "threads": options.threads, "override": options.override}
        report = {"machine": machine, "options": asked, "promise": PROMISE, "late": LATE, "task": TASK, "rows": rows,
                  "left_out": left_out}  # fmt: skip
        print(picture, common.write_report("learning_curves-algorithms", report), sep="\n")
    return int(any(row["broken"] for row in rows))


def _row(
    name: str, variant: Variant, seed: int, out: Path, options: argparse.Namespace, before: list[dict[str, Any]]
) -> dict[str, Any]:
    """Trains one variant, or reads what it left, and compares it with the seed's GRPO."""
    done = out / "seconds"
    if options.resume and done.exists():
        steps, train_s = learning_curves.read(out), float(done.read_text())
    else:
        done.unlink(missing_ok=True)
        more = (*WITHOUT_FILES, *variant.overrides, *options.override)
        steps, train_s = learning_curves.train(TASK, seed, out, options, *more)
        done.write_text(str(train_s))
    found = learning_curves.outcome(learning_curves.TASKS[TASK], steps, train_s)
    late = list(found["scores"].values())[-LATE:]
    found["end"] = round(sum(late) / len(late), 1)
    found["gain"] = round(found["end"] - found["start"], 1)
    grpo = next((row["gain"] for row in before if row["seed"] == seed and row["variant"] == "grpo"), found["gain"])
    part = found["gain"] / grpo
    broken = "" if part >= PROMISE or variant.exempt else f"gains {100 * part:.0f} % of GRPO's, under {100 * PROMISE:g}"
    kept = ("start", "end", "gain", "reward_first_10", "reward_last_10", "steps", "scores")
    return {
        "variant": name, "seed": seed, "overrides": variant.overrides, "train_s": round(train_s, 1),
        **{key: found[key] for key in kept}, "part_of_grpo": round(part, 3), "exempt": variant.exempt, "broken": broken,
        "load_1_minute": common.machine()["load_1_minute"],
    }  # fmt: skip


def _print(row: dict[str, Any]) -> None:
    reward = f"{row['reward_first_10']:.2f} -> {row['reward_last_10']:.2f}"
    note = row["broken"] or (f"({row['exempt']})" if row["exempt"] else "")
    print(
        f"{row['variant']:28}{row['seed']:5}{row['start']:9.1f}{row['end']:7.1f}{row['gain']:+7.1f}"
        f"{100 * row['part_of_grpo']:8.0f}%{reward:>15}{row['train_s']:9.0f}s  {note}",
        flush=True,
    )


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """One panel a variant: its held-out accuracy over the steps, GRPO's of the same seed in grey behind it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["variant"] for row in rows))
    across = 6
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(2.4 * across, 1.8 * down), layout="constrained")
    FigureCanvasAgg(figure)
    grpo = {row["seed"]: row["scores"] for row in rows if row["variant"] == "grpo"}
    for place, name in enumerate(names):
        axes = figure.add_subplot(down, across, place + 1)
        for row in (r for r in rows if r["variant"] == name):
            for scores, colour in ((grpo[row["seed"]], "0.75"), (row["scores"], "C0")):
                axes.plot([int(step) for step in scores], list(scores.values()), color=colour, linewidth=1.4)
        axes.set_ylim(0, 100)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.suptitle("addition: greedy accuracy on held-out sums, % over steps (grey: GRPO)", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def slug(name: str) -> str:
    """A folder's name, another one for each variant (``reinforce`` is not ``reinforce++``)."""
    return "".join(c if c.isalnum() else "plus" if c == "+" else "-" for c in name).strip("-")
