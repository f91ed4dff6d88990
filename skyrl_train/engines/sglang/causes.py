"""Why a launched SGLang server ended, read out of its log."""

from __future__ import annotations

import re
import signal

from skyrl_train.engines.sglang.attention import USE_FLASHINFER

PORT_TAKEN = re.compile(r"address already in use|port.{0,40}(is not available|in use|is used by a process)", re.I)
_NOISE = re.compile(
    r"^(\s|\^|Traceback|During handling|The above exception)|kill_process_tree|SIGQUIT|coredump"
    r"|logit_bias must has keys"  # the answer to a question of ours
)
_ERROR = re.compile(r"^(\[[^\]]*\] *)*([\w.]*(Error|Exception|Interrupt|Failure)\b.*)")

KNOWN: list[tuple[str, str]] = [
    (
        r"No module named '?sglang'?(?![.\w])",
        "SGLang is not installed for the Python that starts the server. "
        'Run: pip install "skyrl-train[sglang]" (or: uv sync --extra sglang), or set generator.engine_python to the '
        "Python of an environment that has it.",
    ),
    (
        r"cannot import name '\w+' from 'sglang'",
        "This SGLang is too old, or another package goes by its name. Run: pip install --upgrade sglang",
    ),
    (r"FlashAttention v3 Backend requires", USE_FLASHINFER),
    (
        r"(sgl-kernel|sglang-kernel|flashinfer[\w-]*) is installed with version",
        "The kernel package does not belong to this SGLang. Install the version that the message names, or set "
        "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1 to try it as it is.",
    ),
    (
        r"leave no GPU memory for the KV cache",
        "The weights fill the engine's share of the GPU. Raise generator.gpu_memory_utilization, or "
        "generator.inference_engine_tensor_parallel_size.",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError|Not enough memory\. Please try to increase --mem-fraction-static",
        "The GPU's memory is not enough. Lower generator.gpu_memory_utilization if the learner shares the GPU, or "
        "raise it if the cache is too small; lower generator.max_num_seqs and generator.max_num_batched_tokens; or "
        "raise generator.inference_engine_tensor_parallel_size.",
    ),
    (
        r"unrecognized arguments: (?P<what>.*)",
        "This SGLang has no such option. Correct generator.engine_init_kwargs; `python -m sglang.launch_server --help` "
        "lists them.",
    ),
    (
        r"invalid choice: .*",
        "Correct the value in generator.engine_init_kwargs.",
    ),
    (
        r"is already used by a Transformers config",
        "This SGLang does not go with the transformers beside it. Install the version it pins (5.12.1 for 0.5.17) in "
        "an environment of its own, and set generator.engine_python to its Python.",
    ),
    (PORT_TAKEN.pattern, "Another process holds the port. Remove engine_init_kwargs.port, or end that process."),
    (
        r"NCCL error[\s\S]*Cuda failure 'invalid argument'",
        "Set NCCL_CUMEM_ENABLE and NCCL_NVLS_ENABLE alike for the server and the learner: SGLang sets both to 0, and "
        "so does the learner unless they are set already.",
    ),
    (
        r"memory capacity is unbalanced",
        "Another process holds memory on one of the server's GPUs. End it, or set other GPUs (CUDA_VISIBLE_DEVICES, "
        "engine_init_kwargs.base_gpu_id).",
    ),
    (
        r"NCCL error|ncclInvalidUsage|ncclSystemError",
        "Set NCCL_DEBUG=INFO and look into the log for the first error. Usual causes: a firewall between the nodes, "
        "other versions of NCCL on them, another network interface (NCCL_SOCKET_IFNAME), or a timeout (NCCL_TIMEOUT).",
    ),
]
"""What is found in a log, and what to do; the first that fits is taken."""


def last_error(log: str, lines: int = 3) -> str:
    """The last lines of the log that say what went wrong; its last lines, if none does."""
    kept = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip() and not _NOISE.search(line)]
    errors = [match[2] for line in kept if (match := _ERROR.match(line))]
    chosen = errors[-1:] if errors else kept[-lines:]
    return " | ".join(chosen) or "(the log is empty)"


def how_it_ended(status: int | None) -> str:
    """An exit status in words: ``status 137 (killed by SIGKILL; the kernel does that when memory runs out)``."""
    number = -status if status is not None and status < 0 else (status or 0) - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"status {status}"
    why = "; the kernel does that when memory runs out" if name == "SIGKILL" else ""
    return f"status {status} (killed by {name}{why})"


def advice(log: str) -> str:
    """What to do about it; "" if the cause is not known."""
    return next((remedy for pattern, remedy in KNOWN if re.search(pattern, log, re.IGNORECASE)), "")
