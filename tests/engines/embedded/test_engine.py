"""The asyncio face: determinism under random latencies, aborts, cancellation, failures, deadlines."""

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.errors import EngineError, EngineTimeoutError

from .tiny import gap, make_model, make_prompts, make_request, serve


@pytest.fixture(scope="module")
def model():
    return make_model()


async def play(engine, game, prompt, turns, latency):
    """A conversation of several turns, whose env answers after a random time."""
    ids, seen = list(prompt), []
    for turn in range(turns):
        await asyncio.sleep(latency())
        request = make_request(
            f"{game}/{turn}",
            ids,
            session=str(game),
            order=(game, turn),
            seed=100 * game + turn,
            max_new_tokens=4 + game % 7,
        )
        (answer,) = await engine.generate(request)
        seen.append((answer.token_ids, answer.logprobs))
        ids += [*answer.token_ids, 10 + turn]
    await engine.close_sessions([str(game)])
    return seen


def play_all(engine, seed):
    chance = random.Random(seed)
    prompts = make_prompts(10, seed=3, longest=12)

    async def main():
        await engine.open_sessions([str(game) for game in range(len(prompts))])
        games = [
            play(engine, game, p, 1 + game % 3, lambda: chance.choice([0, 0, 0.001, 0.004]))
            for game, p in enumerate(prompts)
        ]
        chance.shuffle(games)
        played = await asyncio.gather(*games)
        return sorted(played)

    return asyncio.run(main()), engine.core.steps


@pytest.mark.parametrize("slots", [256, 4])
def test_conversations_are_the_same_to_the_bit_whatever_the_latency(model, slots):
    first, steps = play_all(EmbeddedEngine(model, max_num_seqs=slots), seed=0)
    for seed in (1, 2):
        again, steps_again = play_all(EmbeddedEngine(model, max_num_seqs=slots), seed=seed)
        assert again == first
        assert steps_again == steps  # the batches were the same


def test_the_same_to_the_bit_on_an_engine_that_has_served_before(model):
    engine = EmbeddedEngine(model)
    first, _ = play_all(engine, seed=0)
    serve(engine, [make_request("big", [5] * 200, max_new_tokens=50, n=20)])
    assert play_all(engine, seed=1)[0] == first


def test_a_session_that_never_comes_back_holds_the_others_until_it_is_closed(model):
    engine = EmbeddedEngine(model, request_timeout=0.2)

    async def main():
        await engine.open_sessions(["here", "gone"])
        with pytest.raises(EngineTimeoutError, match=r"waits for a request of .* open sessions \(gone") as raised:
            await engine.generate(make_request("a", [5, 6], session="here"))
        assert "'a'" in str(raised.value)
        waiting = asyncio.create_task(engine.generate(make_request("b", [5, 6], session="here")))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await engine.close_sessions(["gone"])
        (answer,) = await waiting
        return answer

    assert asyncio.run(main()).token_ids


def test_a_session_may_be_closed_while_its_last_request_runs(model):
    engine = EmbeddedEngine(model, request_timeout=5.0)

    async def main():
        await engine.open_sessions(["short", "long"])
        short = asyncio.create_task(engine.generate(make_request("s", [5], session="short", max_new_tokens=2)))
        long = asyncio.create_task(engine.generate(make_request("l", [6], session="long", ignore_eos=True)))
        await asyncio.sleep(0)
        await engine.close_sessions(["short", "long"])
        return await short, await long  # neither waits for a request that will not come

    _, (long,) = asyncio.run(main())
    assert len(long.token_ids) == 12


def test_requests_without_a_session_are_not_waited_for(model):
    assert serve(EmbeddedEngine(model), [make_request("a", [5, 6], seed=0)])[0][0].token_ids


def start(engine, name="a", **params):
    params = {"max_new_tokens": 240, "ignore_eos": True, "seed": 0} | params
    return asyncio.create_task(engine.generate(make_request(name, [5, 6], **params)))


async def tokens_written(engine, count):
    for _ in range(2000):
        if engine.core.tokens_sampled >= count:
            return
        await asyncio.sleep(0.001)
    raise AssertionError("the engine does not step")


