"""How long a weight sync takes on GPUs, phase by phase, beside a plain device copy of the same bytes.

    python benchmarks/weight_sync_gpu.py --sizes 0.6B 4B --out sync.json
    python benchmarks/weight_sync_gpu.py --layouts apart remote tp2 pair --sizes 0.6B --out two_gpus.json

Stock SGLang servers, the policy's worker, and the transaction of a real run. Each setting is repeated, the median is
told, and the ratio to the copy. Layouts:

same    the server is on the policy's GPU: CUDA IPC, of the learner's own memory, and of packed buckets
apart   the server is on the next GPU: NCCL; beside it the bandwidth of a plain NCCL broadcast
remote  the same server, started by somebody else and attached by URL
tp2     two workers (FSDP2) and one server of two ranks share two GPUs
lora    as same; an adapter of rank 16 is sent, and the base model once
pair    two workers and two servers share two GPUs; one server is killed and comes back
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
import traceback
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import gpu_models

DEVICE = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
SERVER = {"disable_prefill_cuda_graph": True, "cuda_graph_max_bs": 4}
GPUS = "trainer.placement.policy_num_gpus_per_node"
LAYOUTS = {
    "same": ("trainer.placement.colocate_all=true",),
    "apart": ("trainer.placement.colocate_all=false",),
    "remote": ("trainer.placement.colocate_all=false", "generator.run_engines_locally=false"),
    "tp2": ("trainer.placement.colocate_all=true", f"{GPUS}=2", "generator.inference_engine_tensor_parallel_size=2"),
    "lora": ("trainer.placement.colocate_all=true", "trainer.policy.model.lora.rank=16", "generator.enable_lora=true"),
    "pair": ("trainer.placement.colocate_all=true", f"{GPUS}=2", "generator.num_inference_engines=2"),
}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["0.6B", "4B"], choices=list(gpu_models.SHAPES))
    parser.add_argument("--layouts", nargs="+", default=["same"], choices=list(LAYOUTS))
    parser.add_argument("--proofs", nargs="+", default=["off", "digest", "probe", "both"])
    parser.add_argument("--engine-python", help="the environment of the servers, if not this one")
    parser.add_argument("--buckets-gb", nargs="+", type=float, default=[1.0])
    parser.add_argument("--packed", action="store_true", help="never the learner's own memory")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cycles", type=int, default=0, help="sleep, sync, wake cycles whose memory is watched")
    parser.add_argument("--utilization", type=float, default=0.4)
    parser.add_argument("--deadline", type=float, default=280.0, help="seconds for each layout and size")
    parser.add_argument("--work", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for layout, size in ((layout, size) for layout in options.layouts for size in options.sizes):
        try:
            results.append(await asyncio.wait_for(measure(layout, size, options), options.deadline))
        except Exception as error:  # the others are measured all the same
            results.append({"layout": layout, "size": size, "error": f"{type(error).__name__}: {error}"[:3000]})
            print(layout, size, traceback.format_exc()[-3000:], flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


async def measure(layout: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    from skyrl_train.runtime.site import open_site
    from skyrl_train.sampling import start_sampling

    folder = gpu_models.make(size, options.work / f"model-{size}", device=DEVICE)
    count = folder_bytes(folder)
    begun = time.monotonic()
    result: dict[str, Any] = {"layout": layout, "size": size, "device": device_name(), "bytes": count}
    result["copy_ms"] = round(copy_ms(count), 2)
    async with AsyncExitStack() as stack:
        run = options.work / f"run-{layout}-{size}"
        prompts = [list(range(100, 140)), list(range(200, 230))]
        urls = [await stranger(stack, folder, run, options)] if layout == "remote" else []
        config = config_of(layout, folder, urls, options)
        started: Any = await start_sampling(config, await open_site(config), 10, run, prompts, stack)
        result["start_s"] = round(time.monotonic() - begun, 1)
        recovery, sync = started.weight_sync, started.weight_sync.inner
        version, residents = 0, sync.residents
        if residents:  # the transaction alone; ``cycles`` has the moves of the learner's memory too
            await residents.policy_only()
            sync.residents = None
        for proof, gb in ways(layout, options):
            change(sync, proof=proof, own_memory=gb is None, bucket_bytes=int((gb or 1) * 2**30), sleep=False)
            runs = []
            for _ in range(options.repeats + 2):
                version += 1
                await asyncio.sleep(0.02)  # the last probe has settled, as it has after a step
                runs.append(await sync.sync(version))
            name = f"proof={proof} {'own memory' if gb is None else f'bucket={gb:g}GB'}"
            result[name] = phases(runs[2:], result["copy_ms"])
            print(layout, size, name, json.dumps(result[name]), flush=True)
        result["links"] = sorted(link.name for link in sync.shipment._links.values())
        if options.cycles and layout == "same":
            change(sync, proof="both", sleep=True)
            sync.residents = residents
            result["cycles"] = await cycles(sync, version, options.cycles)
            print(size, "cycles", json.dumps(result["cycles"]), flush=True)
        if layout == "pair":
            change(sync, proof="both", sleep=False)
            result["killed"] = await kill_one(recovery, version)
            print(size, "killed", json.dumps(result["killed"]), flush=True)
    return result


def ways(layout: str, options: argparse.Namespace) -> list[tuple[str, float | None]]:
    """Proofs, each with the size of packed buckets; None: the engine reads the learner's own memory."""
    own = [(proof, None) for proof in options.proofs] if layout == "same" and not options.packed else []
    packed = [("off", gb) for gb in options.buckets_gb] if "off" in options.proofs else []
    return own + packed + ([] if own else [(p, options.buckets_gb[0]) for p in options.proofs if p != "off"])


