"""The learner on one or two GPUs: utilisation, memory, ragged lengths, offloading, sharding. Random weights.

    python benchmarks/learner_gpu.py --out FILE.json [--only update-0.6B-16k ...] [--work FOLDER] [--small]

Each scenario is a process of its own with a deadline; the file is written anew after each, so that a run that is cut
short keeps what it has, and a scenario that fails leaves its error there. ``--small`` runs tiny shapes on any machine.
``--list`` names the scenarios.

Model FLOPs utilisation (MFU) = FLOPs of the model / (seconds x peak). FLOPs of a forward and backward pass, recomputed
work not counted:

    6 x (weights of the layers x tokens + hidden x vocabulary x scored tokens) + 12 x layers x heads x head_dim x seen

``seen`` is the number of (query, key) pairs: S (S + 1) / 2 for a sequence of S tokens (``mfu``), or S^2, as PaLM and
many tools count (``mfu_full_attention``). With an adapter, ``mfu_needed`` counts 4 in place of 6 for frozen weights.
The peak is 989.4 TFLOP/s (dense bfloat16 of H100 and H200). Seconds are of a whole update: forward and backward passes
with recomputation, gradient clipping, AdamW.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import date
from pathlib import Path
from typing import Any

import torch
from common import machine
from gpu_models import SHAPES, make
from learner_shapes import make_batch, ragged_lengths
from learner_worker import MeasuredPolicy

from skyrl_train.config.door import load_config
from skyrl_train.runtime.local import LocalWorkers
from skyrl_train.runtime.processes import ProcessWorkers

PEAK = 989.4e12
PUBLISHED = {  # prime-rl's public table: MFU in per cent and GiB on one H100, updates with recomputation
    "update-0.6B-16k": {"mfu_percent": 11.1, "peak_GiB": 12.5},
    "update-0.6B-65k": {"mfu_percent": 26.8, "peak_GiB": 19.6},
    "update-4B-lora-16k": {"mfu_percent": 21.7, "peak_GiB": 23.3},
}
COMPILED = "trainer.policy.use_torch_compile=true"
EAGER = "trainer.policy.use_torch_compile=false"
AWAY = "trainer.policy.optimizer_config.offload_after_step=true"
GATHERED = "trainer.policy.fsdp_config.reshard_after_forward=false"
FULL = "trainer.gradient_checkpointing_mode=full"
LORA = "trainer.policy.model.lora.rank=16"
K16, K65 = 16384, 65536

UPDATES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "update-0.6B-16k": ("0.6B", K16, (COMPILED,)),
    "update-0.6B-65k": ("0.6B", K65, (COMPILED, AWAY)),
    "update-4B-lora-16k": ("4B", K16, (COMPILED, LORA)),
    "update-0.6B-16k-eager": ("0.6B", K16, (EAGER,)),
    "update-0.6B-16k-gathered": ("0.6B", K16, (COMPILED, GATHERED)),
    "update-0.6B-16k-full": ("0.6B", K16, (COMPILED, FULL)),
    "update-0.6B-65k-full": ("0.6B", K65, (COMPILED, FULL)),
    "update-4B-lora-16k-full": ("4B", K16, (COMPILED, LORA, FULL)),
    "update-4B-lora-16k-eager": ("4B", K16, (EAGER, LORA)),
}
OTHERS = ("attention", "ragged", "offload-4B", "scaling", "kernels")


def make_folder(model: str, work: Path) -> Path:
    return make(model, work / model, device=device(), max_position_embeddings=1 << 17)


def config_for(folder: Path, *overrides: str) -> Any:
    return load_config([
        f"trainer.policy.model.path={folder}", "trainer.algorithm.use_kl_loss=false", "generator.backend=embedded",
        "trainer.train_batch_size=4096", "trainer.policy_mini_batch_size=4096", "generator.n_samples_per_prompt=1",
        "trainer.update_epochs_per_batch=1", "trainer.placement.runtime=local", *overrides,
    ])  # fmt: skip


async def with_workers(config: Any, count: int, script: Any) -> Any:
    start: Any = LocalWorkers.start if count == 1 else ProcessWorkers.start
    more = {} if count == 1 else {"role": "policy", "count": count}
    workers = await start(MeasuredPolicy, config, 100, **more)
    try:
        return await script(workers)
    finally:
        await workers.close()


def update(name: str, work: Path, small: bool) -> dict[str, Any]:
    model, length, overrides = UPDATES[name]
    if small:
        model, length = "tiny", length // 256
    shape = SHAPES[model]
    folder = make_folder(model, work)
    batch = make_batch([length], shape.vocabulary)

    async def script(workers: Any) -> dict[str, Any]:
        (found,) = await workers.all("timed_updates", batch, *((1, 2) if small else (3, 5)))
        return found

    config = config_for(folder, "trainer.micro_train_batch_size_per_gpu=1", *overrides)
    return rated(asyncio.run(with_workers(config, 1, script)), shape, [length], frozen=LORA in overrides)


def rated(found: dict[str, Any], shape: Any, lengths: list[int], *, frozen: bool = False) -> dict[str, Any]:
    seconds = sorted(found["seconds"])[len(found["seconds"]) // 2]
    flops = shape.flops(lengths, sum(n - min(128, min(lengths) - 1) for n in lengths), frozen=frozen)
    rates = {key: value / seconds / PEAK for key, value in flops.items()}
    return found | {
        "tokens": sum(lengths), "median_s": seconds, "tokens_per_s": sum(lengths) / seconds,
        "flops": flops["causal"], "mfu": rates["causal"], "mfu_full_attention": rates["full_attention"],
        "mfu_needed": rates["needed"],
    }  # fmt: skip


def kernels(name: str, work: Path, small: bool) -> dict[str, Any]:
    """Which kernels an update of 0.6B at 16k tokens spends its time in."""
    model, length = ("tiny", 256) if small else ("0.6B", K16)
    batch = make_batch([length], SHAPES[model].vocabulary)

    async def script(workers: Any) -> dict[str, Any]:
        return (await workers.all("profiled_update", batch, 1 if small else 3))[0]

    config = config_for(make_folder(model, work), "trainer.micro_train_batch_size_per_gpu=1", COMPILED)
    return asyncio.run(with_workers(config, 1, script))


def ragged(name: str, work: Path, small: bool) -> dict[str, Any]:
    """The same number of tokens in log-normal lengths (mean 512, up to 8k) and in equal ones."""
    model, total, budget = ("tiny", 8192, 2048) if small else ("0.6B", 1 << 16, K16)
    shape, folder = SHAPES[model], make_folder(model, work)
    uneven = ragged_lengths(total, 512, 2000 if small else 8064)
    equal = [sum(uneven) // len(uneven)] * len(uneven)

    async def script(workers: Any) -> dict[str, Any]:
        found = {}
        for kind, lengths in (("ragged", uneven), ("equal", equal)):
            batch = make_batch(lengths, shape.vocabulary)
            (part,) = await workers.all("timed_updates", batch, *((1, 2) if small else (2, 4)))
            found[kind] = rated(part, shape, lengths)
        return found | {"ratio": found["ragged"]["tokens_per_s"] / found["equal"]["tokens_per_s"]}

    config = config_for(folder, f"trainer.max_tokens_per_microbatch={budget}", COMPILED if not small else EAGER)
    return asyncio.run(with_workers(config, 1, script))


def offload(name: str, work: Path, small: bool) -> dict[str, Any]:
    """Policy and optimizer of a 4B model to the host and back, beside the bus."""
    model = "tiny" if small else "4B"
    folder = make_folder(model, work)
    batch = make_batch([256], SHAPES[model].vocabulary)

    async def script(workers: Any) -> dict[str, Any]:
        await workers.all("update", batch)  # the optimizer's state is made by the first update
        (found,) = await workers.all("timed_offload", 3)
        if small and device() == "cpu":
            return found
        (bus,) = await workers.all("bus_bandwidth")
        expected = found["bytes"] * (1 / bus["to_host"] + 1 / bus["to_gpu"])
        taken = min(found["out_s"]) + min(found["back_s"])
        return found | {"bus_bytes_per_s": bus, "expected_s": expected, "taken_s": taken, "ratio": taken / expected}

    config = config_for(folder, "trainer.micro_train_batch_size_per_gpu=1", EAGER)
    return asyncio.run(with_workers(config, 1, script))


def scaling(name: str, work: Path, small: bool) -> dict[str, Any]:
    """One worker against two with twice the tokens: the same work for each."""
    if device() == "cuda" and torch.cuda.device_count() < 2:
        return {"skipped": "there is one GPU"}
    model, length, each = ("tiny", 256, 2) if small else ("0.6B", K16, 2)
    shape, folder = SHAPES[model], make_folder(model, work)
    found: dict[str, Any] = {}
    for count in (1, 2):
        lengths = [length] * each * count
        batch = make_batch(lengths, shape.vocabulary)

        async def script(workers: Any, batch: Any = batch, count: int = count) -> dict[str, Any]:
            parts = await workers.all("timed_updates", batch, *((1, 2) if small else (3, 5)))
            traffic = await workers.all("traffic", batch) if count > 1 else [{}]
            return parts[0] | {"traffic": traffic[0], "peaks_GiB": [part["peak_GiB"] for part in parts]}

        config = config_for(
            folder, "trainer.micro_train_batch_size_per_gpu=1", f"trainer.placement.policy_num_gpus_per_node={count}",
            COMPILED if not small else EAGER,
        )  # fmt: skip
        found[f"workers_{count}"] = rated(asyncio.run(with_workers(config, count, script)), shape, lengths)
    weights = shape.layers * shape.per_layer + shape.hidden * shape.vocabulary
    found["ratio"] = found["workers_2"]["tokens_per_s"] / found["workers_1"]["tokens_per_s"]
    found["theory"] = {
        "gathered_bytes": 2 * 2 * weights * each,  # bfloat16, before the forward and the backward pass
        "reduced_bytes": 4 * weights,  # float32; once, as gradients of this size stay whole
    }
    return found


def attention(name: str, work: Path, small: bool) -> dict[str, Any]:
    """Seconds of attention alone, forward and backward, by kernel: heads of the 0.6B model."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from skyrl_train.models.varlen import gpu_kernel

    found: dict[str, Any] = {}
    for length in (256,) if small else (K16, K65):
        kind = torch.float32 if device() == "cpu" else torch.bfloat16
        q, k, v = (torch.randn(1, h, length, 128, device=device(), dtype=kind).requires_grad_() for h in (16, 8, 8))
        ends = torch.tensor([0, length], dtype=torch.int32, device=device())

        def dense(backend: Any, repeat: bool, q: Any = q, k: Any = k, v: Any = v) -> Any:
            if repeat:
                k, v = (x.repeat_interleave(2, 1) for x in (k, v))
            with sdpa_kernel(backend):
                return sdpa(q, k, v, is_causal=True, enable_gqa=not repeat)

        def varlen(q: Any = q, k: Any = k, v: Any = v, ends: Any = ends, length: int = length) -> Any:
            parts = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
            kernel = gpu_kernel()
            assert kernel is not None
            return kernel(*parts, ends, ends, length, length, scale=128**-0.5, window=None)

        ways: dict[str, Any] = {"varlen": varlen}
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            for repeat in (False, True):
                if small or backend != SDPBackend.MATH:
                    word = f"{str(backend).rpartition('.')[2].lower()}{'-repeated' if repeat else ''}"
                    ways[word] = lambda backend=backend, repeat=repeat: dense(backend, repeat)
        flops = 12 * 2048 * length * (length + 1) / 2
        for word, way in ways.items():
            try:
                found[f"{length}-{word}"] = seconds_of(way, flops)
            except Exception as error:  # a backend that this machine lacks
                found[f"{length}-{word}"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return found


def seconds_of(way: Any, flops: float) -> dict[str, float]:
    times: dict[str, list[float]] = {"forward_s": [], "backward_s": []}
    for _ in range(4):
        for name in times:
            if device() == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            if name == "forward_s":
                out = way()
            else:
                out.sum().backward()
            if device() == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begun)
    best = {name: min(values[1:]) for name, values in times.items()}
    return best | {"TFLOP_per_s": flops / sum(best.values()) / 1e12}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def one(name: str, work: Path, small: bool) -> dict[str, Any]:
    kinds = {"attention": attention, "ragged": ragged, "offload-4B": offload, "scaling": scaling, "kernels": kernels}
    return (update if name in UPDATES else kinds[name])(name, work, small)


