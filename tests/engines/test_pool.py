"""Several engines as one: where requests go, what happens when an engine fails, and which versions count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from skyrl_train.engines.base import Capabilities, Completion, Engine, Request, SamplingParams
from skyrl_train.engines.faults import EngineLostError, EngineRefusedError
from skyrl_train.engines.pool import EnginePool
from skyrl_train.errors import EngineError


class Counting(Engine):
    """Writes 1, 2, 3, ... from the number of prompt tokens on, one token a millisecond, until it is told to fail.

    So whoever reads a completion sees at once whether it went on where it should.
    """

    capabilities = Capabilities(name="counting", sampling=frozenset({"seed"}))

    def __init__(self, *, dies_after: int | None = None, knows: bool = True, version: int = 0) -> None:
        self.dies_after, self.knows, self.version = dies_after, knows, version
        self.seen: list[Request] = []
        self.running = self.most = 0
        self.stopped: set[str] = set()
        self.refuse_commit = False

    async def generate(self, request: Request) -> list[Completion]:
        self.seen.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return [await self._count(request)]
        finally:
            self.running -= 1

    async def _count(self, request: Request) -> Completion:
        done = Completion(stop_reason="length", weight_version=self.version)
        if request.prompt_ids[0] == 666:
            raise EngineRefusedError("counting: no 666 here")
        for i in range(request.params.max_new_tokens):
            if self.dies_after is not None and i >= self.dies_after:
                raise EngineLostError("counting: died", done if self.knows else None)
            await asyncio.sleep(0.001)
            if request.id in self.stopped:
                done.stop_reason = "abort"
                break
            done.token_ids.append(len(request.prompt_ids) + i)
            done.logprobs.append(-float(len(done.token_ids)))
        return done

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        self.stopped.update([r.id for r in self.seen] if request_ids is None else request_ids)

    async def commit_weights(self, version: int) -> None:
        if self.refuse_commit:
            raise EngineError("counting: it will not")
        self.version = version


def ask(
    name: str, tokens: int = 10, *, n: int = 1, session: str | None = None, prompt: Sequence[int] = (0,)
) -> Request:
    return Request(id=name, prompt_ids=prompt, params=SamplingParams(max_new_tokens=tokens, n=n), session=session)


def with_pool(play: Callable, *engines: Engine, **options: float | None) -> EnginePool:
    """Runs ``play(pool, *engines)``; the engines are called a, b, c, ..."""

    async def main() -> EnginePool:
        pool = EnginePool(dict(zip("abcdef", engines, strict=False)), **options)  # type: ignore[arg-type]
        try:
            await play(pool, *engines)
        finally:
            await pool.close()
        return pool

    return asyncio.run(main())


def counted(answer: Completion, tokens: int = 10, start: int = 1) -> bool:
    return answer.token_ids == list(range(start, start + tokens)) and len(answer.logprobs) == tokens


def test_requests_go_where_least_is_to_do_and_no_engine_gets_too_many() -> None:
    async def play(pool: EnginePool, a: Counting, b: Counting) -> None:
        answers = await asyncio.gather(*(pool.generate(ask(str(i))) for i in range(40)))
        assert all(counted(answer) for (answer,) in answers)
        assert (len(a.seen), len(b.seen)) == (20, 20) and (a.most, b.most) == (4, 4)

    with_pool(play, Counting(), Counting(), max_in_flight=4)


def test_who_waits_first_is_served_first() -> None:
    async def play(pool: EnginePool, a: Counting) -> None:
        await asyncio.gather(*(pool.generate(ask(str(i), 3)) for i in range(12)))
        assert [request.id for request in a.seen] == [str(i) for i in range(12)]

    with_pool(play, Counting(), max_in_flight=2)


def test_a_session_stays_where_it_began() -> None:
    async def play(pool: EnginePool, a: Counting, b: Counting) -> None:
        async def talk(name: str) -> None:
            for turn in range(4):
                await pool.generate(ask(f"{name}/{turn}", 3, session=name))
            await pool.close_sessions([name])

        await asyncio.gather(*(talk(f"s{i}") for i in range(6)))
        homes = {name: {e for e, engine in (("a", a), ("b", b)) for r in engine.seen if r.session == name}
                 for name in (f"s{i}" for i in range(6))}  # fmt: skip
        assert all(len(home) == 1 for home in homes.values())
        assert len(a.seen) == len(b.seen) == 12
        assert not pool._sessions

    with_pool(play, Counting(), Counting())


def test_what_a_lost_engine_had_sampled_is_carried_on_with_the_budget_that_is_left() -> None:
    async def play(pool: EnginePool, a: Counting, b: Counting) -> None:
        await pool.commit_weights(3)
        answers = await asyncio.gather(*(pool.generate(ask(str(i), session="s" if i else None)) for i in range(6)))
        assert all(counted(answer) and answer.stop_reason == "length" for (answer,) in answers)
        moved = [request for request in b.seen if len(request.prompt_ids) > 1]
        assert moved and all(list(r.prompt_ids) == [0, 1, 2, 3, 4] for r in moved)
        assert all(r.params.max_new_tokens == 6 for r in moved)
        assert list(pool.engines()) == ["b"] and "died" in pool.quarantined()["a"]
        seen = len(a.seen)
        await pool.generate(ask("later"))
        assert len(a.seen) == seen

    with_pool(play, Counting(dies_after=4), Counting())


def test_a_request_of_which_nobody_knows_what_was_sampled_is_not_sent_again() -> None:
    async def play(pool: EnginePool, a: Counting, b: Counting) -> None:
        with pytest.raises(EngineLostError, match="died"):
            await pool.generate(ask("x"))
        assert len(a.seen) == 1 and not b.seen and "a" in pool.quarantined()
        (answer,) = await pool.generate(ask("y"))
        assert counted(answer) and len(b.seen) == 1

    with_pool(play, Counting(dies_after=2, knows=False), Counting())


def test_a_refused_request_harms_no_engine() -> None:
    async def play(pool: EnginePool, a: Counting, b: Counting) -> None:
        with pytest.raises(EngineRefusedError, match="no 666"):
            await pool.generate(ask("x", prompt=[666]))
        assert len(pool.engines()) == 2 and len(a.seen) + len(b.seen) == 1

    with_pool(play, Counting(), Counting())


def test_a_request_that_ends_engines_does_not_get_all_of_them() -> None:
    async def play(pool: EnginePool, *engines: Counting) -> None:
        with pytest.raises(EngineLostError):
            await pool.generate(ask("poison"))
        assert list(pool.engines()) == ["c"] and not engines[2].seen

    with_pool(play, Counting(dies_after=0), Counting(dies_after=0), Counting())


def test_quarantine_moves_who_waits_and_who_runs() -> None:
    async def play(pool: EnginePool, a: Counting, b: Counting) -> None:
        tasks = [asyncio.create_task(pool.generate(ask(str(i), 40, session="s"))) for i in range(5)]
        await asyncio.sleep(0.01)
        assert len(a.seen) == 2 and not b.seen
        pool.quarantine("a", "its digests differ")
        answers = await asyncio.gather(*tasks)
        assert all(counted(answer, 40) for (answer,) in answers)
        assert len(a.seen) == 2 and len(b.seen) == 5
        assert pool.quarantined() == {"a": "its digests differ"}

    with_pool(play, Counting(), Counting(), max_in_flight=2)


def test_what_an_engine_with_old_weights_sampled_is_thrown_away() -> None:
    async def play(pool: EnginePool, a: Counting, b: Counting) -> None:
        await pool.commit_weights(5)
        a.version = 4  # its owner restarted it
        (answer,) = await pool.generate(ask("x"))
        assert counted(answer) and answer.weight_version == 5
        assert "weight version 4 after 5" in pool.quarantined()["a"]
        with pytest.raises(EngineError, match="proven weight version 4, the pool is at 5"):
            pool.readmit("a", 4)
        a.version = 5
        pool.readmit("a", 5)
        assert len(pool.engines()) == 2

    with_pool(play, Counting(), Counting())


def test_what_a_lost_engine_with_old_weights_had_sampled_is_thrown_away_too() -> None:
    async def play(pool: EnginePool, a: Counting, b: Counting) -> None:
        await pool.commit_weights(5)
        a.version = 4
        (answer,) = await pool.generate(ask("x"))
        assert counted(answer) and answer.weight_version == 5
        assert [list(request.prompt_ids) for request in b.seen] == [[0]], "from the start"

    with_pool(play, Counting(dies_after=3), Counting())


def test_what_follows_a_grammar_begins_anew() -> None:
    """An engine follows it from the start of a completion; in the middle it would begin another one."""

    async def play(pool: EnginePool, a: Counting, b: Counting) -> None:
        await pool.commit_weights(1)
        constrained = ask("x")
        constrained.params.extra["regex"] = "[0-9]+"
        (answer,) = await pool.generate(constrained)
        assert counted(answer) and [list(request.prompt_ids) for request in b.seen] == [[0]]

    with_pool(play, Counting(dies_after=4), Counting())


def test_an_engine_that_does_not_commit_serves_no_more() -> None:
    async def play(pool: EnginePool, a: Counting, b: Counting) -> None:
        a.refuse_commit = True
        await pool.commit_weights(2)
        assert list(pool.engines()) == ["b"] and "will not" in pool.quarantined()["a"]
        b.refuse_commit = True
        with pytest.raises(EngineError, match=r"no engine serves\. a: .*; b: .*will not"):
            await pool.commit_weights(3)

    with_pool(play, Counting(), Counting())


def test_when_none_is_left_requests_wait_for_one_to_come_back_as_long_as_told() -> None:
    async def play(pool: EnginePool, a: Counting) -> None:
        pool.quarantine("a", "gone")
        with pytest.raises(EngineError, match=r"no engine serves\. a: gone"):
            await EnginePool.generate(pool, ask("x"))

    with_pool(play, Counting())

    async def patient(pool: EnginePool, a: Counting) -> None:
        pool.quarantine("a", "gone")
        waiting = asyncio.create_task(pool.generate(ask("x")))
        given_up = asyncio.create_task(pool.generate(ask("y")))
        await asyncio.sleep(0.02)
        await pool.abort(["y"])
        ((aborted,), (b,)) = (await given_up, [Counting()])
        assert aborted.stop_reason == "abort"
        pool.readmit("a", 0, b)
        assert counted((await waiting)[0]) and not a.seen and len(b.seen) == 1
        pool.quarantine("a", "again")
        with pytest.raises(EngineError, match="None came back within"):
            await pool.generate(ask("z"))

    with_pool(patient, Counting(), patience=0.3)


def test_an_abort_reaches_who_runs_and_who_waits_and_each_sample() -> None:
    async def play(pool: EnginePool, a: Counting) -> None:
        many = asyncio.create_task(pool.generate(ask("many", 500, n=3)))
        other = asyncio.create_task(pool.generate(ask("other", 20)))
        await asyncio.sleep(0.01)
        await pool.abort(["many", "nobody"])
        answers = await many
        assert [x.stop_reason for x in answers] == ["abort"] * 3
        assert all(len(x.token_ids) < 500 for x in answers)
        assert counted((await other)[0], 20)
        last = asyncio.create_task(pool.generate(ask("last", 500)))
        await asyncio.sleep(0.01)
        await pool.abort()
        assert (await last)[0].stop_reason == "abort"
        assert not pool._aborted and not pool._active

    with_pool(play, Counting(), max_in_flight=2)


def test_a_cancelled_request_gives_its_place_back() -> None:
    async def play(pool: EnginePool, a: Counting) -> None:
        tasks = [asyncio.create_task(pool.generate(ask(str(i), 50))) for i in range(4)]
        await asyncio.sleep(0.01)
        for task in tasks[:3]:
            task.cancel()
        assert counted((await tasks[3])[0], 50)
        assert (pool._seats[0].busy, len(pool._seats[0].queue)) == (0, 0)

    with_pool(play, Counting(), max_in_flight=1)


def test_what_all_can_do_is_what_the_pool_can() -> None:
    class Sleeper(Counting):
        capabilities = Capabilities(name="counting", sampling=frozenset({"seed", "top_p"}), sleep=True)

    def look(*engines: Engine) -> Capabilities:
        return EnginePool(dict(zip("ab", engines, strict=True))).capabilities

    assert look(Sleeper(), Sleeper()).sleep and not look(Sleeper(), Counting()).sleep
    assert look(Sleeper(), Counting()).sampling == {"seed"}
    with pytest.raises(ValueError, match="needs an engine"):
        EnginePool({})