def config_of(layout: str, folder: Path, urls: list[str], options: argparse.Namespace) -> Any:
    from skyrl_train.config.door import load_config

    server = SERVER if DEVICE == "cuda" else {"max_total_tokens": 4096}
    return load_config([
        f"trainer.policy.model.path={folder}", "generator.backend=sglang", "generator.max_num_seqs=256",
        f"generator.gpu_memory_utilization={options.utilization}", "generator.engine_health_interval=0",
        "trainer.placement.runtime=local", f"generator.engine_python={options.engine_python or 'null'}",
        f"generator.remote_inference_engine_urls=[{','.join(urls)}]", *LAYOUTS[layout],
        *(f"+generator.engine_init_kwargs.{name}={value}" for name, value in server.items()),
    ])  # fmt: skip


async def stranger(stack: AsyncExitStack, folder: Path, run: Path, options: argparse.Namespace) -> str:
    """A server that nothing of a run started, on the next GPU; its URL."""
    from skyrl_train.engines.sglang.launch import SGLangServer
    from skyrl_train.engines.sglang.options import cpu_arguments, cpu_variables

    on_gpu = DEVICE == "cuda"
    own = SERVER | {"base_gpu_id": 1, "mem_fraction_static": options.utilization, "dtype": "bfloat16"}
    arguments: dict[str, Any] = own if on_gpu else cpu_arguments() | {"dtype": "float32"}
    arguments |= {"model_path": str(folder), "skip_server_warmup": True}
    server = SGLangServer(
        arguments, log=run / "stranger.log", python=options.engine_python, env={} if on_gpu else cpu_variables()
    )
    stack.push_async_callback(server.close)
    await server.ready()
    os.environ["SGLANG_ADMIN_KEY"] = server.key
    return server.url


async def kill_one(recovery: Any, version: int) -> dict[str, Any]:
    """A server is killed between two syncs: who serves then, and when are both back."""
    name, source = next(iter(recovery.sources.items()))
    source._server.process._process.kill()
    begun = time.monotonic()
    await recovery.sync(version + 1)
    served = recovery.pool.version, sorted(recovery.pool.engines())
    first = time.monotonic() - begun
    while len(recovery.pool.engines()) < len(recovery.sources):
        await asyncio.sleep(0.5)
    back = time.monotonic() - begun
    await recovery.sync(version + 2)
    return {
        "killed": name, "served_meanwhile": served, "sync_on_the_others_s": round(first, 2), "back_s": round(back, 1),
        "version": recovery.pool.version, "serving": sorted(recovery.pool.engines()),
    }  # fmt: skip


def change(sync: Any, **values: Any) -> None:
    from dataclasses import replace

    sync.settings = replace(sync.settings, **values)
    sync.shipment.settings = sync.settings


def phases(runs: list[dict[str, float]], copy: float) -> dict[str, float]:
    """The median of every phase, in ms."""
    names = [name for name in runs[0] if name.endswith("_s")]
    found = {
        name.removeprefix("weight_sync/").removesuffix("_s") + "_ms": round(
            1e3 * statistics.median(run.get(name, 0.0) for run in runs), 2
        )
        for name in names
    }
    best = round(1e3 * min(run["weight_sync/total_s"] for run in runs), 2)
    return found | {"best_total_ms": best, "total_per_copy": round(found["total_ms"] / copy, 2)}


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def copy_ms(count: int) -> float:
    """A copy of so many bytes on one device: the best of ten."""
    import torch

    source = torch.empty(count, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        wait()
        begun = time.perf_counter()
        target.copy_(source)
        wait()
        times.append(1e3 * (time.perf_counter() - begun))
    del source, target
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return min(times[2:])


def wait() -> None:
    import torch

    if DEVICE == "cuda":
        torch.cuda.synchronize()


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


async def cycles(sync: Any, version: int, count: int) -> dict[str, Any]:
    """Memory of the GPU, and of this process and all that it started, over cycles of sleep, sync and wake."""
    import torch

    memory = torch.cuda.mem_get_info if DEVICE == "cuda" else lambda: (0, 0)

    used, held, times, asleep_mib = [], [], [], 0.0
    for turn in range(count):
        begun = time.monotonic()
        await sync.enter_training()
        asleep = time.monotonic()
        free, total = memory()
        await sync.sync(version + 1 + turn)
        times.append((asleep - begun, time.monotonic() - asleep))
        used.append((total - memory()[0]) / 2**20)
        held.append(rss_mib())
        if turn == 0:
            asleep_mib = (total - free) / 2**20
    return {
        "count": count,
        "gpu_mib_first": round(used[1]),
        "gpu_mib_last": round(used[-1]),
        "gpu_mib_asleep": round(asleep_mib),
        "host_mib_first": round(held[1]),
        "host_mib_last": round(held[-1]),
        "sleep_ms": round(1e3 * statistics.median(t[0] for t in times), 1),
        "wake_and_sync_ms": round(1e3 * statistics.median(t[1] for t in times), 1),
    }


def rss_mib() -> float:
    """Resident memory of this process and all it started."""
    pages = 0
    mine = {str(pid) for pid in _family()}
    for pid in mine:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return pages * 4096 / 2**20


def _family() -> set[int]:
    import os

    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    family, added = {os.getpid()}, True
    while added:
        added = False
        for pid, parent in parents.items():
            if parent in family and pid not in family:
                family.add(pid)
                added = True
    return family


if __name__ == "__main__":
    asyncio.run(main())
