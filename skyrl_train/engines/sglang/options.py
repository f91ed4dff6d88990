"""The section ``generator`` as arguments and variables of an SGLang server. Pure, but for ``look_around``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_train.config.environ import EnvironmentVariables
from skyrl_train.engines.sglang.attention import Capability, check_attention, choose_attention
from skyrl_train.engines.sglang.causes import advice
from skyrl_train.engines.sglang.payloads import LOADER
from skyrl_train.errors import ConfigError, MissingPackageError
from skyrl_train.models.loading import changed_rope
from skyrl_train.runtime.gpus import gpu_capabilities

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config

CPU_TOKENS = 16384
"""Tokens of the KV cache on a CPU, where SGLang would take most of the machine's memory."""
LORA_RANK = 64
INSIDE = Path(__file__).parent / "inside"
"""The folder of what runs in SGLang's processes, whatever environment they have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What there is for a server."""

    capability: Capability | None = None
    """Of the first GPU; None: no GPU."""
    installed: frozenset[str] = frozenset()
    """Of "sglang", "fa3" and "flashinfer", what the server's Python has."""


def server_arguments(
    config: Config,
    replica: int = 0,
    *,
    around: Surroundings,
    first_gpu: int = 0,
    variables: EnvironmentVariables | None = None,
) -> dict[str, Any]:
    """The arguments of one replica, by SGLang's names. ``generator.engine_init_kwargs`` has the last word.

    Args:
        first_gpu: of those that the server sees; its others follow.

    Raises:
        ConfigError: FlashAttention 3 where it cannot run.
    """
    generator, on_gpu = config.generator, around.capability is not None
    arguments: dict[str, Any] = {
        "model_path": local_path(generator.model_name),
        "dtype": _dtype(config, on_gpu),
        "random_seed": config.trainer.seed + replica,
        "tp_size": generator.inference_engine_tensor_parallel_size,
        "pp_size": generator.inference_engine_pipeline_parallel_size,
        "ep_size": generator.inference_engine_expert_parallel_size,
        "max_running_requests": generator.max_num_seqs,
        "max_prefill_tokens": generator.max_num_batched_tokens,
        "chunked_prefill_size": generator.max_num_batched_tokens if generator.enable_chunked_prefill else -1,
        "disable_radix_cache": not generator.enable_prefix_caching,
        "disable_cuda_graph": generator.enforce_eager,
        "skip_server_warmup": True,
        "incremental_streaming_output": True,
        "attention_backend": choose_attention(around.capability, around.installed),
        "log_level": variables.sglang_log_level if variables else None,
        "json_model_override_args": _model_changes(config),
        "custom_weight_loader": [LOADER],
    }
    if on_gpu:
        arguments |= {
            "mem_fraction_static": generator.gpu_memory_utilization,
            "base_gpu_id": first_gpu,
            "enable_memory_saver": config.trainer.placement.colocate_all,
            # Between two syncs the weights that sleep must survive it.
            "enable_weights_cpu_backup": config.trainer.weight_sync_interval > 1,
        }
    else:
        arguments |= cpu_arguments()
    if generator.enable_lora:
        arguments |= {"enable_lora": True, "max_lora_rank": config.trainer.policy.model.lora.rank or LORA_RANK}
        arguments |= {"lora_target_modules": ["all"]}
    return with_user_arguments(arguments, generator.engine_init_kwargs, around.capability)


def cpu_arguments() -> dict[str, Any]:
    """What SGLang needs in order to run without a GPU."""
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "lora_backend": "torch_native",
        "disable_overlap_schedule": True,
        "max_total_tokens": CPU_TOKENS,
        "mem_fraction_static": 0.5,  # of the memory that is free; left out, SGLang takes a share that can be negative
        "sleep_on_idle": True,  # else each scheduler turns in circles on a core that the learner wants
    }