def test_abort_in_the_middle_returns_the_partial_answer(model):
    engine = EmbeddedEngine(model, deterministic=False)

    async def main():
        for names in (["a"], None):
            before = engine.core.tokens_sampled
            one, two = start(engine, "a"), start(engine, "b")
            await tokens_written(engine, before + 8)
            await engine.abort(names)
            (answer,) = await one
            assert answer.stop_reason == "abort" and 0 < len(answer.token_ids) < 240
            assert gap(model, [5, 6], answer) < 1e-4
            (other,) = await two
            assert other.stop_reason == ("length" if names else "abort")

    asyncio.run(main())


def test_a_cancelled_call_aborts_its_request(model):
    engine = EmbeddedEngine(model, deterministic=False)

    async def main():
        task = start(engine)
        await tokens_written(engine, 4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.commit_weights(1)  # refused while anything is in flight
        assert engine.core.in_flight == 0
        (answer,) = await start(engine, max_new_tokens=3)
        assert len(answer.token_ids) == 3 and answer.weight_version == 1

    asyncio.run(main())


def test_a_failing_forward_fails_who_waits_and_the_engine_goes_on(model):
    engine = EmbeddedEngine(model, deterministic=False)

    def explode(*_):
        raise RuntimeError("out of memory, say")

    async def main():
        hook = model.register_forward_pre_hook(explode)
        try:
            results = await asyncio.gather(start(engine, "a"), start(engine, "b"), return_exceptions=True)
        finally:
            hook.remove()
        assert [type(r) for r in results] == [EngineError, EngineError]
        assert all("RuntimeError: out of memory, say" in str(r) for r in results)
        assert isinstance(results[0].__cause__, RuntimeError)
        (answer,) = await start(engine, "a", max_new_tokens=9)
        assert gap(model, [5, 6], answer) < 1e-4

    asyncio.run(main())


def test_a_bad_request_fails_alone(model):
    engine = EmbeddedEngine(model, deterministic=False)

    async def main():
        bad = engine.generate(make_request("bad", [5] * 500))
        worse = engine.generate(make_request("worse", ["no id"]))
        good, *failed = await asyncio.gather(start(engine), bad, worse, return_exceptions=True)
        assert len(good[0].token_ids) == 240
        assert [type(f) for f in failed] == [EngineError, EngineError]

    asyncio.run(main())


def test_an_id_can_be_in_flight_once(model):
    engine = EmbeddedEngine(model, deterministic=False)

    async def main():
        first, second = start(engine), start(engine)
        with pytest.raises(EngineError, match="already in flight"):
            await second
        assert len((await first)[0].token_ids) == 240
        await start(engine, max_new_tokens=2)

    asyncio.run(main())


def test_weights_are_not_committed_while_requests_run(model):
    engine = EmbeddedEngine(model, deterministic=False)

    async def main():
        task = start(engine)
        await tokens_written(engine, 2)
        with pytest.raises(EngineError, match="cannot be committed"):
            await engine.commit_weights(5)
        assert (await task)[0].weight_version == 0
        await engine.commit_weights(5)
        assert (await start(engine, max_new_tokens=2))[0].weight_version == 5

    asyncio.run(main())


def test_a_shared_executor_is_given_back_between_bursts_and_at_the_end(model):
    with ThreadPoolExecutor(1) as executor:
        engine = EmbeddedEngine(model, executor=executor, deterministic=False)

        async def main():
            task = start(engine)
            await tokens_written(engine, 2)
            await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(executor, lambda: None), 5)
            await task
            await engine.close()
            with pytest.raises(EngineError, match="closed"):
                await start(engine)

        asyncio.run(main())
        assert executor.submit(lambda: 5).result(5) == 5  # not ours to shut down


def test_an_executor_that_is_gone_is_an_error_not_a_hang(model):
    executor = ThreadPoolExecutor(1)
    engine = EmbeddedEngine(model, executor=executor, deterministic=False)
    executor.shutdown()
    with pytest.raises(EngineError, match="cannot schedule"):
        serve(engine, [make_request("a", [5])])
    asyncio.run(engine.close())


def test_one_engine_serves_several_event_loops_in_turn(model):
    engine = EmbeddedEngine(model, deterministic=False)
    request = make_request("a", [5, 6], seed=1)
    first, second = serve(engine, [request]), serve(engine, [request])
    assert first[0][0].token_ids == second[0][0].token_ids
    asyncio.run(engine.close())
    asyncio.run(engine.close())


def test_capabilities_name_every_sampling_parameter():
    assert {"top_p", "min_p", "logit_bias", "stop", "seed", "n"} <= EmbeddedEngine.capabilities.sampling
    assert EmbeddedEngine.capabilities.shares_parameters
