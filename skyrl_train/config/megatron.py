"""The Megatron section: typed so that configs which carry it load; a value that asks for Megatron is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skyrl_train.config.fields import key, section


@dataclass(slots=True, kw_only=True)
class MegatronDDPConfig:
    grad_reduce_in_fp32: bool = key(True, "Reduce gradients in float32.")
    overlap_grad_reduce: bool = key(False, "Reduce gradients during the backward pass.")
    overlap_param_gather: bool = key(False, "Gather parameters during the forward pass.")
    average_in_collective: bool = key(True, "Average inside the collective.")


@dataclass(slots=True, kw_only=True)
class MegatronProfilerConfig:
    enable: bool = key(False, "Record a torch profile.")
    ranks: list[int] = key([], "Ranks that are profiled.")
    save_path: str | None = key(None, "Folder of the profiles.", path=True)


@dataclass(slots=True, kw_only=True)
class MegatronLoraConfig:
    lora_type: str = key("lora", "Kind of adapter.")


@dataclass(slots=True, kw_only=True)
class MegatronOptimizerConfig:
    overlap_cpu_optimizer_d2h_h2d: bool = key(False, "Overlap the copies of an offloaded optimizer.")
    use_precision_aware_optimizer: bool = key(False, "Keep optimizer states in lower precision.")
    optimizer_cpu_offload: bool = key(False, "Run the optimizer on the CPU.")
    optimizer_offload_fraction: float = key(0.0, "Share of the optimizer that is offloaded.", minimum=0, maximum=1)


@dataclass(slots=True, kw_only=True)
class MegatronTransformerConfig:
    recompute_granularity: str | None = key("full", "What is recomputed in the backward pass.")
    recompute_modules: list[str] = key(["core_attn"], "Modules that are recomputed.")
    recompute_method: str | None = key("uniform", "How layers are chosen.")
    recompute_num_layers: int | None = key(1, "Layers in one recomputed block.", minimum=1)


@dataclass(slots=True, kw_only=True)
class MegatronConfig:
    tensor_model_parallel_size: int = key(1, "GPUs that split each layer.", minimum=1)
    pipeline_model_parallel_size: int = key(1, "GPUs that split the stack of layers.", minimum=1)
    context_parallel_size: int = key(1, "GPUs that split a sequence.", minimum=1)
    expert_model_parallel_size: int = key(1, "GPUs that split the experts.", minimum=1)
    expert_tensor_parallel_size: int | None = key(None, "GPUs that split each expert.", minimum=1)
    ddp_config: MegatronDDPConfig = section(MegatronDDPConfig)
    model_config_kwargs: dict[str, Any] = key({}, "Passed to the model's config.")
    torch_profiler_config: MegatronProfilerConfig = section(MegatronProfilerConfig)
    lora_config: MegatronLoraConfig = section(MegatronLoraConfig)
    optimizer_config_kwargs: MegatronOptimizerConfig = section(MegatronOptimizerConfig)
    transformer_config_kwargs: MegatronTransformerConfig = section(MegatronTransformerConfig)
    empty_cuda_cache: bool = key(True, "Empty the CUDA cache between phases.")


@dataclass(slots=True, kw_only=True)
class MegatronRefConfig:
    tensor_model_parallel_size: int = key(1, "GPUs that split each layer.", minimum=1)
    pipeline_model_parallel_size: int = key(1, "GPUs that split the stack of layers.", minimum=1)
    context_parallel_size: int = key(1, "GPUs that split a sequence.", minimum=1)
    expert_model_parallel_size: int = key(1, "GPUs that split the experts.", minimum=1)
    expert_tensor_parallel_size: int | None = key(1, "GPUs that split each expert.", minimum=1)
    model_config_kwargs: dict[str, Any] = key({}, "Passed to the model's config.")
    transformer_config_kwargs: dict[str, Any] = key({}, "Passed to the transformer's config.")