def with_user_arguments(
    arguments: Mapping[str, Any], user: Mapping[str, Any], capability: Capability | None
) -> dict[str, Any]:
    """The user's arguments over ours, untouched but for one value that SGLang has renamed.

    Raises:
        ConfigError: FlashAttention 3 where it cannot run.
    """
    merged = {**arguments, **{str(name).replace("-", "_"): value for name, value in user.items()}}
    if merged.get("mm_attention_backend") == "flashinfer":
        merged["mm_attention_backend"] = "flashinfer_cudnn"
    check_attention(merged.get("attention_backend"), capability)
    return merged


def server_variables(config: Config, *, around: Surroundings) -> dict[str, str | None]:
    """Environment variables of a server on top of ours, for the machine on which this is called."""
    found = inside_variables()
    if around.capability is not None:
        return found
    return found | cpu_variables(config.trainer.num_threads, config.generator.inference_engine_tensor_parallel_size)


def inside_variables() -> dict[str, str | None]:
    """What a server needs to find ``LOADER``, on this machine."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(INSIDE), os.environ.get("PYTHONPATH"))))}


def cpu_variables(threads: int | None = None, tensor_parallel: int = 1) -> dict[str, str | None]:
    """What SGLang needs to run without a GPU. Small models are 20 times slower with threads that fight over cores.

    Tensor-parallel ranks must be told their cores; pipeline stages must not be.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    bound = "|".join(str(cores[rank % len(cores)]) for rank in range(tensor_parallel))
    return {
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": str(threads or 1),
        "CUDA_VISIBLE_DEVICES": "",
        "SGLANG_CPU_OMP_THREADS_BIND": bound if tensor_parallel > 1 else None,
    }


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """``{"tp_size": 2, "enable_lora": True}`` as ``--tp-size 2 --enable-lora``. None and false are left out."""
    words: list[str] = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or value is False:
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, Mapping):
            words += [flag, json.dumps(value)]
        elif isinstance(value, list | tuple):
            words += [flag, *(json.dumps(one) if isinstance(one, Mapping) else str(one) for one in value)]
        else:
            words += [flag, str(value)]
    return words


def local_path(model: str) -> str:
    """A folder as an absolute path; a hub name as it is."""
    folder = Path(model).expanduser()
    return str(folder.absolute()) if folder.is_dir() else model


def look_around(engine_python: str | None, *, gpu: bool = True) -> Surroundings:
    """What the server's Python has, and the GPU's capability. Imports and starts nothing heavy.

    Raises:
        ConfigError: ``engine_python`` is no Python.
        MissingPackageError: it has no SGLang.
    """
    python = engine_python or sys.executable
    script = (
        "import glob, importlib.util as u\n"
        "for name in ('sglang', 'flashinfer'):\n"
        "    if u.find_spec(name): print(name)\n"
        "kernels = u.find_spec('sgl_kernel')\n"
        "if kernels and any(glob.glob(p + '/flash_ops*') for p in kernels.submodule_search_locations or ()):\n"
        "    print('fa3')\n"
    )
    try:
        found = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            "generator.engine_python", python, f"is no Python that runs: {error}.", "Correct the path."
        ) from error
    installed = frozenset(found.stdout.split())
    if "sglang" not in installed:
        needed_for = f"generator.backend=sglang, started by {python} (No module named 'sglang'),"
        remedy = advice("No module named 'sglang'").partition("Run: ")[2]
        raise MissingPackageError("sglang", needed_for, remedy)
    capability = next(iter(gpu_capabilities().values()), None) if gpu else None
    return Surroundings(capability=capability, installed=installed)


def _dtype(config: Config, on_gpu: bool) -> str:
    """The learner's format, named: SGLang's "auto" makes float16 of float32."""
    if config.generator.model_dtype != "auto":
        return config.generator.model_dtype
    half = on_gpu if config.trainer.bf16 is None else config.trainer.bf16
    return "bfloat16" if half else "float32"


def _model_changes(config: Config) -> dict[str, Any] | None:
    """The learner's changes of the model's config, and those of its rotary embedding in the form that SGLang reads."""
    generator = config.generator
    changes = dict(config.trainer.policy.model_config_kwargs)
    if generator.rope_scaling or generator.rope_theta is not None:
        changes["rope_parameters"] = changed_rope(generator.model_name, generator.rope_scaling, generator.rope_theta)
    return changes or None
