"""The GPUs of this machine, asked of the driver's own tool: nothing is started on them, and torch is not needed."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress


def gpu_capabilities() -> dict[str, tuple[int, int]]:
    """The compute capability, by UUID, of the GPUs that CUDA_VISIBLE_DEVICES leaves us, in the order of their
    numbers; empty where there is none."""
    with suppress(OSError, subprocess.SubprocessError, ValueError, IndexError):
        command = ["nvidia-smi", "--query-gpu=uuid,compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        rows = [[word.strip() for word in line.split(",")] for line in answer.strip().splitlines()]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            chosen = [word.strip() for word in visible.split(",") if word.strip()]
            rows = [rows[int(word)] if word.isdigit() else next(r for r in rows if r[0] == word) for word in chosen]
        return {uuid.removeprefix("GPU-"): _capability(version) for uuid, version in rows}
    return {}


def visible_gpus() -> tuple[str, ...]:
    """UUIDs of the GPUs that this process may use, in the order of their numbers."""
    return tuple(gpu_capabilities())


def _capability(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)
