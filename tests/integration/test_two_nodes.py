"""Runs on two Ray nodes, which are two raylets on this machine: they learn as on one, and one may be killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import start_cluster

from .conftest import Command, Run, Spawn, World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RANKS = ("trainer.placement.policy_num_nodes=2", "trainer.placement.runtime=ray", "trainer.device=cpu")
HERE = ("trainer.placement.policy_num_gpus_per_node=2", "trainer.placement.runtime=local", "trainer.device=cpu")
ENGINES = ("generator.backend=sglang", "generator.num_inference_engines=2", "generator.max_num_seqs=64",
           "generator.engine_start_timeout=300", "generator.engine_health_interval=0")  # fmt: skip

LEARNING = ("trainer.policy.optimizer_config.lr=3e-4", "trainer.train_batch_size=8", "trainer.policy_mini_batch_size=4",
            "generator.n_samples_per_prompt=8", "trainer.max_steps=40", "trainer.epochs=100")  # fmt: skip


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster whose head takes no work, and two nodes that do."""
    cluster = start_cluster(num_cpus=0)
    for _ in range(2):
        cluster.add_node(num_cpus=2, num_gpus=2)  # Ray counts GPUs that it is told of; nothing here uses one
    yield cluster
    cluster.shutdown()


def ended(command: Command, code: int, timeout: float = 600) -> str:
    assert command.wait(timeout) == code, command.err.read_text()
    return command.err.read_text()


def prompts(run: Run, step: int) -> list[tuple[str, int]]:
    return [(t["prompt"], t["sample"]) for t in run.trajectories(step)]


def rewards(run: Run) -> tuple[float, float]:
    """Means of the first and of the last ten steps."""
    values = [line["reward/mean"] for line in run.history]
    return sum(values[:10]) / 10, sum(values[-10:]) / 10


GPUS = """
import asyncio, os
from skyrl_train.config.schema import Config
from skyrl_train.runtime.site import open_site

class Worker:
    def __init__(self, place): self.place = place
    def seen(self): return os.environ["CUDA_VISIBLE_DEVICES"], self.place.device_index, self.place.rank

async def main():
    config = Config()
    placement = config.trainer.placement
    config.trainer.device, placement.policy_num_nodes, placement.policy_num_gpus_per_node = "cuda", 2, 2
    site = await open_site(config)
    workers = await site.workers("policy", Worker)
    print(sorted(await workers.all("seen")))
    await workers.close()
    await site.close()
    again = await open_site(config)  # everything was given back
    await again.close()

asyncio.run(main())
"""


def test_the_workers_of_a_node_see_the_gpus_of_the_plan(nodes: Any) -> None:
    variables = os.environ | {"RAY_ADDRESS": nodes.address}
    done = subprocess.run([sys.executable, "-c", GPUS], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[('0,1', 0, 0), ('0,1', 0, 2), ('0,1', 1, 1), ('0,1', 1, 3)]"


def test_the_embedded_engine_on_two_nodes_gives_the_numbers_of_one(
    nodes: Any, spawn: Spawn, world: World, tmp_path: Path
) -> None:
    here = world.train(tmp_path / "here", *HERE)
    command = spawn(*world.overrides(tmp_path, *RANKS, f"hydra.run.dir={tmp_path}/run"), RAY_ADDRESS=nodes.address)
    ended(command, 0)
    assert Run(tmp_path / "run").steady() == here.steady()


def test_sglang_engines_on_two_nodes_learn_as_on_one(
    nodes: Any, spawn: Spawn, world: World, sglang_python: str, tmp_path: Path
) -> None:
    """Each engine gets its weights from the rank on its own node; the histories are those of one node's run."""
    more = (*ENGINES, f"generator.engine_python={sglang_python}", *LEARNING)
    here = world.train(tmp_path / "here", *more, *HERE)
    arguments = world.overrides(tmp_path, *more, *RANKS, f"hydra.run.dir={tmp_path}/run")
    said = ended(spawn(*arguments, RAY_ADDRESS=nodes.address), 0)
    there = Run(tmp_path / "run")
    assert there.steps == here.steps == [*range(1, 41)]
    plan = next(line for line in said.splitlines() if "placement: policy 0" in line)
    seats = dict(part.split(": ", 1) for part in plan.split("placement: ")[1].split("; "))
    assert seats["policy 0"] == seats["engine 0"] != seats["policy 1"] == seats["engine 1"]
    for step in here.steps:
        assert prompts(there, step) == prompts(here, step)
    for a, b in zip(there.history, here.history, strict=True):
        for name in ("weight_sync/version", "weight_sync/engines", "prompts/lost", "trajectories/failed"):
            assert a[name] == b[name], name
        assert a["weight_sync/engines"] == 2 and a["mismatch/mean"] < 1e-4 and a["policy/ratio_gap_first"] < 1e-4
    (begun, learned), (begun_here, learned_here) = rewards(there), rewards(here)
    assert learned > begun + 0.05 and learned_here > begun_here + 0.05
    assert learned == pytest.approx(learned_here, abs=0.15)  # SGLang samples differently each time


def test_a_node_that_is_killed_is_named_and_the_run_goes_on_from_its_checkpoint(
    nodes: Any, spawn: Spawn, world: World, tmp_path: Path
) -> None:
    more = (*RANKS, "trainer.ckpt_interval=1", "trainer.max_steps=200", "trainer.epochs=1000")
    command = spawn(*world.overrides(tmp_path, *more, f"hydra.run.dir={tmp_path}/a"), RAY_ADDRESS=nodes.address)
    marker = tmp_path / "checkpoints" / "latest_ckpt_global_step.txt"
    until = time.monotonic() + 300
    while not (marker.exists() and int(marker.read_text()) >= 3):
        assert command.process.exitcode is None and time.monotonic() < until, command.err.read_text()
        time.sleep(0.1)
    nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    said = ended(command, 2, timeout=120)
    error = next(line for line in said.splitlines() if line.startswith("error: "))
    assert re.match(r"error: policy worker, rank [01], died on node .* \(.*\): .* Its node does not answer", error), (
        said
    )
    assert "Traceback" not in said
    nodes.add_node(num_cpus=2, num_gpus=2)
    saved = int(marker.read_text())
    again = world.overrides(tmp_path, *more, f"trainer.max_steps={saved + 2}", f"hydra.run.dir={tmp_path}/b")
    ended(spawn(*again, RAY_ADDRESS=nodes.address), 0)
    kept, back = Run(tmp_path / "a"), Run(tmp_path / "b")
    assert back.steps == [saved + 1, saved + 2] and kept.steps[-1] >= saved - 1
    whole = world.overrides(tmp_path / "c", *more, f"trainer.max_steps={saved + 2}", f"hydra.run.dir={tmp_path}/c/run")
    ended(spawn(*whole, RAY_ADDRESS=nodes.address), 0)
    history = {line["step"]: line for line in (*kept.steady(), *back.steady())}
    never = {line["step"]: line for line in Run(tmp_path / "c" / "run").steady()}
    assert all(never[step] == line for step, line in history.items())  # as if no node had ever been killed
