"""Starting a server: small Python programs stand in for servers that fail in every way; the real one comes last."""

from __future__ import annotations

import asyncio
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from skyrl_train.engines.sglang.launch import SGLangServer
from skyrl_train.errors import ConfigError, EngineError, EngineTimeoutError

PORT = "port = int(sys.argv[sys.argv.index('--port') + 1])\n"
SERVES = (
    "from http.server import BaseHTTPRequestHandler, HTTPServer\n"
    "class H(BaseHTTPRequestHandler):\n"
    "    def do_GET(self):\n"
    "        self.send_response(200); self.end_headers(); self.wfile.write(b'{}')\n"
    "HTTPServer(('127.0.0.1', port), H).serve_forever()\n"
)


def stand_in(tmp_path: Path, script: str, **options: object) -> SGLangServer:
    """A server whose Python runs ``script`` whatever it is told to run."""
    (tmp_path / "script.py").write_text("import sys, os, time\n" + PORT + script)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/script.py "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    arguments = dict(options.pop("arguments", {}) or {})  # type: ignore[call-overload]
    return SGLangServer(arguments, log=tmp_path / "engine-0.log", python=str(python), **options)  # type: ignore[arg-type]


def test_a_server_that_ends_is_told_at_once_with_its_last_error_and_the_remedy(tmp_path: Path) -> None:
    server = stand_in(tmp_path, "raise ModuleNotFoundError(\"No module named 'sglang'\")")
    started = time.monotonic()
    with pytest.raises(EngineError, match="No module named 'sglang'") as raised:
        asyncio.run(server.ready())
    assert time.monotonic() - started < 10
    assert "ended with status 1" in str(raised.value) and "generator.engine_python" in str(raised.value)
    assert str(server.log) in str(raised.value)


def test_a_server_that_never_serves_is_given_up_and_ended(tmp_path: Path) -> None:
    server = stand_in(tmp_path, "print('still loading', flush=True); time.sleep(60)", start_timeout=1.5)
    with pytest.raises(EngineTimeoutError, match=r"does not serve 1\.5 s after its start.*still loading"):
        asyncio.run(server.ready())
    assert server.process is None


def test_another_port_is_tried_when_somebody_took_it(tmp_path: Path) -> None:
    mark = tmp_path / "tried"
    script = (
        f"with open({str(mark)!r}, 'a') as f: print(port, file=f)\n"
        f"if len(open({str(mark)!r}).readlines()) == 1: raise OSError(98, 'Address already in use')\n" + SERVES
    )
    server = stand_in(tmp_path, script)

    async def main() -> None:
        await server.ready()
        await server.close()

    asyncio.run(main())
    first, second = mark.read_text().split()
    assert first != second and server.url.endswith(second)


def test_a_port_that_was_asked_for_is_not_changed(tmp_path: Path) -> None:
    server = stand_in(tmp_path, "raise OSError(98, 'Address already in use')", arguments={"port": 45678})
    with pytest.raises(EngineError, match=r"45678 ended.*Address already in use.*Another process holds the port"):
        asyncio.run(server.ready())


def test_the_key_is_in_a_file_of_ours_alone_and_the_file_goes(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("max_total_tokens: 5\n")
    script = (
        "path = sys.argv[sys.argv.index('--config') + 1]\n"
        "print('file', path, oct(os.stat(path).st_mode & 0o777), open(path).read().replace(chr(10), '|'), flush=True)\n"
        "print('args', sys.argv[1:], flush=True)\n" + SERVES
    )
    server = stand_in(tmp_path, script, arguments={"config": str(mine), "tp_size": 2})

    async def main() -> None:
        await server.ready()
        await server.close()

    asyncio.run(main())
    line, told = [x for x in server.log.read_text().splitlines() if x.startswith(("file ", "args "))]
    _, path, mode, *content = line.split(" ", 3)
    assert mode == "0o600" and not Path(path).exists()
    assert yaml.safe_load(content[0].replace("|", "\n")) == {
        "api-key": server.key, "admin-api-key": server.key, "max-total-tokens": 5,
    }  # fmt: skip
    assert server.key not in told and "'--tp-size', '2'" in told and "'--host', '127.0.0.1'" in told
    with pytest.raises(ConfigError, match=r"engine_init_kwargs\.config"):
        stand_in(tmp_path, "", arguments={"config": str(tmp_path / "absent.yaml")}).start()


def test_a_wrong_option_is_named(sglang_python: str, tmp_path: Path) -> None:
    server = SGLangServer({"model_path": "x", "never_heard_of": 1}, log=tmp_path / "engine-0.log", python=sglang_python)
    with pytest.raises(EngineError, match=r"unrecognized arguments: --never-heard-of 1.*engine_init_kwargs"):
        asyncio.run(server.ready())


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "changes",
    [
        ["trainer.rope_theta=10"],
        [
            "trainer.rope_scaling={rope_type: linear, factor: 4.0}",
            "+trainer.policy.model_config_kwargs.rms_norm_eps=0.1",
        ],
    ],
)
def test_a_changed_model_is_the_learners_in_the_server_too(sglang_python: str, sglang_model, tmp_path, changes) -> None:
    """SGLang takes a change that it does not read without a word."""
    from sglang_cpu.servers import SMALL

    from engines.contract import ask, one
    from skyrl_train.config.door import load_config
    from skyrl_train.engines.sglang.options import Surroundings, server_arguments, server_variables
    from skyrl_train.learner.policy_worker import PolicyWorker

    config = load_config([
        f"trainer.policy.model.path={sglang_model.folder}", "generator.backend=sglang", "trainer.device=cpu", *changes
    ])  # fmt: skip
    around, prompt = Surroundings(installed=frozenset({"sglang"})), list(range(3, 60))
    server = SGLangServer(
        server_arguments(config, around=around) | SMALL, log=tmp_path / "engine.log", python=sglang_python,
        env=server_variables(config, around=around),
    )  # fmt: skip

    async def sample() -> Any:
        engine = await server.attach()
        try:
            return await one(engine, ask(prompt))
        finally:
            await engine.close()

    answer = asyncio.run(sample())
    learner = PolicyWorker(config, 10)
    assert replace(sglang_model, model=learner.model).gap(prompt, answer) < 1e-4
    assert sglang_model.gap(prompt, answer) > 0.01, "it is another model than the folder's"
