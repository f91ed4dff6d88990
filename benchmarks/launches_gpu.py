"""What launching kernels costs on this machine: the learner's half of the probe, and micro-batches of short sequences.

    python benchmarks/launches_gpu.py --sizes 0.6B 4B --out launches.json

``launch_us``    one small kernel: launched, and launched and run
``probe``        milliseconds of the learner's half of a weight probe, kernel by kernel and recorded as CUDA graphs, and
                 the largest difference of their log-probs
``update``       milliseconds of an update of short sequences in micro-batches of 16k tokens; how long the GPU was busy
                 in it, how many kernels it ran, what took the CPU's time, and where the CPU waited for the GPU
"""

from __future__ import annotations

import argparse
import collections
import json
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine
from gpu_models import SHAPES, make
from learner_gpu import COMPILED, config_for
from learner_shapes import make_batch
from learner_worker import MeasuredPolicy

from skyrl_train.config.door import load_config
from skyrl_train.roles import PolicyWithSender
from skyrl_train.runtime.place import Place

ROWS = [[(7 * row + i) % 400 + 50 for i in range(32)] for row in range(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["0.6B"], choices=list(SHAPES), help="of the probe")
    parser.add_argument("--update", default="0.6B", choices=list(SHAPES))
    parser.add_argument("--work", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "gpu": torch.cuda.get_device_name()}
    steps: dict[str, Callable[[], Any]] = {"launch_us": launches}
    steps |= {f"probe {size}": lambda size=size: probe(size, options.work) for size in options.sizes}
    steps[f"update {options.update}"] = lambda: update(options.update, options.work)
    for name, step in steps.items():
        try:
            report[name] = step()
        except Exception:  # the others are measured all the same
            report[name] = {"error": traceback.format_exc()[-2000:]}
        print(name, json.dumps(report[name])[:1500], flush=True)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")


def launches(count: int = 2000) -> dict[str, float]:
    x = torch.zeros(16, device="cuda")
    for _ in range(200):
        x.add_(1)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(count):
        x.add_(1)
    launched = time.perf_counter() - begun
    torch.cuda.synchronize()
    return {"launched": 1e6 * launched / count, "run": 1e6 * (time.perf_counter() - begun) / count}


def probe(size: str, work: Path) -> dict[str, Any]:
    folder = make(size, work / f"model-{size}")
    found: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, graphs in (("launched", "false"), ("recorded", "true")):
        config = load_config([
            f"trainer.policy.model.path={folder}", "generator.backend=sglang", "trainer.algorithm.use_kl_loss=false",
            "trainer.placement.runtime=local", f"generator.weight_probe_graphs={graphs}",
        ])  # fmt: skip
        worker = PolicyWithSender(config, 10, Place())
        for _ in range(3):
            values[name] = worker.weights_probe(ROWS, 24)
        found[f"{name}_ms"] = timed(lambda worker=worker: worker.weights_probe(ROWS, 24), 10)
        del worker
        torch.cuda.empty_cache()
    pairs = zip(values["launched"], values["recorded"], strict=True)
    return found | {"gap": max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))}


def update(size: str, work: Path) -> dict[str, Any]:
    config = config_for(make(size, work / f"model-{size}"), "trainer.max_tokens_per_microbatch=16384", COMPILED)
    worker, batch = MeasuredPolicy(config, 100, Place()), make_batch([655] * 100, SHAPES[size].vocabulary)
    for _ in range(3):
        worker.update(batch)
    found: dict[str, Any] = {
        "tokens": 65500,
        "ms": timed(lambda: worker.update(batch), 5),
        "waits": waits(worker, batch),
    }
    return found | {"profiled": worker.profiled_update(batch, 0)}


def waits(worker: MeasuredPolicy, batch: Any) -> dict[str, int]:
    """Where the CPU waited for the GPU in one update, and how often."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        worker.update(batch)
        torch.cuda.set_sync_debug_mode("default")
    return dict(collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in seen).most_common(15))


def timed(work: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of each call, sorted."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(round(1e3 * (time.perf_counter() - begun), 2))
    return sorted(times)


if __name__ == "__main__":
    main()
