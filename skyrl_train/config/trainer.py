"""The section ``trainer``: the loop, the learner, checkpoints and what is logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.fields import key, section
from skyrl_train.config.models import CriticConfig, PolicyConfig, RefConfig

__all__ = ["AlgorithmConfig", "FullyAsyncConfig", "InvariantsConfig", "PlacementConfig", "TrainerConfig"]
RUN_NAME = "${trainer.project_name}/${trainer.run_name}"


@dataclass(slots=True, kw_only=True)
class PlacementConfig:
    """Who sits where."""

    runtime: str = key(
        "auto", "Workers on this machine, or Ray actors; auto: Ray where RAY_ADDRESS names a cluster or a model has "
        "several nodes.",
        choices=("auto", "local", "ray"),
    )  # fmt: skip
    worker_start_timeout: float = key(
        300.0, "Time that a worker's process has to start, on the resources that it was given.", above=0, unit="seconds"
    )
    colocate_all: bool = key(
        True, "Engines that we start share the learner's GPUs, and sleep while it learns.", backends=("sglang", "vllm"),
        instead="Remove the key: the embedded engine is the learner.",
    )  # fmt: skip
    colocate_policy_ref: bool = key(True, "Policy and reference share GPUs.")
    colocate_policy_critic: bool = key(True, "Policy and critic share GPUs.")
    policy_num_nodes: int = key(1, "Nodes of the policy.", minimum=1)
    critic_num_nodes: int = key(1, "Nodes of the critic.", minimum=1)
    ref_num_nodes: int = key(1, "Nodes of the reference.", minimum=1)
    policy_num_gpus_per_node: int | None = key(
        None, "Workers of the policy on each node, one a GPU; without GPUs, as many processes. null: as many as the "
        "engines need that share its GPUs, at least 1.", minimum=1, was=4, why="one worker runs on every machine",
    )  # fmt: skip
    critic_num_gpus_per_node: int | None = key(
        None, "Workers of the critic on each node; null: as the policy.", minimum=1, was=4, why="as the policy"
    )
    ref_num_gpus_per_node: int | None = key(
        None, "Workers of the reference on each node; null: as the policy.", minimum=1, was=4, why="as the policy"
    )


@dataclass(slots=True, kw_only=True)
class FullyAsyncConfig:
    """Generating while training."""

    max_staleness_steps: int = key(4, "Steps by which a trajectory may be older than the policy.", minimum=0)
    num_parallel_generation_workers: int = key(768, "Groups generated at the same time.", minimum=1)


@dataclass(slots=True, kw_only=True)
class InvariantsConfig:
    """Numbers that must hold; a breach names its likely cause."""

    mode: str = key("stop", "What a breach does.", choices=("stop", "warn", "off"))
    logprob_gap: float = key(
        0.1, "Largest mean |learner - engine| of the log-probs of a step's sampled tokens.", above=0, unit="nats"
    )
    ratio_tolerance: float = key(0.02, "Largest mean |ratio - 1| before the first update.", above=0)
    kl_tolerance: float = key(0.001, "Largest KL to the reference before the first update.", above=0, unit="nats")


@dataclass(slots=True, kw_only=True)
class TrainerConfig:
    """The loop and the learner."""

    device: str = key("auto", "Where the models live; auto: a GPU where there is one.", choices=("auto", "cpu", "cuda"))
    num_threads: int | None = key(None, "CPU threads of torch in each worker; null: its share of the cores.", minimum=1)
    collective_timeout: float | None = key(
        None, "Time that workers of a model wait for each other in a collective (NCCL, gloo); null: NCCL_TIMEOUT, or "
        "600.", above=0, unit="seconds",
    )  # fmt: skip
    placement: PlacementConfig = section(PlacementConfig)
    sequence_parallel_backend: str = key("ulysses", "How a sequence is split over GPUs.", choices=("ulysses",))
    strategy: str = key(
        "fsdp2", "How a model is sharded; fsdp is another name of fsdp2.", choices=("fsdp2", "fsdp", "megatron"),
        capability="the strategy {value}", off=("fsdp2", "fsdp"), instead="Use trainer.strategy=fsdp2.",
    )  # fmt: skip
    policy: PolicyConfig = section(PolicyConfig)
    ref: RefConfig = section(RefConfig)
    critic: CriticConfig = section(CriticConfig)
    algorithm: AlgorithmConfig = section(AlgorithmConfig)
    fully_async: FullyAsyncConfig = section(FullyAsyncConfig, capability="fully asynchronous training")
    invariants: InvariantsConfig = section(InvariantsConfig)

    epochs: int = key(1, "Passes over the training data.", minimum=1)
    max_steps: int | None = key(None, "Stop after this many steps; null: after the epochs.", minimum=1)
    update_epochs_per_batch: int = key(1, "Passes of the learner over one step's batch.", minimum=1)
    train_batch_size: int = key(1024, "Prompts in one step.", minimum=1, unit="prompts")
    policy_mini_batch_size: int = key(256, "Prompts in one update of the policy.", minimum=1, unit="prompts")
    critic_mini_batch_size: int = key(256, "Prompts in one update of the critic.", minimum=1, unit="prompts")
    micro_train_batch_size_per_gpu: int | None = key(
        None, "Sequences in one forward-backward pass; null: as many as fit in 8,192 tokens and divide the update.",
        minimum=1, unit="sequences", was=1, why="one short sequence at a time wastes most of a GPU, and of a CPU",
    )  # fmt: skip
    micro_forward_batch_size_per_gpu: int | None = key(
        None, "Sequences in one forward pass; null: as many as fit in 16,384 tokens.", minimum=1, unit="sequences",
        was=1, why="as micro_train_batch_size_per_gpu",
    )  # fmt: skip
    max_tokens_per_microbatch: int | None = key(
        None, "Tokens in one pass, with and without gradient, in place of a number of sequences; a longer sequence has "
        "a pass of its own. null: count sequences.", minimum=1, unit="tokens",
    )  # fmt: skip
    weight_sync_interval: int = key(
        1, "Steps between two weight syncs; between them engines sample from an older policy.", minimum=1, unit="steps",
        backends=("sglang", "vllm"), instead="Remove the key: the embedded engine samples from the policy itself.",
    )  # fmt: skip
    use_sample_packing: bool = key(True, "Compute sequences in one row without padding.")
    update_ref_every_epoch: bool = key(
        False, "Copy the policy into the reference after each epoch.", capability="a reference that moves"
    )
    gradient_checkpointing: bool | None = key(
        None, "Recompute activations in the backward pass; null: on a GPU.", was=True,
        why="it trades time for memory, and on a CPU there is memory",
    )  # fmt: skip
    gradient_checkpointing_mode: str = key(
        "selective", "What is kept of a layer: its input (full), or also the output of its attention, which for packed "
        "sequences is then not computed twice.", choices=("full", "selective"),
    )  # fmt: skip
    gradient_checkpointing_use_reentrant: bool = key(
        False, "The older implementation of checkpointing; it knows the full mode alone."
    )
    bf16: bool | None = key(
        None, "Compute in bfloat16; null: on a GPU. Parameters and optimizer stay float32.", was=True,
        why="on most CPUs bfloat16 is slower than float32",
    )  # fmt: skip
    flash_attn: bool | None = key(
        None, "The flash-attn package; null: PyTorch's own kernels.",
        capability="attention through the flash-attn package",
        off=(None, False), instead="Leave it null: PyTorch's attention uses its flash kernel on a GPU.",
        was=True, why="PyTorch's own kernels need no further package",
    )  # fmt: skip
    rope_scaling: dict[str, Any] | None = key(None, "Rotary scaling put into the models' config.")
    rope_theta: float | None = key(None, "Rotary base put into the models' config.", above=0)
    disable_fast_tokenizer: bool = key(
        False, "Use a slow tokenizer.", capability="slow tokenizers",
        reason="transformers 5 loads fast tokenizers only", instead="Remove the key.",
    )  # fmt: skip
    max_prompt_length: int = key(512, "Longer prompts are dropped from the data and counted.", minimum=1, unit="tokens")
    max_skipped_updates: int = key(3, "Non-finite updates in a row that stop the run.", minimum=1)
    seed: int = key(42, "Seed of the data order, the sampling and the learner.", minimum=0)

    eval_batch_size: int = key(1024, "Prompts evaluated at the same time.", minimum=1, unit="prompts")
    eval_before_train: bool = key(True, "Evaluate before the first step.")
    eval_interval: int = key(5, "Steps between evaluations; -1: none.", minimum=-1, unit="steps")

    resume_mode: str = key(
        "latest", "Where to go on: not at all, at the newest checkpoint of ckpt_path, or at resume_path.",
        choices=("none", "latest", "from_path"),
    )  # fmt: skip
    resume_path: str | None = key(
        None, "Checkpoint folder, or address, to go on from.", path=True, switch=("trainer.resume_mode", "from_path")
    )
    ckpt_path: str = key(
        f"~/ckpts/{RUN_NAME}", "Folder of the checkpoints, or an address that fsspec knows (s3://...).", path=True,
        was="~/ckpts/",
        why="in a shared folder, resume_mode=latest would go on with another run's checkpoint",
    )  # fmt: skip
    ckpt_interval: int = key(10, "Steps between checkpoints; -1: none.", minimum=-1, unit="steps")
    ckpt_in_background: bool | None = key(
        None, "Write checkpoints while training goes on, from a copy in the CPU's memory; null: on a GPU."
    )
    ckpt_timeout: float = key(
        3600.0, "Time for writing one checkpoint, in the background too.", above=0, unit="seconds"
    )
    max_ckpts_to_keep: int = key(-1, "Older checkpoints are removed; -1: keep all.", minimum=-1)
    hf_save_interval: int = key(-1, "Steps between exports in Hugging Face format; -1: none.", minimum=-1, unit="steps")
    export_path: str = key(
        f"~/exports/{RUN_NAME}", "Folder of the exports, or an address.", path=True, was="~/exports/",
        why="as ckpt_path",
    )  # fmt: skip

    project_name: str = key("skyrl", "Project, for the loggers and the default folders.")
    run_name: str = key("test_run", "Run, for the loggers and the default folders.")
    logger: str | list[str] = key(
        "console", "Where metrics go: console, jsonl, tensorboard, wandb, or several as a list; a sink of your own as "
        "package.module:Class. Console and metrics.jsonl are always on.",
        choices=("console", "jsonl", "tensorboard", "wandb"), import_path=True,
        was="wandb", why="the first command must run without an account",
    )  # fmt: skip
    log_path: str | None = key(
        None, "Logs outside the run folder.", capability="logs outside the run folder", path=True,
        reason="each run writes its logs into its own run folder", instead="Use hydra.run.dir=FOLDER.",
        was="/tmp/skyrl-logs", why="each run has a folder of its own",
    )  # fmt: skip
    dump_trajectories: bool = key(True, "Write every trajectory into the run folder.")
    dump_data_batch: bool = key(False, "Write every training batch, as tensors, into the run folder.")
    dump_eval_results: bool = key(True, "Write the trajectories of evaluations into the run folder.")
