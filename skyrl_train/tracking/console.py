"""What the user sees: a line a step, and under it, on a terminal, what is going on now. Always on.

Without a terminal (a pipe, a log file, ``TERM=dumb``) there are only the lines.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from skyrl_train.tracking.line import duration, score, sparkline, step_line
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.sink import RunInfo, Sink

REFRESHES_PER_SECOND = 4
WINDOW = 20
"""Steps that the estimate of the time left is made from."""


class ConsoleSink(Sink):
    """Prints each step to stdout and to ``console.log``."""

    def __init__(self, run: RunInfo, folder: RunFolder) -> None:
        super().__init__(run, folder)
        self._status = Status(run.total_steps)
        self._live: Live | None = None

    def open(self, resumed_after: int) -> None:
        self._status.last_step = resumed_after
        # The wrapper finds sys.stdout anew at each write, so whoever redirects it later is obeyed.
        console = Console()
        if sys.stdout.isatty() and console.is_interactive:
            self._status.plain_characters = not console.encoding.lower().startswith("utf")
            self._live = Live(
                self._status,
                console=console,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
                redirect_stderr=sys.stderr.isatty(),  # else `2>errors.log` would come out empty
            )
            self._live.start()
        steps = f"{self.run.total_steps} steps" if self.run.total_steps else "steps"
        after = f", after step {resumed_after}" if resumed_after else ""
        self._print(f"{self.run.project}/{self.run.name}: {steps}{after}, into {self.folder.path}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._status.ended(step, metrics)
        self._print(step_line(step, self.run.total_steps, metrics))

    def running(self, step: int | None, phases: Sequence[str]) -> None:
        self._status.running(step, phases)

    def close(self, failed: bool) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, line: str) -> None:
        self.folder.append_console(line)
        encoding = self._live.console.encoding if self._live else getattr(sys.stdout, "encoding", None) or "utf-8"
        shown = line.encode(encoding, "replace").decode(encoding)
        if self._live is not None:
            self._live.console.print(Text(shown), soft_wrap=True)
        else:
            try:
                print(shown, flush=True)
            except BrokenPipeError:  # the reader left (`| head`); the run goes on, and nothing complains at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Status:
    """The line at the bottom of a terminal; drawn anew several times a second by rich's thread."""

    def __init__(self, total_steps: int) -> None:
        self.total, self.last_step = total_steps, 0
        self.plain_characters = False
        self._step: int | None = None
        self._phase, self._phase_start = "", time.monotonic()
        self._rewards: deque[float] = deque(maxlen=500)
        self._ends: deque[float] = deque([time.monotonic()], maxlen=WINDOW + 1)
        self._tokens_per_s: float | None = None

    def ended(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes in a step that ended."""
        self.last_step = step
        self._ends.append(time.monotonic())
        if "reward/mean" in metrics:
            self._rewards.append(metrics["reward/mean"])
        self._tokens_per_s = metrics.get("tokens_per_s/generate", self._tokens_per_s)

    def running(self, step: int | None, phases: Sequence[str]) -> None:
        """Takes in which phases run now; the latest is shown."""
        self._step = step
        now = phases[-1] if phases else ""
        if now != self._phase:
            self._phase, self._phase_start = now, time.monotonic()

    def seconds_left(self) -> float | None:
        """Seconds to the end, from the last ``WINDOW`` steps; None before the first has ended."""
        if not self.total or len(self._ends) < 2:
            return None
        a_step = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        spent = time.monotonic() - self._ends[-1]
        return max(0.0, (self.total - self.last_step) * a_step - min(spent, a_step))

    def text(self, width: int) -> str:
        """The line, as much of it as fits into ``width`` characters."""
        step = self.last_step if self._step is None else self._step
        parts = [f"step {step}/{self.total}" if self.total else f"step {step}"]
        if self.total:
            parts[0] += " " + self._bar(16 if width >= 100 else 8)
        if self._phase:
            parts.append(f"{self._phase} {time.monotonic() - self._phase_start:.0f}s")
        if (left := self.seconds_left()) is not None:
            parts.append(f"ETA {duration(round(left)) if left >= 9.5 else f'{left:.0f}s'}")
        if self._rewards:
            course = "" if self.plain_characters else " " + sparkline(list(self._rewards), 16)
            parts.append(f"reward {score(self._rewards[-1])}{course}")
        if self._tokens_per_s:
            parts.append(f"{self._tokens_per_s:,.0f} tok/s")
        while len(parts) > 1 and len("  ".join(parts)) > width:
            parts.pop()
        return "  ".join(parts)[:width]

    def _bar(self, width: int) -> str:
        full, empty = ("#", "-") if self.plain_characters else ("━", "╌")
        done = min(width, self.last_step * width // self.total)
        return full * done + empty * (width - done)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.text(options.max_width), no_wrap=True, overflow="crop", style="cyan")
