"""Timing: ``Phase``, one stretch of work, and ``StepRecord``, what a step gathers."""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Phase:
    """One stretch of work. Set ``tokens`` inside the ``with`` to have ``tokens_per_s`` logged."""

    name: str
    who: str
    step: int | None
    parent: Phase | None
    start: float
    """Seconds of the monotonic clock."""
    tokens: int | None = None

    @property
    def path(self) -> tuple[str, ...]:
        """The names from the outermost phase to this one."""
        return (*(self.parent.path if self.parent else ()), self.name)


current_phase: contextvars.ContextVar[Phase | None] = contextvars.ContextVar("current_phase", default=None)
"""The phase that this task is in. A task started inside a phase inherits it, so nesting is right under concurrency."""


@dataclass(slots=True)
class StepRecord:
    """What one step gathers: metrics, and when each phase ran."""

    step: int
    start: float
    metrics: dict[str, float] = field(default_factory=dict)
    spans: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    done: bool = False

    def add(self, phase: Phase, end: float) -> None:
        """Counts a phase that ended."""
        self.spans.setdefault(phase.name, []).append((max(phase.start, self.start), end))
        if phase.tokens is not None:
            self.tokens[phase.name] = self.tokens.get(phase.name, 0) + phase.tokens

    def result(self, end: float) -> dict[str, float]:
        """The metrics with ``time/<phase>``, ``tokens_per_s/<phase>`` and ``time/step``, all in seconds."""
        times = {name: covered(spans) for name, spans in self.spans.items()}
        rates = {f"tokens_per_s/{n}": count / times[n] for n, count in self.tokens.items() if times[n] > 0}
        timed = {f"time/{name}": seconds for name, seconds in times.items()}
        return self.metrics | timed | rates | {"time/step": end - self.start}


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans was running: phases side by side are not counted twice."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
