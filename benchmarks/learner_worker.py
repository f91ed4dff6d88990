"""A policy's worker that also tells how long its updates take, how much memory, and what the workers exchange."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from skyrl_train.batch import TrainBatch
from skyrl_train.config.schema import Config
from skyrl_train.learner.policy_worker import PolicyWorker
from skyrl_train.runtime.place import Place

WIDTHS = {"Float": 4, "BFloat16": 2, "Half": 2, "Double": 8, "Int": 4, "Long": 8, "Byte": 1}


class MeasuredPolicy(PolicyWorker):
    """Methods that the benchmark calls through the runtime."""

    def __init__(self, config: Config, total_updates: int, place: Place) -> None:
        super().__init__(config, total_updates, place)

    def timed_updates(self, batch: TrainBatch, warm: int, repeats: int) -> dict[str, Any]:
        """Seconds of each update after ``warm`` ones, and peaks of memory while they ran."""
        seconds: list[float] = []
        metrics: dict[str, float] = {}
        for number in range(warm + repeats):
            if number == warm:
                self._reset_peak()
                self.memory_log.phases.clear()
            self._wait()
            begun = time.perf_counter()
            metrics = self.update(batch)
            self._wait()
            seconds.append(time.perf_counter() - begun)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        names = ("policy/grad_norm", "policy/loss", "policy/entropy")
        return {
            "seconds": seconds[warm:], "first_seconds": seconds[:warm], "peak_GiB": peak / 2**30,
            "memory": self.memory(), "metrics": {name: metrics[name] for name in names},
        }  # fmt: skip

    def profiled_update(self, batch: TrainBatch, warm: int) -> dict[str, Any]:
        """Milliseconds and calls of what takes longest in one update: kernels on the GPU, and work of the CPU."""
        from torch.profiler import ProfilerActivity, profile

        for _ in range(warm):
            self.update(batch)
        self._wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            begun = time.perf_counter()
            self.update(batch)
            self._wait()
            seconds = time.perf_counter() - begun
        events = recorded.key_averages()
        rows = [event for event in events if str(event.device_type).endswith("CUDA")]
        rows.sort(key=lambda event: -event.self_device_time_total)
        kernels = {row.key[:120]: [round(row.self_device_time_total / 1e3, 2), row.count] for row in rows[:50]}
        slowest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:40]
        return {
            "seconds": seconds,
            "busy_ms": sum(row.self_device_time_total for row in rows) / 1e3,
            "kernels": kernels,
            "launched": sum(row.count for row in rows),
            "cpu": {event.key[:90]: [round(event.self_cpu_time_total / 1e3, 2), event.count] for event in slowest},
        }

    def timed_scoring(self, batch: TrainBatch, repeats: int) -> list[float]:
        seconds = []
        for _ in range(repeats + 1):
            self._wait()
            begun = time.perf_counter()
            self.logprobs(batch)
            self._wait()
            seconds.append(time.perf_counter() - begun)
        return seconds[1:]

    def timed_offload(self, repeats: int) -> dict[str, Any]:
        """Seconds to move policy and optimizer to the host and back; the first round also locks the pages."""
        out, back, moved = [], [], 0
        for _ in range(repeats + 1):
            self._wait()
            begun = time.perf_counter()
            moved = self.offload()
            out.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            self.onload()
            self.updater.moments.back()
            self._wait()
            back.append(time.perf_counter() - begun)
        return {"bytes": moved, "first_out_s": out[0], "out_s": out[1:], "back_s": back[1:]}

    def bus_bandwidth(self, size: int = 1 << 30, repeats: int = 5) -> dict[str, float]:
        """Bytes a second between page-locked host memory and the GPU, the best of several copies."""
        host, best = torch.empty(size, dtype=torch.uint8, pin_memory=True), {}
        gpu = torch.empty(size, dtype=torch.uint8, device=self.device)
        for name, target, source in (("to_host", host, gpu), ("to_gpu", gpu, host)):
            seconds = []
            for _ in range(repeats):
                self._wait()
                begun = time.perf_counter()
                target.copy_(source, non_blocking=True)
                self._wait()
                seconds.append(time.perf_counter() - begun)
            best[name] = size / min(seconds)
        return best

    def traffic(self, batch: TrainBatch) -> dict[str, float]:
        """Bytes that enter this worker's collectives in one update, by kind, from the profiler's record of them."""
        with torch.profiler.profile() as profile:
            self.update(batch)
            self._wait()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(file))
            events = json.loads(file.read_text())["traceEvents"]
        found: dict[str, float] = {}
        for event in events:
            facts = event.get("args", {})
            kind = facts.get("Collective name")
            if kind and event.get("name") == "record_param_comms" and "In msg nelems" in facts:
                width = WIDTHS.get(str(facts.get("dtype")), 0)
                for side in ("In", "Out"):
                    key = f"{kind} {side.lower()}"
                    found[key] = found.get(key, 0.0) + float(facts[f"{side} msg nelems"]) * width
        return found

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
