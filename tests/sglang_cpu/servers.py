"""Real SGLang for tests: its environments, one model, and one server of each tested version for the whole session."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.contract import Rig, make_rig

from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.engines.sglang.launch import SGLangServer
from skyrl_train.engines.sglang.options import cpu_arguments, cpu_variables, inside_variables
from skyrl_train.engines.sglang.payloads import LOADER, Spec, bucket_payloads, pack, plan_buckets

INSTALL = Path(__file__).with_name("install.sh")
VERSIONS = ("0.5.17", "0.5.21")
SMALL = {
    "dtype": "float32",
    "max_total_tokens": 8192,
    "max_running_requests": 16,
    "skip_server_warmup": True,
    "incremental_streaming_output": True,
    "random_seed": 1,
    "custom_weight_loader": [LOADER],
}
LORA = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["all"]}


@cache
def python_of(version: str) -> str:
    """Python of an environment that has SGLang of that version; made where it is absent, which takes minutes."""
    if version == VERSIONS[0] and (given := os.environ.get("SKYRL_SGLANG_PYTHON")):
        return given
    if os.environ.get("SKYRL_SGLANG_TESTS") != "1":
        pytest.skip("SGLang on the CPU is tested with SKYRL_SGLANG_TESTS=1 (makes an environment of 2.4 GB once)")
    if sys.version_info[:2] != (3, 11):
        pytest.skip("SGLang on the CPU needs Python 3.11")
    made = subprocess.run([INSTALL, version], stdout=subprocess.PIPE, text=True, check=False)
    assert made.returncode == 0, "tests/sglang_cpu/install.sh failed"
    return made.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def sglang_python() -> str:
    return python_of(VERSIONS[0])


@pytest.fixture(scope="session")
def sglang_model(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """The model that the shared servers serve."""
    return make_rig(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def sglang_servers(sglang_model: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """The server of each version, started when it is first asked for, with LoRA on."""
    running: dict[str, SGLangServer] = {}

    def server(version: str) -> SGLangServer:
        if version not in running:
            arguments = cpu_arguments() | SMALL | LORA | {"model_path": str(sglang_model.folder)}
            log = tmp_path_factory.mktemp("logs") / "engine-0.log"
            started = SGLangServer(
                arguments,
                log=log,
                python=python_of(version),
                env=cpu_variables() | inside_variables(),
                start_timeout=240,
            )
            asyncio.run(started.ready())
            running[version] = started
        return running[version]

    yield server
    for started in running.values():
        asyncio.run(started.close())


@pytest.fixture(scope="session")
def sglang_server(sglang_servers: Callable[[str], SGLangServer]) -> SGLangServer:
    """The server of the version that is tested in full."""
    return sglang_servers(VERSIONS[0])


async def begun(engine: SGLangEngine) -> None:
    """Returns when tokens of a request that is under way have come; how long that takes is the machine's affair."""
    async with asyncio.timeout(60):
        while not any(flight.answer.token_ids for flights in engine._flights.values() for flight in flights):
            await asyncio.sleep(0.01)


async def push(engine: SGLangEngine, model: torch.nn.Module, version: int, limit: int = 1 << 16) -> None:
    """Gives a server the weights of ``model``."""
    await engine.begin_update()
    held = model.state_dict()
    specs = [Spec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in held.items()]
    for bucket in plan_buckets(specs, limit):
        flat, _ = pack(bucket, [held[spec.name] for spec in bucket], "cpu")
        payloads, alive = bucket_payloads(bucket, flat, engine.facts.tensor_parallel)
        await engine.update_from_tensors(payloads)
        del alive
    await engine.end_update()
    await engine.commit_weights(version)
