"""Engines that fail while a run trains on the CPU: each fault, many times, and what became of the run.

    python benchmarks/fault_table.py --engine-python PYTHON --times 10

One training run for each fault, with two real SGLang engines. Whenever both serve and prompts are being answered, one
is struck; the next blow waits until it serves again, proven. Looked at: does the run end, has every prompt its answer,
do both engines hold the policy's weights at the end, does the log name the cause.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import SKYRL, WORK, machine, run, write_report
from flaky_proxy import FlakyProxy

WAIT = 240.0
"""Seconds until a struck engine must serve again."""


def children(pid: int) -> list[int]:
    """A process's descendants, itself first."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    family = [pid]
    for one in family:
        family += [child for child, parent in parents.items() if parent == one]
    return family


def scheduler(pid: int) -> int:
    """The process of a server that holds the model."""
    for one in children(pid):
        with suppress(OSError):
            if b"sglang::scheduler" in Path(f"/proc/{one}/cmdline").read_bytes():
                return one
    raise SystemExit(f"server {pid} has no scheduler")


@dataclass
class World:
    """One run and what a fault may strike."""

    trainer: Any
    options: argparse.Namespace
    owned: list[Any] = field(default_factory=list)
    """Servers of attached engines, which the harness runs for their "owner"."""
    proxies: list[FlakyProxy] = field(default_factory=list)

    @property
    def pool(self) -> Any:
        return self.trainer.rounds.generator.rollout.engine

    @property
    def recovery(self) -> Any:
        return self.trainer.doors.weight_sync

    def pid(self, name: str) -> int:
        """Of the launched server ``name``."""
        return self.recovery.sources[name]._server.process._process.pid


Strike = Callable[[World, str], Any]


async def kill(world: World, name: str) -> None:
    os.kill(children(world.pid(name))[1], signal.SIGKILL)


async def kill_scheduler(world: World, name: str) -> None:
    os.kill(scheduler(world.pid(name)), signal.SIGKILL)


async def hang(world: World, name: str) -> None:
    os.kill(scheduler(world.pid(name)), signal.SIGSTOP)


async def out_of_memory(world: World, name: str) -> None:
    pid = scheduler(world.pid(name))
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * 4096
    resource.prlimit(pid, resource.RLIMIT_AS, (used + (1 << 16), used + (1 << 16)))


async def slow_to_start(world: World, name: str) -> None:
    """Killed, and what is started in its place is stopped for a while."""
    before = world.pid(name)
    await kill(world, name)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        await asyncio.sleep(0.2)
        with suppress(AttributeError):
            if world.pid(name) != before and len(family := children(world.pid(name))) > 1:
                os.kill(family[1], signal.SIGSTOP)
                await asyncio.sleep(10)
                os.kill(family[1], signal.SIGCONT)
                return


async def port_taken(world: World, name: str) -> None:
    """Killed, and the port that is chosen for the next start is taken a moment before the server takes it."""
    from skyrl_train.engines.sglang import launch

    real, held = launch.free_port, []

    def taken(host: str = "127.0.0.1") -> int:
        import socket

        port = real(host)
        listener = socket.socket()
        listener.bind((host, port))
        listener.listen()
        held.append(listener)
        launch.free_port = real
        return port

    launch.free_port = taken
    await kill(world, name)
    until = time.monotonic() + 60
    while not held and time.monotonic() < until:
        await asyncio.sleep(0.5)
    asyncio.get_running_loop().call_later(90, lambda: [one.close() for one in held])


def proxied(mode: str) -> Strike:
    async def strike(world: World, name: str) -> None:
        proxy = next(p for p in world.proxies if p.url == name)
        proxy.mode = mode
        end = time.monotonic() + 30
        while name in world.pool.engines() and time.monotonic() < end:  # until a request has met it
            await asyncio.sleep(0.02)
        proxy.mode = "pass"

    return strike


async def restarted_by_its_owner(world: World, name: str) -> None:
    index = next(i for i, proxy in enumerate(world.proxies) if proxy.url == name)
    await world.owned[index].close()
    await world.owned[index].ready()
    world.proxies[index].target = world.owned[index].port


@dataclass(frozen=True)
class Fault:
    strike: Strike
    cause: str
    """What the log must say."""
    attached: bool = False


FAULTS: dict[str, Fault] = {
    "process killed": Fault(kill, r"ended with status (137|-9|265)"),
    "scheduler killed": Fault(kill_scheduler, r"ended with status|connection failed|broke off"),
    "hung (SIGSTOP)": Fault(hang, r"does not compute any more: .*/health.*(no answer within|503)"),
    "out of memory": Fault(out_of_memory, r"[Cc]an.?not allocate memory|can't allocate memory|MemoryError"),
    "port taken": Fault(port_taken, r"somebody took the port"),
    "slow to start": Fault(slow_to_start, r"ended with status (137|-9|265)"),
    "answers 500": Fault(proxied("500"), r"HTTP 500", attached=True),
    "connection dropped": Fault(proxied("drop"), r"broke off|connection failed", attached=True),
    "restarted by its owner": Fault(restarted_by_its_owner, r"weight version -1|onnect", attached=True),
}  # fmt: skip


