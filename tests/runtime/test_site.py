"""Which runtime a run gets, and how it joins a cluster."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skyrl_train.config.backend import resolve_runtime
from skyrl_train.config.schema import Config
from skyrl_train.errors import ConfigError, MissingPackageError
from skyrl_train.runtime.local import LocalWorkers
from skyrl_train.runtime.site import open_site

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("runtime", "address", "chosen"),
    [
        ("auto", None, "local"), ("auto", "10.0.0.1:6379", "ray"), ("local", "10.0.0.1:6379", "local"),
        ("ray", None, "ray"), ("auto", "", "local"),
    ],
)  # fmt: skip
def test_auto_takes_ray_where_a_cluster_is_named(
    runtime: str, address: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    config = Config()
    config.trainer.placement.runtime = runtime
    assert resolve_runtime(config) == chosen
    config.trainer.placement.policy_num_nodes = 2
    assert resolve_runtime(config) == ("ray" if runtime == "auto" else chosen)


def added(runtime: str) -> tuple[str, int]:
    """40 + 2 by a worker that the runtime starts."""

    class Adder:
        def __init__(self, start: int) -> None:
            self.value = start

        def add(self, n: int) -> int:
            return self.value + n

    config = Config()
    config.trainer.placement.runtime = runtime
    config.trainer.device = "cpu"

    async def run() -> tuple[str, int]:
        site = await open_site(config)
        workers = await site.workers("adder", Adder, 40)
        try:
            return type(workers).__name__, await workers.one(0, "add", 2)
        finally:
            await workers.close()
            await site.close()

    return asyncio.run(run())


def test_the_local_runtime_starts_in_this_process() -> None:
    assert added("local") == (LocalWorkers.__name__, 42)


def test_the_ray_runtime_starts_an_actor(ray_cluster: None) -> None:
    assert added("ray") == ("RayWorkers", 42)


def test_a_cluster_that_cannot_hold_the_plan_says_so_in_seconds(ray_cluster: None) -> None:
    config = Config()
    config.trainer.placement.runtime, config.trainer.device = "ray", "cpu"
    config.trainer.placement.policy_num_nodes = 2
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=r"ask for 2 node\(s\) with 1 CPU each, and 1 node.* There: .*8 CPU, 0 GPU"):
        asyncio.run(open_site(config))
    assert time.monotonic() - begun < 10


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=200
    )


CONNECT = """
import logging, os
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from skyrl_train.errors import SkyRLError
from skyrl_train.runtime.ray_cluster import connect
try:
    connect()
except SkyRLError as error:
    print(type(error).__name__, error)
else:
    import ray
    print("joined", "RAY_RUNTIME_ENV_HOOK" in os.environ)
    ray.shutdown()
"""


def test_rays_uv_hook_is_taken_out_of_the_way() -> None:
    done = python(CONNECT, RAY_RUNTIME_ENV_HOOK="no_such_module.hook")
    assert "joined False" in done.stdout, done.stderr
    assert "RAY_RUNTIME_ENV_HOOK is set; it breaks editable installs" in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "no-such-host.invalid:6379", "[::1]:9"])
def test_an_address_where_nobody_answers_is_one_error_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself, Ray tries for more than three minutes."""
    import ray  # noqa: TID251 - to ask for another cluster than the folder's

    from skyrl_train.runtime.ray_cluster import connect

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the folder's own cluster may be up
    monkeypatch.setenv("RAY_ADDRESS", address)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="no Ray cluster answers there") as raised:
        connect()
    assert time.monotonic() - begun < 10
    assert raised.value.value == address and "ray start --head" in raised.value.remedy


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from skyrl_train.runtime.ray_cluster import connect

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r'runtime=ray needs.*pip install "skyrl-train\[ray\]"'):
        connect()
