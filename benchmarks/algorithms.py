"""What does each function cost, beside one pass over the memory?

    python benchmarks/algorithms.py [--rows 16384 --width 4096] [--threads 1] [--device cpu] [--only policy_loss]

One pass reads a float32 tensor ``[rows, width]`` and writes another. Every function of every family gets tensors of
that shape (groups of 8, ragged responses), and is timed against it: forwards, and with its gradient where it has one.
A loop over rows would show here as thousands of passes. Prints a table and writes
``results/algorithms-<device>-<date>.json``.

Memory that a tensor leaves is kept for the next one, as CUDA's allocator does: else every step of every function would
wait for the operating system to clear new pages, which takes longer than the arithmetic.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import common
from skyrl_train.algorithms.advantages import batch_normalize
from skyrl_train.algorithms.cases import LEARNED, Case, Subject, tensor_of
from skyrl_train.algorithms.groups import group_stats, scores
from skyrl_train.algorithms.table import FAMILIES
from skyrl_train.algorithms.values import explained_variance
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.algorithm_sections import OffPolicyCorrectionConfig

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""glibc's words for: never map memory for one tensor, never give any back."""
SAMPLES = 8
"""Rows in a group."""


def big_case(rows: int, width: int, device: str) -> Case:
    """Tensors for every family; a row's response is from 1 to ``width`` tokens long."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(scale: float = 1.0) -> Tensor:
        return torch.randn(rows, width, generator=draw, device=device).mul_(scale)

    lengths = torch.randint(1, width + 1, (rows, 1), generator=draw, device=device)
    logprobs = torch.rand(rows, width, generator=draw, device=device).mul_(-2)
    case = {name: logprobs + normal(0.1) for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs")}
    case |= {name: normal() for name in ("advantages", "rewards", "returns", "values", "old_values")}
    return case | {
        "logprobs": logprobs,
        "mask": torch.arange(width, device=device) < lengths,
        "group": torch.arange(rows, device=device) // SAMPLES,
        "baseline": torch.zeros(rows, device=device),
    }


def config() -> AlgorithmConfig:
    """Everything on that costs something."""
    correction = OffPolicyCorrectionConfig(
        tis_ratio_type="sequence", sequence_mask_metric="geometric", outlier_token_is_threshold_high=100.0,
        token_mask_is_threshold_low=0.5,
    )  # fmt: skip
    return AlgorithmConfig(
        gamma=0.99, lambd=0.95, max_seq_len=4096, overlong_penalty="soft", overlong_max_len=4096, reward_scale=2.0,
        reward_clip=[-2.0, 2.0], off_policy_correction=correction,
    )  # fmt: skip


def works(case: Case, only: str | None) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    found: dict[str, Callable[[], object]] = {}
    for family, facts in FAMILIES.items():
        for name in facts.functions:
            subject = Subject(family, name, config())
            found[f"{family} {name}"] = lambda s=subject: s.call(case, micro_batch_size=64)
            if family in LEARNED:
                found[f"{family} {name} + gradient"] = lambda s=subject: _with_gradient(s, case)
    mask, group = case["mask"], case["group"]
    found["batch_normalize"] = lambda: batch_normalize(case["advantages"], mask)
    found["explained_variance"] = lambda: explained_variance(case["values"], case["returns"], mask)
    found["scores and group_stats"] = lambda: group_stats(scores(case["rewards"], mask), group)
    return {name: work for name, work in found.items() if only is None or name.startswith(only)}


def _with_gradient(subject: Subject, case: Case) -> Tensor:
    learned = LEARNED[subject.family]
    x = case[learned].detach().requires_grad_()
    return torch.autograd.grad(tensor_of(subject.call(case | {learned: x})).sum(), x)[0]


def seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """The quickest of several runs: by the clock on a GPU, of the processors' time elsewhere."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return min(times)


def main() -> int:
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="the start of names, such as 'policy_loss gspo'")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    if not KEPT.items() <= os.environ.items():  # they are read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT)
    torch.set_num_threads(options.threads)
    machine = common.machine()
    case = big_case(options.rows, options.width, options.device)
    target = torch.empty_like(case["rewards"])
    one_pass = seconds(lambda: torch.neg(case["rewards"], out=target), 5 * options.repeats, options.device)
    print(f"{options.rows} x {options.width}; one pass {1000 * one_pass:.1f} ms\n{'':48}{'seconds':>9}{'passes':>8}")
    rows: list[dict[str, Any]] = []
    for name, work in works(case, options.only).items():
        took = seconds(work, options.repeats, options.device)
        rows.append({"name": name, "seconds": round(took, 4), "passes": round(took / one_pass, 1)})
        print(f"{name:48}{took:9.3f}{took / one_pass:8.1f}", flush=True)
    if not options.no_save:
        report = {"machine": machine, "options": vars(options), "one_pass_s": round(one_pass, 5), "rows": rows}
        print(common.write_report(f"algorithms-{options.device}", report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