def isolated(name: str, work: Path, small: bool, deadline: float) -> dict[str, Any]:
    """Runs one scenario in a process of its own."""
    part = work / f"{name}.json"
    part.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--one", name, "--out", str(part), "--work", str(work)]
    begun = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *(["--small"] if small else [])], timeout=deadline, text=True, capture_output=True
        )
        tail = (done.stdout + done.stderr)[-3000:]
    except subprocess.TimeoutExpired as error:
        tail = f"not done within {deadline:g} s: {str(error.stderr)[-2000:]}"
    found = json.loads(part.read_text()) if part.exists() else {"error": tail}
    return found | {"wall_s": round(time.monotonic() - begun, 1)}


def shown(name: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"{name:28} FAILED: {found['error'].strip().splitlines()[-1][:160]}"
    if "mfu" in found:
        return (
            f"{name:28} {found['tokens_per_s']:9.0f} tok/s  MFU {100 * found['mfu']:5.1f} % (full attention "
            f"{100 * found['mfu_full_attention']:5.1f} %)  peak {found['peak_GiB']:5.1f} GiB  "
            f"{found['median_s']:.3f} s"
        )
    if "ratio" in found:
        return f"{name:28} ratio {found['ratio']:.3f}"
    return f"{name:28} {json.dumps(found)[:1500]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[*UPDATES, *OTHERS])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "skyrl-learner")
    parser.add_argument("--deadline", type=float, default=200.0, help="seconds for one scenario")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--one")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        print("\n".join([*UPDATES, *OTHERS]))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    if options.one:
        try:
            found = one(options.one, options.work, options.small)
        except Exception:  # the report tells
            found = {"error": traceback.format_exc()}
        options.out.write_text(json.dumps(found))
        return
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report: dict[str, Any] = {"date": str(date.today()), "gpus": gpus, "machine": machine(), "published": PUBLISHED}
    report["results"] = results = {}
    for name in options.only:
        results[name] = isolated(name, options.work, options.small, options.deadline)
        print(shown(name, results[name]), f" [{results[name]['wall_s']} s]", flush=True)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
