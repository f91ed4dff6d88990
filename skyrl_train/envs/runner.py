"""Calls envs so that none of them can harm the run: with a deadline, one error type, and a check of what comes back."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from skyrl_train.envs.base import Env, StepResult
from skyrl_train.envs.checks import checked_opening, checked_step
from skyrl_train.envs.threads import Outcome, Running, in_task, in_thread
from skyrl_train.errors import EnvError, EnvTimeoutError, SkyRLError
from skyrl_train.types import Message, Prompt

log = logging.getLogger("skyrl.envs")


class EnvRunner:
    """Runs env calls. Every failure is an EnvError that names the env's class, the prompt and the method.

    Plain methods run in a daemon thread each, ``async`` ones as a task. A call that misses its deadline is left behind:
    its thread cannot be ended. It frees its place for other calls and is counted for as long as it hangs.

    Args:
        max_workers: calls at the same time (``environment.skyrl_gym.max_env_workers``), and most calls that may hang
            before every further one fails at once.
        timeout: seconds for one call (``environment.timeout``), counted from its start.
    """

    def __init__(self, max_workers: int, timeout: float) -> None:
        self.max_workers, self.timeout = max_workers, timeout
        self.abandoned = 0
        """Calls that missed their deadline and hang still."""
        self._permits = asyncio.Semaphore(max_workers)
        self._closed: WeakValueDictionary[int, Env] = WeakValueDictionary()

    async def make(self, factory: Callable[[Prompt], Env], prompt: Prompt) -> Env:
        """``factory(prompt)`` with the deadline: an env's constructor may read files or connect to something.

        Raises:
            SkyRLError: what ``make_env`` raises.
            EnvTimeoutError: it took too long. An env that is made later is closed.
        """
        where = f"env {prompt.env_class} of prompt {prompt.uid}: making it"
        return await self._call(where, _close_late, factory, prompt)

    async def init(self, env: Env) -> list[Message]:
        """The conversation's opening messages."""
        where = _where(env, "init")
        return checked_opening(await self._method(env, "init"), where)

    async def step(self, env: Env, response: str) -> StepResult:
        """The env's reply to one completion."""
        where = _where(env, "step")
        return checked_step(await self._method(env, "step", response), where)

    async def close(self, env: Env) -> None:
        """Closes the env. A second call does nothing, also if the first one failed."""
        if self._closed.get(id(env)) is env:
            return
        self._closed[id(env)] = env
        await self._method(env, "close")

    async def _method(self, env: Env, name: str, *args: Any) -> Any:
        method = getattr(env, name)
        if getattr(method, "__func__", None) is getattr(Env, name):  # the base's own cannot hang: no thread for it
            return method(*args)
        return await self._call(_where(env, name), None, method, *args)

    async def _call(
        self, where: str, late: Callable[[Outcome], None] | None, call: Callable[..., Any], *args: Any
    ) -> Any:
        async with self._permits:
            if self.abandoned > self.max_workers:
                raise EnvError(
                    f"{where}: not tried, as {self.abandoned} env calls hang already, more than "
                    f"environment.skyrl_gym.max_env_workers={self.max_workers}. Find what they wait for in the log."
                )
            deadline = time.monotonic() + self.timeout
            is_async = inspect.iscoroutinefunction(call)
            running = in_task(call(*args)) if is_async else in_thread(call, *args)
            value = await self._wait(where, running, deadline, late)
            if inspect.isawaitable(value):  # a plain method that returns a coroutine, as decorated ones do
                value = await self._wait(where, in_task(_awaited(value)), deadline, late)
            return value

    async def _wait(self, where: str, running: Running, deadline: float, late: Callable[[Outcome], None] | None) -> Any:
        ended = False
        try:
            ended = bool((await asyncio.wait([running.done], timeout=max(0.0, deadline - time.monotonic())))[0])
        finally:
            at = "" if ended else running.where()
            if not ended:  # too late, or the trajectory was cancelled
                self._abandon(running, late)
        if not ended:
            at = f" It was at {at}." if at else ""
            raise EnvTimeoutError(f"{where} did not answer within environment.timeout={self.timeout:g} s.{at}")
        if running.done.cancelled():
            raise EnvError(f"{where} was cancelled from within.")
        outcome = running.done.result()
        if outcome.error is not None:
            raise _translated(where, outcome.error) from outcome.error
        return outcome.value

    def _abandon(self, running: Running, late: Callable[[Outcome], None] | None) -> None:
        self.abandoned += 1

        def ended(done: asyncio.Future[Outcome]) -> None:
            self.abandoned -= 1
            if late is not None and not done.cancelled():
                late(done.result())

        running.done.add_done_callback(ended)
        if isinstance(running.done, asyncio.Task):
            running.done.cancel()


async def _awaited(value: Any) -> Any:
    return await value


def _where(env: Env, method: str) -> str:
    prompt = getattr(env, "prompt", None)  # a user's env may have put something else there
    name, uid = getattr(prompt, "env_class", type(env).__name__), getattr(prompt, "uid", "?")
    return f"env {name} of prompt {uid}: {method}"


def _translated(where: str, error: BaseException) -> SkyRLError:
    """The error to raise for what an env raised. An error of our own tree that says enough is kept."""
    if isinstance(error, SkyRLError) and not isinstance(error, EnvError) and where.endswith("making it"):
        return error
    if isinstance(error, EnvTimeoutError):
        return EnvTimeoutError(f"{where}: {error}")
    try:
        text = str(error)[:500]
    except Exception:  # a __str__ that raises
        text = "(its text cannot be had)"
    if isinstance(error, EnvError):
        return EnvError(f"{where}: {text}")
    return EnvError(f"{where} raised {type(error).__name__}: {text}" if text else f"{where} raised {error!r:.100}")


def _close_late(outcome: Outcome) -> None:
    """Closes an env whose making was given up."""

    def close() -> None:
        with suppress(Exception):  # nobody waits for this env any more
            outcome.value.close()

    if isinstance(outcome.value, Env) and not inspect.iscoroutinefunction(outcome.value.close):
        threading.Thread(target=close, name="env-close", daemon=True).start()
