"""Config to server arguments, the choice of attention, and what a log says. No server is started."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from skyrl_train.config.door import load_config
from skyrl_train.config.environ import EnvironmentVariables
from skyrl_train.config.schema import Config
from skyrl_train.engines.sglang.attention import check_attention, choose_attention
from skyrl_train.engines.sglang.causes import advice, last_error
from skyrl_train.engines.sglang.options import Surroundings, command_line, look_around, server_arguments
from skyrl_train.engines.sglang.options import server_variables as variables_of
from skyrl_train.engines.sglang.payloads import LOADER
from skyrl_train.errors import ConfigError, MissingPackageError

HOPPER = Surroundings(capability=(9, 0), installed=frozenset({"sglang", "fa3", "flashinfer"}))
CPU = Surroundings(installed=frozenset({"sglang"}))


def configured(*keys: str) -> Config:
    return load_config(["trainer.policy.model.path=org/model", "generator.backend=sglang", *keys])


def arguments(*keys: str, around: Surroundings = HOPPER, replica: int = 0, first_gpu: int = 0) -> dict:
    return server_arguments(configured(*keys), replica, around=around, first_gpu=first_gpu)


def test_the_keys_of_the_config_become_the_servers() -> None:
    found = arguments(
        "generator.inference_engine_tensor_parallel_size=2", "generator.inference_engine_pipeline_parallel_size=2",
        "generator.gpu_memory_utilization=0.6", "generator.max_num_seqs=256", "generator.max_num_batched_tokens=4096",
        "generator.enable_prefix_caching=false", "generator.enforce_eager=true", "generator.num_inference_engines=2",
        "trainer.seed=7", replica=1, first_gpu=4,
    )  # fmt: skip
    assert found["model_path"] == "org/model"
    assert (found["tp_size"], found["pp_size"], found["ep_size"]) == (2, 2, 1)
    assert (found["mem_fraction_static"], found["max_running_requests"]) == (0.6, 256)
    assert (found["max_prefill_tokens"], found["chunked_prefill_size"]) == (4096, 4096)
    assert found["disable_radix_cache"] and found["disable_cuda_graph"] and found["skip_server_warmup"]
    assert (found["random_seed"], found["base_gpu_id"]) == (8, 4)  # another stream, and the GPUs of its seat
    assert found["enable_memory_saver"] is True  # colocated
    assert arguments("generator.enable_chunked_prefill=false")["chunked_prefill_size"] == -1


@pytest.mark.parametrize(
    ("keys", "around", "dtype"),
    [
        ((), HOPPER, "bfloat16"),
        ((), CPU, "float32"),
        (("trainer.bf16=false",), HOPPER, "float32"),
        (("trainer.bf16=true",), CPU, "bfloat16"),
        (("generator.model_dtype=float16",), HOPPER, "float16"),
    ],
)
def test_the_format_is_named_because_auto_makes_float16_of_float32(keys, around, dtype) -> None:
    assert arguments(*keys, around=around)["dtype"] == dtype


def test_what_the_user_passes_has_the_last_word_and_is_not_touched() -> None:
    found = arguments(
        "+generator.engine_init_kwargs.attention_backend=triton", "+generator.engine_init_kwargs.tp_size=4",
        "+generator.engine_init_kwargs.never_heard_of=x", "generator.engine_init_kwargs.skip_server_warmup=false",
    )  # fmt: skip
    assert (found["attention_backend"], found["tp_size"], found["never_heard_of"]) == ("triton", 4, "x")
    assert found["skip_server_warmup"] is False


def test_the_faqs_override_for_flashinfer_is_one_that_sglang_takes() -> None:
    found = arguments(
        "+generator.engine_init_kwargs.attention_backend=flashinfer",
        "+generator.engine_init_kwargs.mm_attention_backend=flashinfer",
    )
    assert (found["attention_backend"], found["mm_attention_backend"]) == ("flashinfer", "flashinfer_cudnn")


def test_the_faqs_lora_block() -> None:
    found = arguments(
        "generator.enable_lora=true", "+generator.engine_init_kwargs.max_lora_rank=32",
        "+generator.engine_init_kwargs.max_loras_per_batch=8", "+generator.engine_init_kwargs.lora_backend=csgmv",
    )  # fmt: skip
    assert found["enable_lora"] is True and found["lora_target_modules"] == ["all"]
    assert (found["max_lora_rank"], found["max_loras_per_batch"], found["lora_backend"]) == (32, 8, "csgmv")
    assert "enable_lora" not in arguments()


def test_a_cpu_gets_what_sglang_needs_there() -> None:
    found = arguments(around=CPU)
    assert (found["device"], found["attention_backend"], found["sampling_backend"]) == (
        "cpu",
        "torch_native",
        "pytorch",
    )
    assert found["mem_fraction_static"] == 0.5 and found["max_total_tokens"] == 16384
    variables = variables_of(configured("trainer.num_threads=3"), around=CPU)
    assert (variables["SGLANG_USE_CPU_ENGINE"], variables["OMP_NUM_THREADS"]) == ("1", "3")
    on_gpu = variables_of(configured(), around=HOPPER)
    assert set(on_gpu) == {"PYTHONPATH"}, "where our loader lies"
    first = str(on_gpu["PYTHONPATH"]).split(os.pathsep)[0]
    assert LOADER.split(".")[0] + ".py" in os.listdir(first) and LOADER in arguments()["custom_weight_loader"]


def test_sglangs_log_level() -> None:
    found = server_arguments(configured(), around=HOPPER, variables=EnvironmentVariables(sglang_log_level="debug"))
    assert found["log_level"] == "debug"


def test_the_command_line() -> None:
    overrides = {"json_model_override_args": {"a": 1}, "lora_target_modules": ["q_proj", "v_proj"]}
    words = command_line({"tp_size": 2, "enable_lora": True, "disable_cuda_graph": False, "x": None, **overrides})
    assert words == ["--tp-size", "2", "--enable-lora", "--json-model-override-args", '{"a": 1}',
                     "--lora-target-modules", "q_proj", "v_proj"]  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "installed", "backend"),
    [
        ((9, 0), {"fa3", "flashinfer"}, "fa3"),
        ((9, 0), {"flashinfer"}, "flashinfer"),  # kernels without FlashAttention 3
        ((9, 0), set(), "triton"),
        ((8, 0), {"fa3", "flashinfer"}, "flashinfer"),
        ((8, 9), set(), "triton"),
        ((7, 5), {"flashinfer"}, "flashinfer"),
        ((7, 0), {"flashinfer"}, "triton"),
        ((10, 0), {"fa3", "flashinfer"}, None),
        ((12, 0), {"fa3", "flashinfer"}, "flashinfer"),
        (None, {"fa3", "flashinfer"}, "torch_native"),
    ],
)
def test_attention_is_chosen_by_the_gpu_and_what_is_installed(capability, installed, backend) -> None:
    assert choose_attention(capability, installed) == backend


@pytest.mark.parametrize("capability", [(7, 5), (10, 0), (12, 0), None])
def test_fa3_where_it_cannot_run_gives_the_faqs_message_and_fix(capability) -> None:
    with pytest.raises(ConfigError, match="FlashAttention v3 Backend requires SM>=80 and SM<=90") as raised:
        arguments("+generator.engine_init_kwargs.attention_backend=fa3", around=Surroundings(capability=capability))
    assert "+generator.engine_init_kwargs.attention_backend=flashinfer" in str(raised.value)
    check_attention("fa3", (8, 6))
    check_attention("triton", capability)


def test_a_python_without_sglang_is_found_out_before_it_is_started(tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError, match=r"No module named 'sglang'.*uv sync --extra sglang"):
        look_around(sys.executable, gpu=False)
    with pytest.raises(ConfigError, match=r"generator\.engine_python"):
        look_around(str(tmp_path / "python"))


def test_what_an_environment_has(sglang_python: str) -> None:
    assert look_around(sglang_python, gpu=False) == CPU


LOGS = {
    "ModuleNotFoundError: No module named 'sglang'": "uv sync --extra sglang",
    "/usr/bin/python: Error while finding module specification for 'sglang.launch_server' "
    "(ModuleNotFoundError: No module named 'sglang')": "generator.engine_python",
    "ImportError: cannot import name 'Engine' from 'sglang' (unknown location)": "pip install --upgrade sglang",
    "AssertionError: FlashAttention v3 Backend requires SM>=80 and SM<=90. Please use `--attention-backend "
    "flashinfer`.": "attention_backend=flashinfer",
    "Exception: sglang-kernel is installed with version 0.4.1, which is less than the minimum": "kernel package",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB": "gpu_memory_utilization",
    "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.": "gpu_memory_utilization",
    "OSError: [Errno 98] Address already in use": "port",
    "sglang serve: error: unrecognized arguments: --never-heard-of x": "engine_init_kwargs",
    "ValueError: 'qwen3_asr' is already used by a Transformers config, pick another name.": "engine_python",
    "RuntimeError: NCCL error in: NCCLUtils.cpp:93\nCuda failure 'invalid argument'": "NCCL_CUMEM_ENABLE",
    "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1": "NCCL_DEBUG=INFO",
    "RuntimeError: The memory capacity is unbalanced. Some GPUs may be occupied by other processes.": "base_gpu_id",
    "ValueError: Loaded weights leave no GPU memory for the KV cache.": "gpu_memory_utilization",
    "ModuleNotFoundError: No module named 'sglang.srt.nonesuch'": "",
    "KeyError: 3": "",
}


@pytest.mark.parametrize(("line", "remedy"), LOGS.items())
def test_a_log_is_read_for_its_cause(line: str, remedy: str) -> None:
    log = f"[2026-11-24 04:23:01] INFO: loading\nTraceback (most recent call last):\n  File x\n    raise\n{line}\n"
    assert line.split(": ", 1)[1][:30] in last_error(log)
    assert (remedy in advice(log)) if remedy else advice(log) == ""


def test_the_last_error_is_the_cause_not_what_followed() -> None:
    log = (
        "[2026-11-24] Scheduler hit an exception: Traceback (most recent call last):\n  File x\n"
        "RuntimeError: Unsupported device: cpu\n\n[2026-11-24] SIGQUIT received. signum=None\n"
        "[2026-11-24] kill_process_tree called: parent_pid=1\nKilled\n"
    )
    assert last_error(log) == "RuntimeError: Unsupported device: cpu"
    assert last_error("") == "(the log is empty)" and last_error("a\nb\n") == "a | b"
