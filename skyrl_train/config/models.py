"""The sections of the models that the learner holds: ``trainer.policy``, ``trainer.ref``, ``trainer.critic``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skyrl_train.config.fields import follow, key, section
from skyrl_train.config.megatron import MegatronConfig, MegatronRefConfig

SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)


@dataclass(slots=True, kw_only=True)
class LoraConfig:
    """An adapter that is trained in place of all weights."""

    rank: int = key(0, "Rank of the adapter; 0 trains all weights.", minimum=0)
    alpha: float = key(16, "The adapter's work counts alpha / rank.", above=0)
    dropout: float = key(
        0, "Dropout on the adapter's input.", minimum=0, below=1, capability="dropout in the adapter",
        reason="importance ratios compare the policy that is trained with the one that was scored, and dropout would "
        "make them two", instead="Set 0; use a smaller rank or trainer.policy.optimizer_config.weight_decay.",
    )  # fmt: skip
    lora_sync_path: str = key(
        "/tmp/skyrl_lora_sync",
        "Folder through which adapters reach an engine that cannot take them from memory.",
        path=True,
        backends=("sglang", "vllm"),
    )
    target_modules: str | list[str] = key(
        "all-linear",
        "Layers that get an adapter: a list of names or ends of names, or a regular expression for the full name; "
        "all-linear: every linear layer but the output embedding.",
    )
    exclude_modules: str | list[str] | None = key(None, "Layers that get none, written likewise.")
    init_method: str = key(
        "kaiming", "How the adapter starts. It changes nothing at first; inits that rewrite the base are left out.",
        choices=("kaiming", "gaussian", "orthogonal"),
    )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class CriticLoraConfig:
    """An adapter for the critic."""

    rank: int = key(0, "Rank of the adapter; 0 trains all weights.", minimum=0)
    alpha: float = key(16, "Scale of the adapter.", above=0)
    dropout: float = key(0, "Dropout on the adapter's input.", minimum=0, below=1)
    target_modules: str | list[str] = key("all-linear", "Modules that get an adapter.")
    exclude_modules: str | list[str] | None = key(None, "Modules that get none.")
    init_method: str = key("kaiming", "How the adapter starts.")


@dataclass(slots=True, kw_only=True)
class PolicyModelConfig:
    """Which model is trained."""

    path: str = key(
        "",
        "Folder of a Hugging Face causal language model, or its name on the hub. Required. "
        "`skyrl warmup` makes a small one on any machine.",
        path=True,
        was="Qwen/Qwen2.5-1.5B-Instruct",
        why="which model is trained is the first decision of a run, and a default would start a 3 GB download",
    )
    lora: LoraConfig = section(LoraConfig)


@dataclass(slots=True, kw_only=True)
class RefModelConfig:
    """The model that the policy is kept near to."""

    path: str = follow("trainer.policy.model.path", "Folder or hub name of the reference model.", path=True)


@dataclass(slots=True, kw_only=True)
class CriticModelConfig:
    """The model that estimates values."""

    path: str | None = key(None, "Folder or hub name of the critic; null: no critic.", path=True)
    lora: CriticLoraConfig = section(CriticLoraConfig, capability="LoRA of the critic")


@dataclass(slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = key(1e-6, "Learning rate.", above=0)
    adam_betas: list[float] = key([0.9, 0.999], "The two decay rates of AdamW.")
    weight_decay: float = key(0.01, "Weight decay.", minimum=0)
    max_grad_norm: float = key(1.0, "Gradients are scaled down to this norm.", above=0)
    offload_after_step: bool | None = key(
        None,
        "Keep the optimizer's state in the CPU's memory but for the optimizer's own steps; null: from the end of a "
        "step's updates on, where engines share the GPU; false: never.",
        was=True,
        why="without engines on the GPU nothing has to make room",
    )
    num_warmup_steps: int = key(0, "Updates over which the learning rate rises from 0.", minimum=0)
    scheduler: str = key(
        "constant_with_warmup", "Learning-rate schedule, by its transformers name.", choices=SCHEDULERS
    )


@dataclass(slots=True, kw_only=True)
class CriticOptimizerConfig(OptimizerConfig):
    """AdamW for the critic."""

    lr: float = key(5e-6, "Learning rate.", above=0)


@dataclass(slots=True, kw_only=True)
class FSDPConfig:
    """How a model is sharded over GPUs."""

    cpu_offload: bool = key(
        False, "Keep shards and optimizer in the CPU's memory, and step there. On a CPU they are there already."
    )
    reshard_after_forward: bool = key(True, "Free a layer's gathered parameters after its forward pass.")
    fsdp_size: int = key(
        -1, "Workers in one group of shards; -1: all. Below the number of workers, shards are held several times.",
        minimum=-1,
    )  # fmt: skip
    whole_gradients: bool | None = key(
        None, "Over the micro-batches of an update, add up whole gradients in float32, and reduce them to shards once; "
        "false: after each micro-batch. null: where they take at most a twentieth of a GPU's memory.", was=False,
        why="two workers exchange half as many bytes for two micro-batches",
    )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class PolicyConfig:
    """The model that is trained."""

    model: PolicyModelConfig = section(PolicyModelConfig)
    optimizer_config: OptimizerConfig = section(OptimizerConfig)
    fsdp_config: FSDPConfig = section(FSDPConfig)
    sequence_parallel_size: int = key(1, "Workers that split each sequence.", minimum=1)
    use_torch_compile: bool | None = key(
        None, "Compile the layers and the work on logits with torch.compile; null: on a GPU. The first "
        "passes then take a minute.", was=False, why="on a GPU it saves about a third of an update",
    )  # fmt: skip
    record_memory: bool = key(False, "Record a CUDA memory snapshot.", capability="memory snapshots")
    model_config_kwargs: dict[str, Any] = key({}, "Overrides of the model's own config, by its field names.")
    megatron_config: MegatronConfig = section(
        MegatronConfig, capability="Megatron", instead="Use trainer.strategy=fsdp2."
    )


@dataclass(slots=True, kw_only=True)
class RefConfig:
    """The reference model."""

    model: RefModelConfig = section(RefModelConfig)
    sequence_parallel_size: int = key(1, "Workers that split each sequence.", minimum=1)
    fsdp_config: FSDPConfig = section(FSDPConfig)
    model_config_kwargs: dict[str, Any] = key({}, "Overrides of the model's own config, by its field names.")
    megatron_config: MegatronRefConfig = section(
        MegatronRefConfig, capability="Megatron", instead="Use trainer.strategy=fsdp2."
    )


@dataclass(slots=True, kw_only=True)
class CriticConfig:
    """The critic: a model with a value head, trained beside the policy where ``model.path`` is set."""

    model: CriticModelConfig = section(CriticModelConfig)
    optimizer_config: CriticOptimizerConfig = section(CriticOptimizerConfig)
    fsdp_config: FSDPConfig = section(FSDPConfig)
    sequence_parallel_size: int = key(1, "Workers that split each sequence.", minimum=1)
    model_config_kwargs: dict[str, Any] = key({}, "Overrides of the model's own config, by its field names.")
