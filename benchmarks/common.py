"""What the benchmarks share: tasks made on the spot, the machine's description, and dated result files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "outputs" / "bench"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "numpy")
SKYRL = (sys.executable, "-m", "skyrl_train.entrypoints.cli")


def environment(threads: int) -> dict[str, str]:
    """The environment of a child process: its threads, and this checkout on its path."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    limits = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "2000", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **limits, "PYTHONPATH": path}


def run(command: Sequence[str], *, threads: int, timeout: float, log: Path | None = None) -> None:
    """Runs a command to its end; its output goes to ``log``, or to ours.

    Raises:
        SystemExit: it failed or took too long; says which command, and where its output is.
    """
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    output = subprocess.DEVNULL if log is None else log.open("w")
    try:
        subprocess.run(
            list(command), cwd=ROOT, env=environment(threads), timeout=timeout, check=True, stdout=output, stderr=output
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        tail = log.read_text()[-2000:] if log is not None else ""
        raise SystemExit(f"{error}\noutput: {log}\n{tail}") from error
    finally:
        if not isinstance(output, int):
            output.close()


def machine() -> dict[str, Any]:
    """What this runs on, and how busy it is now (other jobs disturb seconds much, CPU seconds some)."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_1_minute": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def write_report(name: str, report: Mapping[str, Any]) -> Path:
    """Writes ``results/<name>-<date>.json`` and returns its path."""
    now = datetime.now(UTC)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{now:%Y-%m-%d}.json"
    path.write_text(json.dumps({"date": now.isoformat(timespec="seconds"), **report}, indent=1) + "\n")
    return path


def median(values: Sequence[float]) -> float:
    """The median, to four digits."""
    return float(f"{statistics.median(values):.4g}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
