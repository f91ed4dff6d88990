"""What raises, hangs or lies costs its own trajectory, is typed, and never becomes a silent reward of 0."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from skyrl_train.engines.base import Request
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.errors import EngineError, EngineTimeoutError, GenerationError, WorkerError
from skyrl_train.types import Outcome, Prompt, Trajectory

from .games import Book, user


class Breaks(Env):
    """Plays one turn, unless the prompt's uid says how to break."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__(prompt, {})
        self.how = prompt.uid
        if self.how == "make":
            raise RuntimeError("no database")

    def init(self) -> list:
        if self.how == "init":
            raise RuntimeError("no opening")
        return super().init()

    def step(self, response: str) -> Any:
        match self.how:
            case "step":
                raise KeyError("answer")
            case "exit":
                raise SystemExit(3)
            case "hang":
                time.sleep(1.0)
            case "nothing":
                return None
            case "nan":
                return StepResult(reward=float("nan"), terminated=True)
            case "text":
                return StepResult(reward="1.0", terminated=True)  # type: ignore[arg-type]
            case "silent":
                return StepResult(reward=1.0)
            case "both":
                return StepResult(observations=[user("x")], terminated=True)
            case "shape":
                return StepResult(observations=["x"])  # type: ignore[list-item]
        return StepResult(reward=1.0, terminated=True)

    def close(self) -> None:
        if self.how == "close":
            raise RuntimeError("cannot close")


def by_uid(made: list[Trajectory]) -> dict[str, Trajectory]:
    return {t.prompt.uid: t for t in made}


CAUSES = {
    "make": ("EnvError", "no database"),
    "init": ("EnvError", "no opening"),
    "step": ("EnvError", "answer"),
    "exit": ("EnvError", "SystemExit"),
    "hang": ("EnvTimeoutError", "environment.timeout=0.2 s"),
    "nothing": ("EnvError", "None"),
    "nan": ("EnvError", "reward"),
    "text": ("EnvError", "reward"),
    "silent": ("EnvError", "observations"),
    "both": ("EnvError", "terminated"),
    "shape": ("EnvError", "observations"),
}


def test_each_way_an_env_can_break_costs_its_own_trajectory(rig: Any, prompt: Callable[..., Prompt]) -> None:
    book = Book(Breaks)
    game = rig(make_env=book, n_samples_per_prompt=1, max_turns=2, timeout=0.2)
    made = by_uid(game.run(*map(prompt, [*CAUSES, "fine", "close"])))
    for how, (kind, text) in CAUSES.items():
        assert made[how].outcome is Outcome.FAILED, how
        assert (made[how].cause or "").startswith(f"{kind}: "), made[how].cause
        assert text in (made[how].cause or "")
    assert made["fine"].outcome is Outcome.FINISHED and made["fine"].reward == 1
    assert made["close"].outcome is Outcome.FINISHED and made["close"].reward == 1  # the conversation was over
    assert len(book.envs) == len(made) - 1 and book.each_closed_once


def test_an_engine_that_refuses_one_request_costs_that_trajectory(rig: Any, prompt: Any) -> None:
    def script(request: Request) -> str:
        if "a/0" in request.id:
            raise EngineError("prompt of 9 tokens is too long")
        return "good"

    book = Book(Breaks)
    made = by_uid(rig(script, book, n_samples_per_prompt=1).run(prompt("a/0"), prompt("b/0")))
    assert made["a/0"].cause == "EngineError: prompt of 9 tokens is too long"
    assert made["b/0"].outcome is Outcome.FINISHED
    assert book.each_closed_once


def test_a_request_without_an_answer_ends_at_its_deadline_and_is_taken_back(rig: Any, prompt: Any) -> None:
    aborted: list[str] = []
    game = rig(delay=lambda r: 30.0 if "a/0" in r.id else 0.0, n_samples_per_prompt=1, request_timeout=0.1)

    async def abort(request_ids: Any = None) -> None:
        aborted.extend(request_ids)

    game.engine.abort = abort
    start = time.monotonic()
    made = by_uid(game.run(prompt("a/0"), prompt("b/0")))
    assert time.monotonic() - start < 5
    assert (made["a/0"].cause or "").startswith("EngineTimeoutError: ")
    assert "generator.request_timeout=0.1 s" in (made["a/0"].cause or "")
    assert len(aborted) == 1 and "a/0" in aborted[0]
    assert made["b/0"].usable


def test_an_engines_own_timeout_keeps_its_words(rig: Any, prompt: Any) -> None:
    def script(request: Request) -> str:
        if "a/0" in request.id:
            raise EngineTimeoutError("http://node7:30000 sent nothing for 60 s")
        return "good"

    made = by_uid(rig(script, n_samples_per_prompt=1).run(prompt("a/0"), prompt("b/0")))
    assert made["a/0"].cause == "EngineTimeoutError: http://node7:30000 sent nothing for 60 s"


