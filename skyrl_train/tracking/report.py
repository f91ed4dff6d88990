"""``summarize``: what a run folder tells, in a few lines. Reads the folder and nothing else.

python -m skyrl_train.tracking.report outputs/<date>/<time>
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skyrl_train.errors import DataError, SkyRLError
from skyrl_train.tracking import json_lines
from skyrl_train.tracking.line import duration, eval_scores, finite_mean, score, sparkline
from skyrl_train.tracking.phases import covered


def summarize(folder: Path | str) -> str:
    """Steps and time, how reward and evaluation went, the share of each phase, and what was still running at a kill.

    Raises:
        DataError: the folder holds no metrics of a run.
    """
    folder = Path(folder)
    rows = read_metrics(folder / "metrics.jsonl")
    events = list(json_lines.read(folder / "events.jsonl"))
    if not rows and not events:
        raise DataError(f"{folder}: no metrics.jsonl and no events.jsonl, so this is not the folder of a run.")
    lines = [*_steps(rows), *_rewards(rows), *_evaluations(rows), *_shares(events), *_troubles(rows, events)]
    return "\n".join(lines)


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """The rows of a ``metrics.jsonl`` as numbers, in the order of their steps; non-finite ones are floats again."""
    numbers = [{k: json_lines.number(v) for k, v in row.items()} for row in json_lines.read(Path(path))]
    rows = [{k: v for k, v in row.items() if v is not None} for row in numbers]
    return sorted((row for row in rows if "step" in row), key=lambda row: row["step"])


def ends(values: Sequence[float]) -> tuple[float, float, int] | None:
    """Means of the first and the last ``n`` finite values, and ``n``: a fifth of them, at most 10. None for none."""
    count = max(1, min(10, len(values) // 5))
    first, last = finite_mean(values[:count]), finite_mean(values[-count:])
    return None if first is None or last is None else (first, last, count)


def _steps(rows: list[dict[str, float]]) -> list[str]:
    trained = [row for row in rows if row["step"] > 0]
    if not trained:
        return ["no step has ended"] if not rows else []
    times = [row["time/step"] for row in trained if "time/step" in row]
    each = f" ({duration(sum(times) / len(times))} a step)" if times else ""
    return [f"steps {trained[0]['step']:.0f} to {trained[-1]['step']:.0f} in {duration(sum(times))}{each}"]


def _rewards(rows: list[dict[str, float]]) -> list[str]:
    rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
    found = ends(rewards)
    if found is None:
        return []
    first, last, count = found
    basis = f"means of the first and last {count} steps" if count > 1 else "first and last step"
    return [f"reward {_moved(first, last)}   {sparkline(rewards)}   ({basis})"]


def _evaluations(rows: list[dict[str, float]]) -> list[str]:
    courses: dict[str, list[float]] = {}
    for row in rows:
        for source, value in eval_scores(row).items():
            courses.setdefault(source, []).append(value)
    if len(courses) == 2:  # "all" and the only source say the same
        courses.pop("all", None)
    return [
        f"eval {source} {_moved(values[0], values[-1])}   {sparkline(values)}" if len(values) > 1
        else f"eval {source} {score(values[0])}"
        for source, values in courses.items()
    ]  # fmt: skip


def _moved(first: float, last: float) -> str:
    word = "rose" if last > first else "fell" if last < first else "stayed"
    return f"stayed at {score(first)}" if word == "stayed" else f"{word} from {score(first)} to {score(last)}"


def _shares(events: list[dict[str, Any]]) -> list[str]:
    """Share of the steps' time per phase. Inner phases are left out: their time is in the outer one."""
    spans: dict[str, list[tuple[float, float]]] = {}
    steps: list[tuple[float, float]] = []
    for event in events:
        start, end = json_lines.number(event.get("start")), json_lines.number(event.get("end"))
        if start is None or end is None:
            continue
        if event.get("event") == "step":
            steps.append((start, end))
        elif event.get("event") == "phase" and event.get("parent") is None and event.get("step") is not None:
            spans.setdefault(str(event.get("name")), []).append((start, end))
    total = covered(steps)
    if total <= 0:
        return []
    times = {name: covered(s) for name, s in spans.items()}
    times["other"] = max(0.0, total - covered([span for s in spans.values() for span in s]))
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return ["time " + ", ".join(f"{name} {100 * t / total:.0f} % ({duration(t)})" for name, t in ordered if t > 0)]


def _troubles(rows: list[dict[str, float]], events: list[dict[str, Any]]) -> list[str]:
    """What went wrong: lost trajectories, a step that raised, a run that was killed and in which phase."""
    lines = []
    failed = sum(row.get("trajectories/failed", 0.0) for row in rows)
    if failed:
        lines.append(f'{failed:,.0f} trajectories failed: see "cause" in trajectories/')
    errors = [e for e in events if e.get("event") == "step" and e.get("error")]
    if errors:
        lines.append(f"step {errors[-1].get('step')} failed: {errors[-1]['error']}")
    begun = max((i for i, e in enumerate(events) if e.get("event") == "run_start"), default=0)
    last_run = events[begun:]
    if not any(e.get("event") == "run_end" for e in last_run):
        open_phases: list[tuple[Any, ...]] = []
        for event in last_run:
            key = tuple(event.get(k) for k in ("name", "who", "step", "parent"))
            if event.get("event") == "phase_start":
                open_phases.append(key)
            elif event.get("event") == "phase" and key in open_phases:
                open_phases.remove(key)
        inside = ", in " + " > ".join(str(key[0]) for key in open_phases) if open_phases else ""
        lines.append(f"the run is not over, or was killed{inside}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the summary of the folder named."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        print("usage: python -m skyrl_train.tracking.report RUN_FOLDER", file=sys.stderr)
        return 2
    try:
        print(summarize(argv[0]))
    except SkyRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