async def one_run(name: str, fault: Fault, options: argparse.Namespace, times: int) -> dict[str, Any]:
    from skyrl_train import build
    from skyrl_train.tracking.logs import setup_logging

    folder = WORK / "faults" / re.sub(r"\W+", "_", name)
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    setup_logging(folder=folder)
    begun, struck = time.monotonic(), 0
    async with AsyncExitStack() as stack:
        owned, proxies = await owners(folder, options, stack) if fault.attached else ([], [])
        config = configured(options, [proxy.url for proxy in proxies])
        trainer = await build.build_trainer(config, folder, stack)
        world = World(trainer, options, owned, proxies)
        training = asyncio.create_task(trainer.train())
        try:
            for _ in range(times):
                await blow(world, fault, training)
                struck += 1
        finally:
            trainer.prompts.max_steps = trainer.prompts.step + 1
            await training
    return judge(folder, name, fault, struck, time.monotonic() - begun)


async def blow(world: World, fault: Fault, training: asyncio.Task[None]) -> None:
    """Strikes one engine in the middle of generating, and waits until it serves again."""
    await until(lambda: training.done() or len(world.pool.engines()) == 2, "both engines serve")
    await until(lambda: training.done() or any(s.busy > 4 for s in world.pool._seats), "prompts are answered")
    await asyncio.sleep(random.uniform(0.05, 0.6))
    if training.done():
        await training
    name = random.choice(list(world.pool.engines()))
    before = world.recovery.used[name]
    await fault.strike(world, name)
    await until(lambda: training.done() or world.recovery.used[name] > before, f"{name} is noticed")
    await until(lambda: training.done() or name in world.pool.engines(), f"{name} serves again")


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"it did not come to pass within {WAIT:g} s that {what}")
        await asyncio.sleep(0.02)


async def owners(
    folder: Path, options: argparse.Namespace, stack: AsyncExitStack
) -> tuple[list[Any], list[FlakyProxy]]:
    """Two servers that somebody else runs, each behind a proxy."""
    from skyrl_train.engines.server_process import free_port
    from skyrl_train.engines.sglang.launch import SGLangServer
    from skyrl_train.engines.sglang.options import cpu_arguments, cpu_variables

    os.environ["SGLANG_ADMIN_KEY"] = "benchmark"
    arguments = cpu_arguments() | {
        "model_path": str(options.model), "dtype": "float32", "skip_server_warmup": True, "max_running_requests": 128,
        "incremental_streaming_output": True, "admin_api_key": "benchmark",
    }  # fmt: skip
    servers = [
        SGLangServer(arguments | {"port": free_port()}, log=folder / "logs" / f"owned-{i}.log",
                     python=options.engine_python, env=cpu_variables())
        for i in range(2)
    ]  # fmt: skip
    for server in servers:
        stack.push_async_callback(server.close)
    await asyncio.gather(*(server.ready() for server in servers))
    proxies = [await FlakyProxy.start(server.port) for server in servers]
    for proxy in proxies:
        stack.push_async_callback(proxy.close)
    return servers, proxies


def configured(options: argparse.Namespace, urls: list[str]) -> Any:
    from skyrl_train.config.door import load_config

    engines = [
        "generator.num_inference_engines=2", f"generator.engine_python={options.engine_python}",
    ] if not urls else [
        "generator.run_engines_locally=false", f"generator.remote_inference_engine_urls=[{','.join(urls)}]",
    ]  # fmt: skip
    return load_config(
        [
            "+experiment=quickstart", f"trainer.policy.model.path={options.model}", f"data.train_data=[{options.data}]",
            "data.val_data=[]", "trainer.eval_interval=-1", "trainer.eval_before_train=false",
            "trainer.max_steps=100000", "trainer.epochs=100000", "trainer.ckpt_interval=-1",
            "trainer.hf_save_interval=-1", "trainer.num_threads=1",
            "generator.backend=sglang", "generator.engine_restarts=1000", "generator.engine_health_interval=2",
            "generator.engine_health_timeout=8", "generator.engine_start_timeout=240", "generator.max_num_seqs=128",
            "trainer.train_batch_size=16", "trainer.policy_mini_batch_size=8", "trainer.logger=jsonl", *engines,
        ]
    )  # fmt: skip


def judge(folder: Path, name: str, fault: Fault, struck: int, seconds: float) -> dict[str, Any]:
    import json

    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    log = (folder / "logs" / "trainer.log").read_text()
    return {
        "fault": name,
        "struck": struck,
        "steps": len(history),
        "prompts": int(sum(line["prompts/started"] for line in history)),
        "prompts_lost": int(sum(line["prompts/lost"] for line in history)),
        "trajectories": int(sum(line["trajectories/started"] for line in history)),
        "trajectories_failed": int(sum(line["trajectories/failed"] for line in history)),
        "causes_named": len(re.findall(fault.cause, log)),
        "proven_engines_at_the_end": int(history[-1]["weight_sync/engines"]),
        "log_prob_gap_max": max(line.get("mismatch/mean", 0.0) for line in history),
        "seconds": round(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", required=True, help="Python of an environment that has SGLang")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    options = parser.parse_args()
    options.data, options.model = WORK / "faults-data" / "train.parquet", WORK / "faults-model"
    if not options.data.exists():
        run([*SKYRL, "data", "addition", "--out", str(options.data.parent)], threads=1, timeout=300)
        run([*SKYRL, "warmup", "--data", str(options.data.parent), "--out", str(options.model)], threads=1, timeout=600)
    random.seed(0)
    rows = []
    for name in options.faults:
        try:
            rows.append(asyncio.run(one_run(name, FAULTS[name], options, options.times)))
        except Exception as error:  # the row says so, and the other faults are tried all the same
            rows.append({"fault": name, "error": f"{type(error).__name__}: {error}"})
        logging.getLogger().info("%s", rows[-1])
        print(rows[-1], flush=True)
        print(write_report("fault_table", {"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
