"""One call in a daemon thread that it has for itself, awaited from asyncio.

Not a ThreadPoolExecutor: the interpreter waits for its threads at exit, so one env that hangs would keep a finished run
from ending. And a call never waits for another one's thread: only a thread that has ended its call takes a new one.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

IDLE = 64
"""Threads that are kept for further calls."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended. Not a future's exception: futures refuse StopIteration, and tasks let SystemExit through."""

    value: Any = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """A call under way."""

    done: asyncio.Future[Outcome]
    where: Callable[[], str]
    """The line it is at, for the message when it hangs."""


def in_thread(call: Callable[..., Any], *args: Any) -> Running:
    """Starts ``call(*args)`` in a thread that does nothing else. The future ends, if the call does, in this loop."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Outcome] = loop.create_future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            outcome = Outcome(value=context.run(call, *args))
        except BaseException as error:  # SystemExit too: it costs the trajectory, and must not pass in silence
            outcome = Outcome(error=error)
        with suppress(RuntimeError):  # the loop is closed: the run ended without waiting for this call
            loop.call_soon_threadsafe(_finish, done, outcome)

    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
    worker.work.put(run)
    return Running(done, lambda: _thread_line(worker.thread))


class _Worker:
    """A thread that runs one call after the other: to start one takes as long as many an env's whole step."""

    def __init__(self) -> None:
        self.work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.thread = threading.Thread(target=self._serve, name="env", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            self.work.get()()
            if len(_idle) >= IDLE:
                return
            _idle.append(self)


_idle: list[_Worker] = []
os.register_at_fork(after_in_child=_idle.clear)  # a child has none of its parent's threads


def in_task(coroutine: Coroutine[Any, Any, Any]) -> Running:
    """Starts a coroutine as a task whose result is an Outcome."""
    task = asyncio.get_running_loop().create_task(_guarded(coroutine))
    return Running(task, lambda: _task_line(task))


async def _guarded(coroutine: Coroutine[Any, Any, Any]) -> Outcome:
    try:
        return Outcome(value=await coroutine)
    except KeyboardInterrupt:  # in the main thread this is the user's
        raise
    except BaseException as error:
        return Outcome(error=error)


def _finish(done: asyncio.Future[Outcome], outcome: Outcome) -> None:
    if not done.done():
        done.set_result(outcome)


def _thread_line(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return _line(traceback.extract_stack(frame, limit=1)) if frame else ""


def _task_line(task: asyncio.Task[Any]) -> str:
    frames, coroutine = [], task.get_coro()
    while (inner := getattr(coroutine, "cr_await", None)) is not None:
        coroutine = inner
        frames.append(getattr(inner, "cr_frame", None))
    known = [frame for frame in frames if frame is not None]
    return _line(traceback.extract_stack(known[-1], limit=1)) if known else ""


def _line(stack: traceback.StackSummary) -> str:
    return f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}" if stack else ""
