"""Whole runs on stock SGLang: servers started by us and attached, learning as with the embedded engine, faults."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from skyrl_train import build
from skyrl_train.config.door import load_config
from skyrl_train.engines.sglang.launch import SGLangServer
from skyrl_train.engines.sglang.options import cpu_arguments, cpu_variables

from .conftest import Run, World

SGLANG = ("generator.backend=sglang", "generator.max_num_seqs=64", "generator.engine_start_timeout=240")


def test_a_run_on_a_launched_engine(world: World, sglang_python: str, tmp_path: Path) -> None:
    """Sampling from a changed distribution: the engine's log-probs are the learner's, and ratios start at 1."""
    changed = (f"generator.sampling_params.{text}" for text in ("top_p=0.95", "top_k=12", "logit_bias={20:1.0}"))
    run = world.train(
        tmp_path, *SGLANG, f"generator.engine_python={sglang_python}", "trainer.eval_interval=3",
        "generator.max_turns=1", "trainer.algorithm.use_kl_loss=true", *changed,
    )  # fmt: skip
    assert run.steps == [1, 2, 3]
    for line in run.history:
        assert line["mismatch/mean"] < 1e-4 and line["policy/ratio_gap_first"] < 1e-4
        assert (line["prompts/lost"], line["trajectories/failed"]) == (0, 0)
        assert (line["weight_sync/engines"], line["weight_sync/version"]) == (1, line["step"])
        assert {"weight_sync/prove_s", "weight_sync/probe_s", "time/weight_sync"} <= line.keys()
    assert "eval/all/avg_score" in run.last
    assert {turn["weight_version"] for t in run.trajectories(3) for turn in t["turns"]} == {2}
    log = (run.folder / "logs" / "engine-0.log").read_text()
    assert "launch_server" in log or "server_args" in log


def test_a_run_on_attached_engines_of_which_one_is_killed(world: World, sglang_python: str, tmp_path: Path) -> None:
    """Adapters, two servers that somebody else runs; one dies for good, and the run goes on with the other."""
    arguments = cpu_arguments() | {
        "model_path": str(world.model), "dtype": "float32", "skip_server_warmup": True, "max_running_requests": 64,
        "incremental_streaming_output": True, "admin_api_key": "theirs",
        "enable_lora": True, "max_lora_rank": 4, "lora_target_modules": ["all"],
    }  # fmt: skip
    servers = [
        SGLangServer(arguments, log=tmp_path / f"theirs-{i}.log", python=sglang_python, env=cpu_variables(),
                     start_timeout=240)
        for i in range(2)
    ]  # fmt: skip

    async def main() -> None:
        async with AsyncExitStack() as stack:
            for server in servers:
                stack.push_async_callback(server.close)
            await asyncio.gather(*(server.ready() for server in servers))
            urls = ",".join(server.url.removeprefix("http://") for server in servers)
            config = load_config(
                world.overrides(
                    tmp_path, *SGLANG, "generator.run_engines_locally=false", "trainer.max_steps=6",
                    f"generator.remote_inference_engine_urls=[{urls}]", "generator.engine_start_timeout=2",
                    "generator.engine_restarts=1", "trainer.policy.model.lora.rank=4", "generator.enable_lora=true",
                    f"trainer.policy.model.lora.lora_sync_path={tmp_path}/adapter", "trainer.dump_trajectories=true",
                )
            )  # fmt: skip
            trainer = await build.build_trainer(config, tmp_path / "run", stack)
            training = asyncio.create_task(trainer.train())
            while trainer.prompts.step < 3 and not training.done():
                await asyncio.sleep(0.01)
            assert servers[0].process is not None and servers[0].process._process is not None
            os.kill(servers[0].process._process.pid, signal.SIGKILL)
            await training

    previous = os.environ.get("SGLANG_ADMIN_KEY")
    os.environ["SGLANG_ADMIN_KEY"] = "theirs"
    try:
        asyncio.run(main())
    finally:
        os.environ.pop("SGLANG_ADMIN_KEY") if previous is None else os.environ.update(SGLANG_ADMIN_KEY=previous)
    run = Run(tmp_path / "run")
    assert run.steps == [1, 2, 3, 4, 5, 6]
    assert sum(line["prompts/lost"] + line["trajectories/failed"] for line in run.history) == 0
    assert [line["weight_sync/engines"] for line in run.history][::5] == [2, 1]
    assert max(line["mismatch/mean"] for line in run.history) < 1e-4


def test_several_steps_for_one_sync(world: World, sglang_python: str, tmp_path: Path) -> None:
    run = world.train(
        tmp_path, *SGLANG, f"generator.engine_python={sglang_python}", "trainer.weight_sync_interval=2",
        "trainer.max_steps=5", "generator.sampling_params.stop_regex='[xyz]'",
    )  # fmt: skip
    assert [line["weight_sync/version"] for line in run.history] == [0, 2, 2, 4, 4]
    assert ["weight_sync/prove_s" in line for line in run.history] == [False, True, False, True, False]
    versions = [{turn["weight_version"] for t in run.trajectories(s) for turn in t["turns"]} for s in run.steps]
    assert versions == [{0}, {0}, {2}, {2}, {4}]
    fresh, stale = ([line["mismatch/mean"] for line in run.history[first::2]] for first in (0, 1))
    assert max(fresh) < 1e-4 and min(stale) > 3 * max(fresh), (fresh, stale)  # the engine samples from the step before


def test_an_engine_that_cannot_start_is_one_error(world: World, tmp_path: Path, sglang_python: str) -> None:
    from skyrl_train.errors import EngineError

    with pytest.raises(EngineError) as caught:
        world.train(tmp_path, *SGLANG, f"generator.engine_python={sglang_python}",
                    "+generator.engine_init_kwargs.no_such_flag=1")  # fmt: skip
    message: Any = str(caught.value)
    assert re.search(r"unrecognized arguments: --no-such-flag 1 -- This SGLang has no such option", message)
