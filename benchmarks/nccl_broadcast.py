"""Bandwidth of a plain broadcast between two GPUs, by torch.distributed alone: what NCCL gives here.

python benchmarks/nccl_broadcast.py --out broadcast.json
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--port", type=int, default=29617)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    processes.spawn(rank_main, (options.mib, options.port, str(options.out)), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    print(options.out.read_text())


def rank_main(rank: int, sizes: list[int], port: int, out: str) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    found = {}
    for mib in sizes:
        data = torch.empty(mib << 20, dtype=torch.uint8, device=device)
        times = []
        for _ in range(6):
            dist.barrier()
            begun = time.perf_counter()
            dist.broadcast(data, 0)
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        best = min(times[1:])
        found[f"{mib} MiB"] = {"ms": round(1e3 * best, 3), "GB_per_s": round((mib << 20) / best / 1e9, 1)}
    if rank == 0:
        Path(out).write_text(json.dumps(found, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
