"""``Tracker``: what the loop tells of itself, once a step, to the run folder and to every sink.

with tracker.step(step) as log:
    with tracker.phase("generate") as phase:
        phase.tokens = ...
    log({"policy/loss": ...})
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from skyrl_train.tracking.logs import warn_once
from skyrl_train.tracking.phases import Phase, StepRecord, current_phase
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.sink import RunInfo, Sink, make_sinks

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config

Log = Callable[[Mapping[str, Any]], None]
logger = logging.getLogger("skyrl.tracking")


class Tracker:
    """Times phases, gathers metrics, and hands each finished step to the sinks. Safe to use from several threads.

    Args:
        folder: where metrics and events go, whatever the sinks.
        loggers: the value of ``trainer.logger``: one name or several.
        run: names and length of the run, for the sinks.
        who: the process that speaks, noted in each event.

    Raises:
        ConfigError, MissingPackageError: a sink that cannot be made.
    """

    def __init__(
        self, folder: RunFolder, loggers: str | Sequence[str] = (), run: RunInfo | None = None, who: str = "trainer"
    ) -> None:
        self.folder, self.run, self.who = folder, run or RunInfo(), who
        self._sinks = make_sinks(loggers, self.run, folder)
        self._lock = threading.RLock()
        self._record: StepRecord | None = None
        self._running: list[Phase] = []
        self._opened = self._closed = False
        # Events are stamped with the time of day, measured with the monotonic clock: a clock that is set back while
        # the run goes on would otherwise give phases of negative length.
        self._epoch = time.time() - time.monotonic()

    @classmethod
    def open(cls, config: Config, folder: RunFolder, total_steps: int) -> Tracker:
        """The tracker of a run. Writes the resolved config into the folder."""
        from skyrl_train.config.load import to_plain

        plain = to_plain(config)
        folder.write_config(plain)
        trainer = config.trainer
        run = RunInfo(project=trainer.project_name, name=trainer.run_name, total_steps=total_steps, config=plain)
        return cls(folder, trainer.logger, run)

    def resume_after(self, step: int) -> None:
        """Call before the first step: the run goes on after ``step``, or from the start with 0.

        What an earlier run left in the folder for later steps is taken out, so that the history has each step once.
        """
        removed = self.folder.truncate_after(step)
        if removed:
            logger.warning("%d steps after step %d are done again; their metrics moved to superseded/", removed, step)
        if step > 0 or removed:
            self.event("resume", after=step, removed=removed)
        self._open(step)

    @contextmanager
    def step(self, step: int) -> Iterator[Log]:
        """One step. Yields ``log``, which merges metrics; they go out once, when the step has ended well.

        A step that raises leaves an event with the error and the metrics so far, but no line of metrics, for it will be
        done again; the sinks are closed.
        """
        if self._record is not None:
            raise RuntimeError(f"step {step} starts inside step {self._record.step}")
        self._open(0)
        self._record = record = StepRecord(step, time.monotonic())

        def log(metrics: Mapping[str, Any]) -> None:
            if record.done:
                raise RuntimeError(f"step {step} has ended; its metrics are out")
            with self._lock:
                record.metrics.update(_numbers(metrics))

        try:
            yield log
        except BaseException as error:
            metrics = self._end(record)
            self._write(
                "step", {"step": step, "who": self.who, "error": _text(error), "metrics": metrics}, record.start
            )
            self.close(error)
            raise
        metrics = self._end(record)
        self._write("step", {"step": step, "who": self.who}, record.start)
        for sink in list(self._sinks):
            self._tell(sink, "log", step, metrics)

    @property
    def metrics(self) -> dict[str, float]:
        """What was logged of the running step so far, the times aside."""
        with self._lock:
            return dict(self._record.metrics) if self._record else {}

    @contextmanager
    def phase(self, name: str, *, tokens: int | None = None, who: str | None = None) -> Iterator[Phase]:
        """Times a stretch of work: an event, ``time/<name>``, and ``tokens_per_s/<name>`` where tokens are set.

        Phases nest and run side by side. Several of one name in a step count the time in which any was running.
        """
        step = self._record.step if self._record else None
        phase = Phase(name, who or self.who, step, current_phase.get(), time.monotonic(), tokens)
        token = current_phase.set(phase)
        # Written at the start too: when a run hangs or is killed, the timeline shows in what.
        self._write("phase_start", self._facts(phase))
        self._set_running(phase, True)
        error: BaseException | None = None
        try:
            yield phase
        except BaseException as raised:
            error = raised
            raise
        finally:
            end = time.monotonic()
            current_phase.reset(token)
            with self._lock:
                if self._record is not None:
                    self._record.add(phase, end)
            facts = self._facts(phase) | {"tokens": phase.tokens} | _failure(error)
            self._write("phase", facts, phase.start, end)
            self._set_running(phase, False)

    def event(self, name: str, /, **fields: Any) -> None:
        """Adds an event of any kind to the timeline."""
        self._write(name, {"who": self.who} | fields)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values of the run, for the timeline and the sinks."""
        self.event("summary", values=dict(values))
        for sink in list(self._sinks):
            self._tell(sink, "summary", values)

    def close(self, error: BaseException | None = None) -> None:
        """Ends the sinks, each of them whatever the others do. Events may still be written."""
        if self._closed:
            return
        self._closed = True
        if self._opened:
            self.event("run_end", **_failure(error))
            for sink in list(self._sinks):
                self._tell(sink, "close", error is not None)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def _open(self, resumed_after: int) -> None:
        if self._closed:
            raise RuntimeError("the tracker is closed")
        if self._opened:
            return
        self._opened = True
        self.event("run_start", pid=os.getpid(), host=socket.gethostname(), total_steps=self.run.total_steps)
        for sink in self._sinks:
            sink.open(resumed_after)

    def _end(self, record: StepRecord) -> dict[str, float]:
        with self._lock:
            record.done, self._record = True, None
            return record.result(time.monotonic())

    def _set_running(self, phase: Phase, running: bool) -> None:
        with self._lock:
            if running:
                self._running.append(phase)
            else:
                self._running.remove(phase)
            step = self._record.step if self._record else None
            names = [p.name for p in self._running]
        if self._opened and not self._closed:
            for sink in list(self._sinks):
                self._tell(sink, "running", step, names)

    def _tell(self, sink: Sink, method: str, *args: Any) -> None:
        """Calls a sink. One that raises is left out from then on; the run goes on."""
        try:
            with self._lock:
                getattr(sink, method)(*args)
        except Exception as error:
            name = type(sink).__name__
            logger.warning("%s is left out from now on: %s", name, _text(error))
            logger.debug("%s failed in %s", name, method, exc_info=True)
            if sink in self._sinks:
                self._sinks.remove(sink)
            self.event("sink_failed", sink=name, error=_text(error))

    def _facts(self, phase: Phase) -> dict[str, Any]:
        parent = phase.parent.name if phase.parent else None
        return {"name": phase.name, "who": phase.who, "step": phase.step, "parent": parent}

    def _write(
        self, event: str, fields: Mapping[str, Any], start: float | None = None, end: float | None = None
    ) -> None:
        """Adds an event; with ``start`` (monotonic), one that lasted until ``end``, or until now."""
        end = time.monotonic() if end is None else end
        span = {} if start is None else {"start": round(self._epoch + start, 4), "end": round(self._epoch + end, 4)}
        self.folder.append_event(event, **({"time": round(self._epoch + end, 4)} | dict(fields) | span))


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as floats. What is no number is left out with a warning: a stray value must not end a long run."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            warn_once(logger, "metric %s is left out: %s is not a number", name, type(value).__name__)
    return numbers


def _failure(error: BaseException | None) -> dict[str, str]:
    return {} if error is None else {"error": _text(error)}


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
