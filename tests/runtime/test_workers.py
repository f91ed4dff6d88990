"""One contract, kept by the workers of both runtimes."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.errors import ConfigError, DivergedError, EnvTimeoutError, MissingPackageError, WorkerError
from skyrl_train.runtime.base import Workers
from skyrl_train.runtime.local import LocalWorkers


def counter_class() -> type:
    """Made in a function, so that it travels to an actor as a whole."""

    class Counter:
        """Counts, fails, waits."""

        def __init__(self, start: int, executor: Any = None) -> None:
            if start < 0:
                raise ConfigError("start", start, "is negative.", "Give 0.")
            self.value, self.executor, self.made_on = start, executor, threading.get_ident()
            self.opened: asyncio.Event | None = None

        def add(self, n: int) -> int:
            before = self.value
            time.sleep(0.005)  # another thread would read the same value here
            self.value = before + n
            return self.value

        async def add_later(self, n: int) -> int:
            await asyncio.sleep(0.001)
            return await asyncio.get_running_loop().run_in_executor(self.executor, self.add, n)

        def threads(self) -> tuple[int, int]:
            return self.made_on, threading.get_ident()

        async def pass_gate(self) -> str:
            self.opened = self.opened or asyncio.Event()
            await self.opened.wait()
            return "passed"

        async def open_gate(self) -> None:
            self.opened = self.opened or asyncio.Event()
            self.opened.set()

        def fail(self, error: Exception) -> None:
            raise error

        async def fail_later(self, error: Exception) -> None:
            raise error

        def die(self) -> None:
            print("I am about to die", file=sys.stderr, flush=True)
            os._exit(1)

        def hang(self) -> None:
            time.sleep(60)

        def noted(self, path: str) -> None:
            self.path = path

        def close(self) -> None:
            if hasattr(self, "path"):
                Path(self.path).write_text(f"closed at {self.value}")

    return Counter


Start = Callable[..., Awaitable[Workers]]


async def start_local(*args: Any, factory: Any = None) -> Workers:
    return await LocalWorkers.start(factory or counter_class(), *args)


async def start_ray(*args: Any, factory: Any = None, count: int = 1, **options: Any) -> Any:
    from skyrl_train.runtime.ray_cluster import Held
    from skyrl_train.runtime.ray_workers import RaySeat, RayWorkers

    if not _held:
        _held.append(await Held.of([{"CPU": 1.0}]))
    seats = [RaySeat()] * count
    return await RayWorkers.start(
        factory or counter_class(), *args, role="counter", held=_held[0], seats=seats, **options
    )


_held: list[Any] = []
"""One CPU of the cluster, for all tests."""


@pytest.fixture(params=["local", "ray"])
def start(request: pytest.FixtureRequest) -> Start:
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
        return start_ray
    return start_local


def play(start: Start, script: Callable[[Workers], Awaitable[Any]], *args: Any) -> Any:
    """Runs ``script`` on fresh workers and ends them."""

    async def run() -> Any:
        workers = await start(*(args or (10,)))
        try:
            return await script(workers)
        finally:
            await workers.close()

    return asyncio.run(run())


def test_the_three_verbs_and_the_state_between_calls(start: Start) -> None:
    async def script(workers: Workers) -> list[Any]:
        assert workers.size == 1
        return [
            await workers.all("add", 1), await workers.each("add", [(5,)]), await workers.one(0, "add", 2),
            await workers.one(0, "add_later", 100),
        ]  # fmt: skip

    assert play(start, script) == [[11], [16], 18, 118]


def test_as_many_arguments_as_workers(start: Start) -> None:
    async def script(workers: Workers) -> None:
        for wrong in ([(1,), (2,)], []):
            with pytest.raises(ValueError, match="argument"):
                await workers.each("add", wrong)
        assert await workers.one(0, "add", 1) == 11  # nobody was called

    play(start, script)


def test_computations_run_one_after_the_other_on_the_one_thread_that_made_the_object(start: Start) -> None:
    async def script(workers: Workers) -> None:
        calls = (workers.one(0, name, 1) for name in ("add", "add_later") * 10)
        values = await asyncio.gather(*calls)
        assert sorted(values) == list(range(11, 31))
        made_on, called_on = await workers.one(0, "threads")
        assert made_on == called_on

    play(start, script)


def test_async_methods_wait_without_keeping_others_from_running(start: Start) -> None:
    async def script(workers: Workers) -> str:
        waiting = [asyncio.ensure_future(workers.one(0, "pass_gate")) for _ in range(100)]
        assert await workers.one(0, "add", 1) == 11
        await workers.one(0, "open_gate")
        async with asyncio.timeout(20):
            return {*await asyncio.gather(*waiting)}.pop()

    assert play(start, script) == "passed"


ERRORS = [
    ConfigError("a.b", 3, "is odd.", "Set 4."),
    MissingPackageError("peft", "trainer.lora", "pip install peft"),
    EnvTimeoutError("env hung"),
    DivergedError("3 updates in a row"),
    ZeroDivisionError("division"),
    FileNotFoundError(2, "No such file", "weights"),
]


@pytest.mark.parametrize("method", ["fail", "fail_later"])
def test_what_a_method_raises_passes_through_as_it_is(start: Start, method: str) -> None:
    async def script(workers: Workers) -> None:
        for error in ERRORS:
            with pytest.raises(type(error)) as raised:
                await workers.one(0, method, error)
            assert type(raised.value) is type(error) and str(raised.value) == str(error)
            if isinstance(raised.value, ConfigError):
                got = raised.value
                assert (got.key, got.value, got.reason, got.remedy) == ("a.b", 3, "is odd.", "Set 4.")
        assert await workers.one(0, "add", 1) == 11  # the worker lives on

    play(start, script)


def test_an_unknown_method(start: Start) -> None:
    async def script(workers: Workers) -> None:
        with pytest.raises(AttributeError, match="fly"):
            await workers.all("fly")

    play(start, script)


def test_what_the_factory_raises_passes_through(start: Start) -> None:
    async def run() -> None:
        before = threading.active_count()
        with pytest.raises(ConfigError, match=r"start=-1: is negative\. Give 0\.") as raised:
            await start(-1)
        assert raised.value.value == -1
        if start is start_local:
            await asyncio.sleep(0.05)
            assert threading.active_count() <= before  # no compute thread stays behind

    asyncio.run(run())


def test_closing_ends_the_object(start: Start, tmp_path: Path) -> None:
    async def script(workers: Workers) -> None:
        await workers.one(0, "noted", str(tmp_path / "note"))
        await workers.one(0, "add", 5)

    play(start, script)
    assert (tmp_path / "note").read_text() == "closed at 15"


def test_tensors_come_back_bit_by_bit(start: Start) -> None:
    import torch

    class Model:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            torch.manual_seed(3)
            self.net = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.GELU(), torch.nn.Linear(65, 7))

        def loss(self, batch: Any) -> Any:
            value = self.net(batch).logsumexp(-1).mean()
            value.backward()
            return value.detach(), self.net[0].weight.grad

    async def run() -> Any:
        workers = await start(factory=Model)
        try:
            return await workers.one(0, "loss", torch.linspace(-1, 1, 330).reshape(10, 33))
        finally:
            await workers.close()

    threads = torch.get_num_threads()
    loss, grad = asyncio.run(run())
    torch.set_num_threads(threads)
    first = _first.setdefault("numbers", (loss, grad))
    assert loss.equal(first[0]) and grad.equal(first[1])


_first: dict[str, Any] = {}


class TestRay:
    """What can only happen to processes."""

    @pytest.fixture(autouse=True)
    def cluster(self, ray_cluster: None) -> None:
        """These need it."""

    def test_two_workers_answer_in_rank_order(self) -> None:
        async def run() -> None:
            workers = await start_ray(0, count=2)
            assert workers.size == 2
            assert await workers.each("add", [(1,), (2,)]) == [1, 2]
            assert await workers.one(1, "add", 5) == 7
            assert await workers.all("add", 1) == [2, 8]
            pids = await workers.all("threads")
            assert len(pids) == 2
            await workers.close()

        asyncio.run(run())

    def test_a_worker_that_dies_is_named_with_its_role_and_rank(self) -> None:
        async def run() -> None:
            workers = await start_ray(0, count=2)
            with pytest.raises(WorkerError, match="counter worker, rank 1, died on node ") as raised:
                await workers.one(1, "die")
            assert platform.node() in str(raised.value) and "Its last lines:\n  I am about to die" in str(raised.value)
            with pytest.raises(WorkerError, match="rank 1"):
                await workers.all("add", 1)
            assert await workers.one(0, "add", 1) >= 1
            await workers.close()  # one of them is gone: no error

        asyncio.run(run())

    def test_a_worker_that_was_killed_while_it_computes_ends_the_wait(self) -> None:
        async def run() -> None:
            workers = await start_ray(0)
            call = asyncio.ensure_future(workers.all("hang"))
            await asyncio.sleep(0.3)
            workers._kill()
            async with asyncio.timeout(30):
                with pytest.raises(WorkerError, match="counter worker, rank 0, died"):
                    await call

        asyncio.run(run())

    def test_a_worker_that_hangs_is_ended_within_its_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from skyrl_train.runtime import ray_workers

        monkeypatch.setattr(ray_workers, "CLOSE_TIMEOUT", 0.5)

        async def run() -> float:
            workers = await start_ray(0)
            call = asyncio.ensure_future(workers.all("hang"))
            await asyncio.sleep(0.2)
            begun = time.monotonic()
            await workers.close()
            took = time.monotonic() - begun
            with pytest.raises(WorkerError):
                await call
            return took

        assert asyncio.run(run()) < 5

    def test_what_the_cluster_does_not_give(self) -> None:
        from skyrl_train.runtime.ray_cluster import Held

        async def run() -> None:
            begun = time.monotonic()
            with pytest.raises(WorkerError) as raised:
                await Held.of([{"CPU": 1.0, "GPU": 64.0}, {"CPU": 2.0}], timeout=1.0)
            assert time.monotonic() - begun < 15
            text = str(raised.value)
            assert "within 1 s. Asked, each of another node: (1 CPU, 64 GPU), (2 CPU). There: " in text
            assert f"{platform.node()} (" in text and "8 CPU, 0 GPU; of it free: " in text
            workers = await start_ray(7)  # what was not given does not stand in the way
            assert await workers.one(0, "add", 1) == 8
            await workers.close()

        asyncio.run(run())

    def test_a_process_that_is_slow_to_start_is_no_matter_of_placement(self) -> None:
        async def run() -> None:
            with pytest.raises(WorkerError) as raised:
                await start_ray(0, count=2, timeout=0.0)
            text = str(raised.value)
            assert "counter worker(s) (rank 0 on " in text and "did not start within 0 s" in text
            assert "has given their resources" in text and "Asked" not in text

        asyncio.run(run())

    def test_a_factory_that_takes_the_process_with_it(self) -> None:
        def leave() -> None:
            os._exit(1)

        async def run() -> None:
            with pytest.raises(WorkerError, match="counter worker, rank 0, died"):
                await start_ray(factory=leave)

        asyncio.run(run())
