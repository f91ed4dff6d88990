"""EnvRunner: deadlines, one error type, a check of what comes back."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from envs.conftest import ROOT, a_prompt
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.envs.runner import EnvRunner
from skyrl_train.errors import ConfigError, EnvError, EnvTimeoutError
from skyrl_train.types import Prompt

USER = {"role": "user", "content": "go on"}
ASSISTANT = {"role": "assistant", "content": "I go on"}


class Told(Env):
    """Does in each method what the test says; counts how often it was closed."""

    def __init__(self, prompt: Prompt | None = None, **actions: Callable[..., Any]) -> None:
        super().__init__(prompt or a_prompt("told"), {})
        self.actions, self.closed = actions, 0

    def init(self) -> Any:
        return self.actions.get("init", lambda: [USER])()

    def step(self, response: str) -> Any:
        return self.actions.get("step", lambda _: StepResult(terminated=True))(response)

    def close(self) -> None:
        self.closed += 1
        self.actions.get("close", lambda: None)()


def step(action: Callable[..., Any], timeout: float = 5.0) -> StepResult:
    return asyncio.run(EnvRunner(max_workers=2, timeout=timeout).step(Told(step=action), "hello"))


def raising(error: BaseException) -> Callable[..., Any]:
    def action(*_: Any) -> Any:
        raise error

    return action


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class LaughsAtRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def over(**fields: Any) -> StepResult:
    return StepResult(**{"terminated": True, **fields})


BAD_STEPS: dict[str, tuple[Any, str]] = {
    "nothing": (None, "which is not a StepResult"),
    "a dict": ({"reward": 1.0}, "which is not a StepResult"),
    "a tuple": (([], 1.0, True, {}), "which is not a StepResult"),
    "a number": (1.0, "which is not a StepResult"),
    "no repr": (LaughsAtRepr(), "repr raises RuntimeError"),
    "reward nan": (over(reward=float("nan")), "reward=nan must be finite"),
    "reward inf": (over(reward=float("-inf")), "reward=-inf must be finite"),
    "reward none": (over(reward=None), "reward=None .* must be a number"),
    "reward text": (over(reward="1"), "reward='1' .* must be a number"),
    "reward list": (over(reward=[1.0]), "must be a number"),
    "reward complex": (over(reward=1j), "must be a number"),
    "reward array": (over(reward=np.ones(1)), r"\.item\(\)"),
    "reward huge": (over(reward=10**400), "does not fit"),
    "terminated text": (over(terminated="yes"), "terminated='yes'"),
    "terminated number": (over(terminated=1), "terminated=1"),
    "terminated none": (over(terminated=None), "terminated=None"),
    "truncated text": (over(truncated="no"), "truncated='no'"),
    "over and observations": (over(observations=[USER]), "terminated=True with 1 observations"),
    "cut and observations": (StepResult(truncated=True, observations=[USER]), "truncated=True with 1 observations"),
    "neither": (StepResult(), "neither terminated nor truncated"),
    "observations text": (StepResult(observations="go on"), "observations must be a list"),  # pyright: ignore
    "observations none": (StepResult(observations=None), "observations must be a list"),  # pyright: ignore
    "observations dict": (StepResult(observations=USER), "observations must be a list"),  # pyright: ignore
    "message text": (StepResult(observations=["go on"]), r"observations\[0\]='go on'"),  # pyright: ignore
    "message none": (StepResult(observations=[USER, None]), r"observations\[1\]=None"),  # pyright: ignore
    "no role": (StepResult(observations=[{"content": "x"}]), r"observations\[0\]: role=None"),  # pyright: ignore
    "wrong role": (StepResult(observations=[{"role": "env", "content": "x"}]), "role='env' .* must be one of"),
    "list as role": (StepResult(observations=[{"role": [], "content": "x"}]), r"role=\[\]"),  # pyright: ignore
    "assistant": (StepResult(observations=[ASSISTANT]), "only the policy speaks"),  # pyright: ignore
    "no content": (StepResult(observations=[{"role": "user"}]), "content=None .* must be a text"),  # pyright: ignore
    "number as content": (StepResult(observations=[{"role": "user", "content": 7}]), "content=7"),  # pyright: ignore
    "parts as content": (StepResult(observations=[{"role": "user", "content": [{}]}]), "content="),  # pyright: ignore
    "half a character": (StepResult(observations=[{"role": "user", "content": "a\ud800"}]), "surrogate pair at 1"),
    "metadata list": (over(metadata=[]), "metadata=.* must be a dict"),
    "metadata none": (over(metadata=None), "metadata=None"),
    "metadata name": (over(metadata={1: 2}), "metadata has the name 1"),
    "metadata nan": (over(metadata={"x": float("nan")}), r"metadata\['x'\]=nan must be finite"),
    "metadata huge": (over(metadata={"x": 10**400}), r"metadata\['x'\]=.* does not fit"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_bad_result_is_one_error_that_names_field_and_value(name: str) -> None:
    value, message = BAD_STEPS[name]
    with pytest.raises(EnvError, match=rf"env told of prompt source/7: step.*{message}"):
        step(lambda _: value)


BAD_OPENINGS: dict[str, tuple[Any, str]] = {
    "nothing": (None, "must be a list"),
    "text": ("go on", "must be a list"),
    "empty": ([], "returned no message"),
    "as skyrl-gym": (([USER], {}), "message 0="),
    "ends with the assistant": ([USER, ASSISTANT], "nothing to answer"),
    "content": ([{"role": "user", "content": None}], "message 0: content=None"),
    "role": ([{"role": "human", "content": "x"}], "message 0: role='human'"),
    "a generator": ((m for m in [USER]), "must be a list"),
}


@pytest.mark.parametrize("name", BAD_OPENINGS)
def test_a_bad_opening_is_one_error(name: str) -> None:
    value, message = BAD_OPENINGS[name]
    with pytest.raises(EnvError, match=rf"env told of prompt source/7: init.*{message}"):
        asyncio.run(EnvRunner(2, 5.0).init(Told(init=lambda: value)))


def test_what_is_right_passes_as_plain_values() -> None:
    result = step(lambda _: over(reward=np.float32(0.5), terminated=np.True_, metadata={"n": np.int64(3), "s": "x"}))
    assert (result.reward, result.terminated, result.metadata) == (0.5, True, {"n": 3, "s": "x"})
    assert [type(value) for value in (result.reward, result.terminated, result.metadata["n"])] == [float, bool, int]
    assert step(lambda _: over(reward=True)).reward == 1.0
    assert step(lambda _: over(reward=Fraction(1, 4))).reward == 0.25
    assert step(lambda _: StepResult(observations=(USER,))).observations == [USER]  # pyright: ignore


@pytest.mark.parametrize(
    "error",
    [
        ValueError("on purpose"),
        StopIteration(3),
        SystemExit(1),
        KeyboardInterrupt(),
        GeneratorExit(),
        MemoryError(),
        RecursionError("deep"),
        asyncio.CancelledError(),
        Unprintable(),
        TimeoutError("socket"),
        BaseException("base"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("method", ["init", "step", "close"])
def test_raising_is_one_error_with_its_cause(error: BaseException, method: str) -> None:
    runner, env = EnvRunner(2, 5.0), Told(**{method: raising(error)})
    calls = {
        "init": lambda: runner.init(env),
        "step": lambda: runner.step(env, "x"),
        "close": lambda: runner.close(env),
    }

    async def play() -> None:
        with pytest.raises(
            EnvError, match=rf"env told of prompt source/7: {method} raised {type(error).__name__}"
        ) as e:
            await calls[method]()
        assert e.value.__cause__ is error and not isinstance(e.value, EnvTimeoutError)
        assert (await runner.step(Told(), "x")).terminated  # the run goes on

    asyncio.run(play())


def test_an_env_error_keeps_its_text_and_gets_the_place() -> None:
    with pytest.raises(EnvError, match=r"^env told of prompt source/7: step: the database is gone$"):
        step(raising(EnvError("the database is gone")))


def test_a_hanging_env_is_a_timeout_that_says_where_it_hangs() -> None:
    end = threading.Event()

    async def play() -> None:
        runner, start = EnvRunner(max_workers=1, timeout=0.1), time.monotonic()
        with pytest.raises(EnvTimeoutError) as caught:
            await runner.step(Told(step=lambda _: end.wait(20)), "x")
        assert time.monotonic() - start < 3
        text = str(caught.value)
        assert text.startswith("env told of prompt source/7: step did not answer within environment.timeout=0.1 s.")
        assert "threading.py" in text and isinstance(caught.value, TimeoutError)
        assert runner.abandoned == 1
        assert (await runner.step(Told(), "x")).terminated  # its place is free again
        end.set()
        await _until(lambda: runner.abandoned == 0)

    asyncio.run(play())


def test_too_many_hanging_calls_fail_every_further_one_at_once() -> None:
    end = threading.Event()

    async def play() -> None:
        runner = EnvRunner(max_workers=2, timeout=0.05)
        hung = [runner.step(Told(step=lambda _: end.wait(20)), "x") for _ in range(3)]
        assert [type(e) for e in await asyncio.gather(*hung, return_exceptions=True)] == [EnvTimeoutError] * 3
        with pytest.raises(EnvError, match=r"not tried, as 3 env calls hang.*max_env_workers=2"):
            await runner.step(Told(), "x")
        end.set()
        await _until(lambda: runner.abandoned == 0)
        assert (await runner.step(Told(), "x")).terminated

    asyncio.run(play())


def test_a_cancelled_trajectory_leaves_its_call_counted() -> None:
    end = threading.Event()

    async def play() -> None:
        runner = EnvRunner(max_workers=1, timeout=30)
        task = asyncio.create_task(runner.step(Told(step=lambda _: end.wait(20)), "x"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert runner.abandoned == 1
        end.set()
        await _until(lambda: runner.abandoned == 0)

    asyncio.run(play())


def test_at_most_max_workers_calls_at_a_time() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def action(_: str) -> StepResult:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return over()

    async def play() -> None:
        runner = EnvRunner(max_workers=3, timeout=10)
        await asyncio.gather(*(runner.step(Told(step=action), "x") for _ in range(20)))

    asyncio.run(play())
    assert most == 3


class Asynchronous(Env):
    """Its methods are coroutines; ``step`` awaits what it is told."""

    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__(a_prompt("async"), {})
        self.action, self.threads, self.closed = action, set(), 0

    async def init(self) -> Any:
        await asyncio.sleep(0)
        self.threads.add(threading.current_thread().name)
        return [USER]

    async def step(self, response: str) -> Any:
        return await self.action()

    async def close(self) -> None:
        self.closed += 1


def test_async_methods_are_awaited() -> None:
    async def won() -> StepResult:
        await asyncio.sleep(0.01)
        return over(reward=1.0)

    async def play() -> None:
        runner, env = EnvRunner(2, 5.0), Asynchronous(won)
        assert await runner.init(env) == [USER]
        assert env.threads == {"MainThread"}
        assert (await runner.step(env, "x")).reward == 1.0
        await runner.close(env)
        await runner.close(env)
        assert env.closed == 1

    asyncio.run(play())


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(2), asyncio.CancelledError(), StopAsyncIteration()])
def test_async_raising_is_one_error(error: BaseException) -> None:
    async def fail() -> None:
        raise error

    with pytest.raises(EnvError, match=rf"env async of prompt source/7: step raised {type(error).__name__}"):
        asyncio.run(EnvRunner(2, 5.0).step(Asynchronous(fail), "x"))


def test_async_hanging_is_a_timeout_and_is_cancelled() -> None:
    ended = []

    async def hang() -> None:
        try:
            await asyncio.sleep(20)
        finally:
            ended.append(True)

    async def play() -> None:
        runner = EnvRunner(1, 0.05)
        with pytest.raises(EnvTimeoutError, match="env async of prompt source/7: step did not answer"):
            await runner.step(Asynchronous(hang), "x")
        await _until(lambda: runner.abandoned == 0)
        assert ended == [True]

    asyncio.run(play())


def test_a_decorated_coroutine_is_awaited_too() -> None:
    async def won() -> StepResult:
        return over(reward=1.0)

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapper(*args: Any) -> Any:
            return method(*args)

        return wrapper

    assert step(decorate(lambda _: won())).reward == 1.0


@pytest.mark.parametrize("failing", ["", "init", "step", "close"])
def test_closed_exactly_once(failing: str) -> None:
    async def play() -> None:
        runner = EnvRunner(2, 0.5)
        env = Told(**({failing: raising(ValueError("x"))} if failing else {}))
        for call in (lambda: runner.init(env), lambda: runner.step(env, "x"), *[lambda: runner.close(env)] * 3):
            try:
                await call()
            except EnvError as error:
                assert f": {failing} raised" in str(error)
        assert env.closed == 1

    asyncio.run(play())


def test_an_env_that_hangs_can_be_closed() -> None:
    end = threading.Event()

    async def play() -> None:
        runner, env = EnvRunner(1, 0.1), Told(step=lambda _: end.wait(20), close=end.set)
        with pytest.raises(EnvTimeoutError):
            await runner.step(env, "x")
        await runner.close(env)  # wakes the step, as closing a connection does
        await _until(lambda: runner.abandoned == 0)

    asyncio.run(play())


def test_making_has_the_deadline_and_a_late_env_is_closed() -> None:
    end, made = threading.Event(), []

    def slow(prompt: Prompt) -> Env:
        end.wait(20)
        made.append(Told(prompt))
        return made[0]

    async def play() -> None:
        runner = EnvRunner(1, 0.05)
        with pytest.raises(EnvTimeoutError, match="env told of prompt source/7: making it did not answer"):
            await runner.make(slow, a_prompt("told"))
        end.set()
        await _until(lambda: bool(made) and made[0].closed == 1)
        assert isinstance(await runner.make(Told, a_prompt("told")), Told)
        with pytest.raises(ConfigError, match="key='value': why"):
            await runner.make(raising(ConfigError("key", "value", "why")), a_prompt("told"))
        with pytest.raises(EnvError, match="making it raised OSError: gone"):
            await runner.make(raising(OSError("gone")), a_prompt("told"))

    asyncio.run(play())


def test_an_env_that_spoils_its_own_prompt_is_named_by_its_class() -> None:
    env = Told(step=raising(ValueError("x")))
    env.prompt = "mine now"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(EnvError, match=r"env Told of prompt \?: step raised ValueError"):
        asyncio.run(EnvRunner(2, 5.0).step(env, "x"))


def test_a_hanging_env_does_not_keep_the_interpreter_from_ending() -> None:
    script = """
import asyncio, time
from envs.test_runner import Told, EnvRunner
async def play():
    try:
        await EnvRunner(1, 0.1).step(Told(step=lambda _: time.sleep(60)), "x")
    except TimeoutError:
        print("given up")
asyncio.run(play())
"""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "given up\n", "")


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
