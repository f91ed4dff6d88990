"""Numbers as people read them: the one line of a step, and the sparkline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

SCORES = ("accuracy", "avg_score", "pass_at_1")
"""What stands for an evaluation, the first that is there."""
_BLOCKS = "▁▂▃▄▅▆▇█"


def step_line(step: int, total: int, metrics: Mapping[str, float]) -> str:
    """``step 12/100  reward 0.53  len 22.1  gen 0.21s 9,800 tok/s  update 0.31s  eval 0.71``, what is there of it."""
    parts = [f"step {step}/{total}" if total else f"step {step}"]
    if "reward/mean" in metrics:
        parts.append(f"reward {score(metrics['reward/mean'])}")
    if "response/length_mean" in metrics:
        parts.append(f"len {metrics['response/length_mean']:,.1f}")
    for name, shown in (("generate", "gen"), ("update", "update")):
        if f"time/{name}" in metrics:
            rate = metrics.get(f"tokens_per_s/{name}") if name == "generate" else None
            parts.append(f"{shown} {duration(metrics[f'time/{name}'])}" + (f" {rate:,.0f} tok/s" if rate else ""))
    if evaluation := eval_part(metrics):
        parts.append(evaluation)
    troubles = {"failed": "trajectories/failed", "prompts lost": "prompts/lost", "skipped": "policy/skipped_updates"}
    parts += [f"{word} {metrics[key]:.0f}" for word, key in troubles.items() if metrics.get(key, 0) > 0]
    return "  ".join(parts)


def eval_part(metrics: Mapping[str, float]) -> str:
    """``eval 0.71``; with several sources ``eval 0.71 (gsm8k 0.65, math 0.77)``; empty where there was none."""
    scores = eval_scores(metrics)
    if not scores:
        return ""
    each = {source: value for source, value in scores.items() if source != "all"}
    overall = scores.get("all", sum(each.values()) / max(1, len(each)))
    if len(each) < 2:
        return f"eval {score(overall)}"
    listed = [f"{source} {score(value)}" for source, value in list(each.items())[:3]]
    more = [f"{len(each) - 3} more"] if len(each) > 3 else []
    return f"eval {score(overall)} ({', '.join(listed + more)})"


def eval_scores(metrics: Mapping[str, float]) -> dict[str, float]:
    """The score of each evaluated source, ``all`` among them: the first of ``SCORES`` that it has."""
    found: dict[str, tuple[int, float]] = {}
    for name, value in metrics.items():
        if not name.startswith("eval/") or name.count("/") < 2:
            continue
        source, kind = name.removeprefix("eval/").rsplit("/", 1)  # a source may be named org/name
        if kind in SCORES:
            found[source] = min(found.get(source, (len(SCORES), 0.0)), (SCORES.index(kind), value))
    return {source: value for source, (_, value) in found.items()}


def score(value: float) -> str:
    """Two decimals, more for what they would hide: 0.53, 0.0012, 1,234."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """0.21s, 12.3s, 2m05s, 1h02m."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 9.995:
        return f"{seconds:.2f}s"
    if seconds < 99.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The course of ``values`` in at most ``width`` characters, each the mean of a stretch; gaps where not finite."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [finite_mean(values[a:b]) for a, b in pairwise(edges)]
    known = [m for m in means if m is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    half, top = high / 2 - low / 2, len(_BLOCKS) - 1  # halves: the difference of two large numbers may overflow
    return "".join(
        " " if m is None else _BLOCKS[round((m / 2 - low / 2) / half * top) if half > 0 else top // 2] for m in means
    )


def finite_mean(values: Sequence[float]) -> float | None:
    """The mean of the finite ones; None if there is none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None
