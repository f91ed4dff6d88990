"""Children that are watched: they end with us however we end, and their last words are kept."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_train.engines.server_process import ServerProcess, free_port
from skyrl_train.errors import EngineError

FAMILY = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
if "deaf" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("pids", os.getpid(), child.pid, flush=True)
time.sleep(60)
"""
"""A server with a child of its own."""


def until(condition: Callable[[], object], seconds: float = 15.0) -> object:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def pids_in(log: Path) -> list[int]:
    def look() -> list[int]:
        lines = [line for line in log.read_text().splitlines() if line.startswith("pids ")] if log.exists() else []
        return [int(word) for word in lines[-1].split()[1:]] if lines else []

    found = until(look)
    assert isinstance(found, list)
    return found


def family(tmp_path: Path, *words: str, **options: object) -> ServerProcess:
    return ServerProcess([sys.executable, "-c", FAMILY, *words], log=tmp_path / "logs" / "engine-0.log", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("word", "grace"), [("", 10.0), ("deaf", 0.3)])
def test_close_ends_the_whole_group(tmp_path: Path, word: str, grace: float) -> None:
    process = family(tmp_path, word, grace=grace)
    process.start()
    pids = pids_in(process.log)
    assert process.returncode is None and all(map(alive, pids))
    started = time.monotonic()
    asyncio.run(process.close())
    assert time.monotonic() - started < 5
    assert process.returncode is not None and not any(map(alive, pids))
    asyncio.run(process.close())


def test_a_stopped_server_can_be_ended(tmp_path: Path) -> None:
    process = family(tmp_path, grace=0.5)
    process.start()
    pids = pids_in(process.log)
    os.kill(pids[0], signal.SIGSTOP)
    asyncio.run(process.close())
    assert not any(map(alive, pids))


DRIVER = """
import signal, sys, time, pathlib
from skyrl_train.engines.server_process import ServerProcess
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would we
ServerProcess([sys.executable, "-c", sys.argv[1]], log=pathlib.Path(sys.argv[2]), grace=1.0).start()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_with_its_driver_however_that_ends(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "engine.log"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, FAMILY, str(log)], stderr=subprocess.DEVNULL)
    pids = pids_in(log)
    driver.send_signal(number)
    driver.wait()
    until(lambda: not any(map(alive, pids)))


def test_a_killed_supervisor_takes_the_server_with_it(tmp_path: Path) -> None:
    process = family(tmp_path)
    process.start()
    server, _ = pids_in(process.log)
    assert process._process is not None
    process._process.kill()
    until(lambda: not alive(server))
    assert until(lambda: process.returncode is not None)


def test_the_exit_status_and_the_last_words(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("of an earlier one\n")
    script = "import sys; print('hello'); print('Error: bad day', file=sys.stderr); sys.exit(3)"
    process = ServerProcess([sys.executable, "-c", script], log=log)
    assert process.log_tail() == "of an earlier one\n"
    process.start()
    until(lambda: process.returncode is not None)
    assert process.returncode == 3
    assert "bad day" in process.log_tail() and "earlier" not in process.log_tail()
    assert log.read_text().startswith("of an earlier one")


def test_a_signal_is_told_as_shells_do(tmp_path: Path) -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    process = ServerProcess([sys.executable, "-c", script], log=tmp_path / "engine.log")
    process.start()
    until(lambda: process.returncode is not None)
    assert process.returncode == 128 + signal.SIGSEGV


def test_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_RUNTIME_ENV_HOOK", "ray._private.runtime_env.uv_runtime_env_hook.hook")
    monkeypatch.setenv("UNWANTED", "1")
    script = "import os; print(os.environ.get('RAY_RUNTIME_ENV_HOOK'), os.environ.get('UNWANTED'), os.environ['NEW'])"
    process = ServerProcess(
        [sys.executable, "-c", script], log=tmp_path / "engine.log", env={"UNWANTED": None, "NEW": "here"}
    )
    process.start()
    until(lambda: process.returncode is not None)
    assert process.log_tail().strip() == "None None here"


def test_what_cannot_be_started(tmp_path: Path) -> None:
    process = ServerProcess([str(tmp_path / "nothing")], log=tmp_path / "engine.log")
    process.start()
    until(lambda: process.returncode is not None)
    assert process.returncode != 0 and "nothing" in process.log_tail()
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="cannot be started"):
        ServerProcess(["true"], log=tmp_path / "file" / "engine.log").start()


def test_a_free_port_is_free() -> None:
    assert 1024 < free_port() < 65536