def test_an_aborted_or_empty_completion_is_a_failure(rig: Any, prompt: Any) -> None:
    game = rig(
        lambda r: [] if "b/0" in r.id else "good", n_samples_per_prompt=1,
        delay=lambda r: 30.0 if "a/0" in r.id else 0.05 if "c/0" in r.id else 0.0,
    )  # fmt: skip

    async def play() -> list[Trajectory]:
        running = asyncio.create_task(game.generator.generate([prompt(u) for u in ("a/0", "b/0", "c/0")], 1))
        while len(game.engine.requests) < 3:
            await asyncio.sleep(0.01)
        await game.engine.abort([r.id for r in game.engine.requests if "a/0" in r.id])
        return await running

    made = by_uid(asyncio.run(play()))
    assert "was aborted" in (made["a/0"].cause or "") and "has no token" in (made["b/0"].cause or "")
    assert [made[u].outcome for u in ("a/0", "b/0", "c/0")] == [Outcome.FAILED, Outcome.FAILED, Outcome.FINISHED]
    assert game.engine.open == set()


def test_when_all_fail_the_step_ends_and_counts_the_causes(rig: Any, prompt: Any) -> None:
    game = rig(make_env=Book(Breaks), n_samples_per_prompt=2)
    with pytest.raises(GenerationError, match="step 7: none of 8 trajectories is usable") as raised:
        game.run(*map(prompt, ["make", "init", "step", "nan"]), step=7)
    assert "8 x EnvError: env test of prompt make" in str(raised.value)


def test_the_causes_are_counted_by_kind(rig: Any, prompt: Any) -> None:
    def script(request: Request) -> str:
        if "hang" not in request.id and "step" not in request.id:
            raise EngineError(f"no room for {request.id}")
        return "good"

    game = rig(script, Book(Breaks), n_samples_per_prompt=1, timeout=0.2)
    with pytest.raises(GenerationError) as raised:
        game.run(*map(prompt, ["hang", "a", "b", "c", "step"]))
    text = str(raised.value)
    assert "3 x EngineError: no room for" in text and "1 x EnvTimeoutError" in text and "1 x EnvError" in text
    assert text.index("3 x") < text.index("1 x")


def test_a_group_left_with_one_is_filtered_with_the_reason(rig: Any, prompt: Any) -> None:
    def script(request: Request) -> str:
        place, sample, _ = request.order
        if (place == 0 and sample != 2) or (place == 1 and sample == 0):
            raise EngineError("down")
        return "good"

    game = rig(script, n_samples_per_prompt=3)
    made = game.run(prompt("a/0"), prompt("b/0"))
    assert [t.outcome for t in made] == [
        Outcome.FAILED, Outcome.FAILED, Outcome.FILTERED, Outcome.FAILED, Outcome.FINISHED, Outcome.FINISHED,
    ]  # fmt: skip
    assert "only one of its group" in (made[2].cause or "")


def test_a_single_sample_is_a_group_of_one_by_choice(rig: Any, prompt: Any) -> None:
    (made,) = rig(n_samples_per_prompt=1).run(prompt())
    assert made.outcome is Outcome.FINISHED


@pytest.mark.parametrize("error", [WorkerError("policy worker, rank 0, died"), ZeroDivisionError("a fault of ours")])
def test_what_is_no_trajectorys_fault_ends_the_step_as_itself(rig: Any, prompt: Any, error: Exception) -> None:
    """A dead worker is one error, not a group of them, and every env and session is closed."""

    def script(request: Request) -> str:
        if request.order[0] == 1:
            raise error
        return "good"

    book = Book(Breaks)
    game = rig(script, book, n_samples_per_prompt=2, delay=lambda r: 0.02 * r.order[0])
    with pytest.raises(type(error)) as raised:
        game.run(*map(prompt, "abc"))
    assert raised.value is error
    assert book.each_closed_once


def test_sessions_that_were_opened_half_way_are_closed(rig: Any, prompt: Any) -> None:
    game = rig(n_samples_per_prompt=2)
    open_sessions = game.engine.open_sessions

    async def opens_some(sessions: list[str]) -> None:
        await open_sessions(sessions[:1])
        raise WorkerError("gone")

    game.engine.open_sessions = opens_some
    with pytest.raises(WorkerError, match="gone"):
        game.run(prompt())  # the rig looks at the sessions


def test_a_cancelled_step_closes_every_env_and_session(rig: Any, prompt: Any) -> None:
    book = Book(Breaks)
    game = rig(make_env=book, n_samples_per_prompt=2, delay=lambda _: 60.0)

    async def play() -> None:
        running = asyncio.create_task(game.generator.generate([prompt("a"), prompt("b")], 1))
        while len(game.engine.requests) < 4:
            await asyncio.sleep(0.01)
        assert len(game.engine.open) == 4
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(play())
    assert game.engine.open == set()
    assert len(book.envs) == 4 and book.each_closed_once


def test_an_engine_that_cannot_close_a_session_does_not_keep_the_env_open(rig: Any, prompt: Any) -> None:
    book = Book(Breaks)
    game = rig(make_env=book, n_samples_per_prompt=1)
    close_sessions = game.engine.close_sessions
    failing = [True]

    async def fails_once(sessions: Any) -> None:
        await close_sessions(sessions)
        if failing.pop() if failing else False:
            raise EngineError("gone")

    game.engine.close_sessions = fails_once
    with pytest.raises(EngineError, match="gone"):
        game.run(prompt())
    assert book.each_closed_once
