from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_train.envs.killable import CallKilledError, KillablePool
from skyrl_train.errors import EnvError, EnvTimeoutError

ACT = f"{__package__}.functions:act"


@pytest.fixture(scope="module")
def shared() -> Iterator[KillablePool]:
    pool = KillablePool(ACT, size=1)
    yield pool
    pool.close()


def test_a_call_returns_plain_data(shared: KillablePool) -> None:
    data = {"a": [1, 2.5, None, True, "\ud800 \0 ü"], "b": {}}
    assert shared.call("echo", data, timeout=5) == data
    assert shared.call("print", timeout=5) == "said"


def test_a_helper_is_kept_and_imports_no_torch(shared: KillablePool) -> None:
    assert shared.call("pid", timeout=5) == shared.call("pid", timeout=5) != os.getpid()
    assert shared.call("modules", timeout=5) == []


def test_raising_costs_the_call_and_not_the_helper(shared: KillablePool) -> None:
    before = shared.call("pid", timeout=5)
    with pytest.raises(EnvError, match="ValueError: on purpose"):
        shared.call("raise", timeout=5)
    with pytest.raises(EnvError, match="SystemExit: 3"):
        shared.call("exit", timeout=5)
    with pytest.raises(EnvError, match="cannot be sent: TypeError"):
        shared.call("a set", timeout=5)
    assert shared.call("pid", timeout=5) == before


@pytest.mark.parametrize(("what", "value"), [("sleep", 60), ("hold the lock", None), ("power", None)])
def test_a_call_that_hangs_is_killed_and_the_helper_replaced(shared: KillablePool, what: str, value: object) -> None:
    before = shared.call("pid", timeout=5)
    start = time.monotonic()
    with pytest.raises(CallKilledError, match=r"took over 0\.3 s and was killed"):
        shared.call(what, value, timeout=0.3)
    assert time.monotonic() - start < 5
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert shared.call("pid", timeout=5) != before


def test_a_helper_that_dies_is_replaced(shared: KillablePool) -> None:
    with pytest.raises(EnvError, match="helper died, killed by signal 11"):
        shared.call("die", timeout=5)
    assert shared.call("echo", 1, timeout=5) == 1


def test_memory_is_limited(shared: KillablePool) -> None:
    with pytest.raises(EnvError, match="MemoryError"):
        shared.call("memory", 64 * 2**30, timeout=5)


def test_calls_from_many_threads_share_the_helpers() -> None:
    pool, results = KillablePool(ACT, size=2), []
    threads = [threading.Thread(target=lambda i=i: results.append(pool.call("echo", i, timeout=5))) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    pool.close()
    assert sorted(results) == list(range(40))


def test_closing_ends_a_call_under_way_and_refuses_new_ones() -> None:
    pool, caught = KillablePool(ACT, size=1), []
    pid = pool.call("pid", timeout=5)

    def call() -> None:
        try:
            pool.call("sleep", 60, timeout=60)
        except EnvError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.2)
    pool.close()
    thread.join(10)
    assert not thread.is_alive() and len(caught) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(EnvError, match="closed"):
        pool.call("echo", 1, timeout=5)


@pytest.mark.parametrize("function", ["no.such.module:f", f"{__package__}.functions:nothing"])
def test_a_function_that_is_not_there_is_named(function: str) -> None:
    pool = KillablePool(function, size=1)
    with pytest.raises(EnvError, match="cannot be imported"):
        pool.call(timeout=5)
    pool.close()


def test_waiting_for_a_free_helper_has_a_deadline() -> None:
    pool = KillablePool(ACT, size=1)
    pool.call("echo", 1, timeout=5)
    thread = threading.Thread(target=lambda: pool.call("sleep", 1, timeout=5))
    thread.start()
    time.sleep(0.2)
    with pytest.raises(EnvTimeoutError, match="no helper was free"):
        pool.call("echo", 1, timeout=0.01)
    thread.join(10)
    pool.close()


def test_helpers_end_with_the_run_even_if_it_is_killed(tmp_path: Path) -> None:
    """An idle one, here; for one in a call there is the limit of the next test."""
    script = (
        "import os, signal, sys; from skyrl_train.envs.killable import KillablePool;"
        f"print(KillablePool({ACT!r}, 1).call('pid', timeout=20), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    pid, deadline = int(done.stdout), time.monotonic() + 10
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_running(pid)


def test_the_cpu_limit_is_set_for_each_call() -> None:
    import resource

    from skyrl_train.envs import helper

    before = resource.getrlimit(resource.RLIMIT_CPU)
    try:
        helper._limit_cpu(3600)
        limit = resource.getrlimit(resource.RLIMIT_CPU)[0]
        used = resource.getrusage(resource.RUSAGE_SELF)
        assert 3600 <= limit - used.ru_utime - used.ru_stime <= 3612
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, before)


def _is_running(pid: int) -> bool:
    """Whether the process runs: a dead one that nobody waited for yet (Z) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
