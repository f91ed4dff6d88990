"""A model in one process, alone or as one of several that share its shards.

Plain classes: where they live (this process, a Ray actor) is the runtime's business. Every method here runs on the one
compute thread of its process.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from skyrl_train.batch import TrainBatch
from skyrl_train.config.environ import read_environment
from skyrl_train.errors import ConfigError
from skyrl_train.learner.memory import MemoryLog, Shapes
from skyrl_train.learner.ranks import Ranks
from skyrl_train.learner.shares import deal, micro_batches, token_counts
from skyrl_train.models.compiled import compile_layers
from skyrl_train.models.loading import checkpoint_dtype, load_model, supports_packing
from skyrl_train.models.offload import Offload, parameters_of
from skyrl_train.models.recompute import recompute_activations
from skyrl_train.models.sampled import SampledDistribution
from skyrl_train.models.sequence_parallel import SequenceSplit
from skyrl_train.models.sharding import is_on_cpu, reshard, shard
from skyrl_train.runtime.place import Place

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config

log = logging.getLogger("skyrl.learner")

SHARD_ALONE = False
"""Shard over one CPU too, which gains nothing there; tests then see what one GPU does."""


class ModelWorker:
    """A model on its device, ready for forward passes; alone, or sharded over several workers.

    Args:
        config: the run's config.
        role: "policy", "ref" or "critic", the section of ``trainer`` that describes the model.
        place: which of the role's workers this is.
        plain: the model stays whole: something else in this process (an embedded engine) uses its parameters.

    Raises:
        ConfigError: sizes in the config that do not fit the number of workers, or the model.
        WorkerError: the other workers did not answer in time.
    """

    def __init__(self, config: Config, role: str, place: Place | None = None, *, plain: bool = False) -> None:
        self.config, self.role, self.place = config, role, place or Place()
        self.section = getattr(config.trainer, role)
        self.device = _device(config.trainer.device, self.place.device_index)
        _make_repeatable(config.trainer.seed, _threads(config, self.place), self.device)
        bf16 = self.device.type == "cuda" if config.trainer.bf16 is None else config.trainer.bf16
        self.autocast_dtype = torch.bfloat16 if bf16 else None
        self.ranks = Ranks(
            self.place, self.device, timeout=collective_timeout(config),
            saving_timeout=config.trainer.ckpt_timeout, fsdp_size=self.section.fsdp_config.fsdp_size,
            sequence_parallel=self.section.sequence_parallel_size, key=f"trainer.{role}",
        )  # fmt: skip
        self.sharded = not plain and (self.ranks.size > 1 or self.device.type == "cuda" or SHARD_ALONE)
        self.model = load_model(
            self.section.model.path,
            dtype=torch.bfloat16 if self.sharded and bf16 and self._frozen else torch.float32,
            device=torch.device("cpu") if self.sharded else self.device,
            config_kwargs=dict(self.section.model_config_kwargs),
            rope_scaling=config.trainer.rope_scaling,
            rope_theta=config.trainer.rope_theta,
        )
        self.model.eval()
        self.packed = config.trainer.use_sample_packing and supports_packing(self.model)
        self.split = self._split()
        self.temperature = config.generator.sampling_params.temperature
        self.sampled = SampledDistribution.of(config)
        self.module = self._assemble()
        """What runs, and is sharded: the model, or what a subclass makes of it."""
        self._host = Offload()
        self.memory_log = MemoryLog(self.device)
        self.compiled = self._compiles()
        if self.compiled:
            compile_layers(self.model)
        if role != "ref":
            self.recompute()  # of what is compiled
        if self.sharded:
            shard(self.module, self.ranks.mesh, self.section.fsdp_config, self.autocast_dtype)

    def _split(self) -> SequenceSplit | None:
        """The workers that have this one's rows together with it, by all-to-all; None: it has them alone."""
        parts, key = self.ranks.sequence_parallel, f"trainer.{self.role}.sequence_parallel_size"
        if parts == 1:
            return None
        heads = self.model.config.get_text_config().num_attention_heads
        if heads % parts:
            fits = ", ".join(str(n) for n in range(1, heads + 1) if not heads % n and not self.ranks.size % n)
            raise ConfigError(key, parts, f"does not divide the {heads} attention heads.", f"Set it to one of {fits}.")
        if not self.packed:
            raise ConfigError(
                key, parts, f"needs packed sequences, and {type(self.model).__name__} runs padded here.",
                "Set it to 1, or trainer.use_sample_packing=true.",
            )  # fmt: skip
        return SequenceSplit(self.ranks.sequence_group, self.ranks.part, parts)

    def _compiles(self) -> bool:
        """Whether ``torch.compile`` is used: for all models as for the policy."""
        chosen = self.config.trainer.policy.use_torch_compile
        return self.sharded and self.device.type == "cuda" if chosen is None else chosen

    @property
    def _frozen(self) -> bool:
        """Whether the loaded weights never change, so that they need no more than the format computed in."""
        return self.role == "ref" or (self.role == "policy" and self.section.model.lora.rank > 0)

    def _assemble(self) -> torch.nn.Module:
        return self.model

    def describe(self) -> dict[str, Any]:
        """Facts about the model for the log and for preflight checks of later stages."""
        return {
            "role": self.role,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": str(self.device),
            "dtype": "bfloat16" if self.autocast_dtype else "float32",
            "checkpoint_dtype": checkpoint_dtype(getattr(self.config.trainer, self.role).model.path),
            "packed": self.packed,
            "vocabulary": self.model.config.get_text_config().vocab_size,
            "workers": self.ranks.size,
            "sharded": self.sharded,
        }

    def precision(self) -> AbstractContextManager[object]:
        """The context of every forward pass. A sharded model gathers its parameters in the format computed in."""
        if self.autocast_dtype is None or self.sharded:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed in the backward pass; by default, on a GPU."""
        chosen = self.config.trainer.gradient_checkpointing
        return self.device.type == "cuda" if chosen is None else chosen

    def recompute(self) -> None:
        """Turns gradient checkpointing on where the config asks for it; by default, on a GPU."""
        trainer = self.config.trainer
        if self.recomputes:
            recompute_activations(
                self.model, mode=trainer.gradient_checkpointing_mode,
                use_reentrant=trainer.gradient_checkpointing_use_reentrant,
            )  # fmt: skip

    @torch.no_grad()
    def in_micro_batches(self, batch: TrainBatch, forward: Callable[[TrainBatch], Tensor]) -> Tensor:
        """``forward`` of every row, float32 on the CPU; it returns a tensor with one entry for each row it got.

        Workers may have different rows, but all call it: where one has fewer micro-batches it computes a row again.
        """
        trainer = self.config.trainer
        runs = micro_batches(
            batch, torch.arange(len(batch)), sequences=trainer.micro_forward_batch_size_per_gpu,
            tokens=trainer.max_tokens_per_microbatch,
        )  # fmt: skip
        (most,) = self.ranks.max([float(len(runs))])
        again = [torch.zeros(1, dtype=torch.long)] * (int(most) - len(runs))
        parts = []
        largest = max((int(token_counts(batch)[run].sum()) for run in runs), default=0)
        with self.memory_log.phase("scoring", self.shapes().scoring(largest // self.ranks.sequence_parallel)):
            for rows in (*runs, *again):
                with self.precision():
                    parts.append(forward(batch.select(rows).to(self.device)).float())
        reshard(self.module)
        return torch.cat(parts[: len(runs)]).cpu()

    def in_shares(self, batch: TrainBatch, compute: Callable[[TrainBatch], Tensor]) -> Tensor:
        """``compute`` of a batch that every worker has, each worker doing a share; the whole on every worker."""
        mine = self._share(batch, torch.arange(len(batch)))
        rows = mine if len(mine) else torch.zeros(1, dtype=torch.long)
        found = compute(batch.select(rows))
        return self.ranks.gather(mine, len(batch), found[: len(mine)])

    def _share(self, batch: TrainBatch, rows: Tensor) -> Tensor:
        """This worker's among the given rows."""
        return deal(batch, rows, self.ranks.data_size)[self.ranks.data_rank]

    def offload(self) -> int:
        """Moves the model to the host; bytes moved. Nothing computes with it until ``onload``."""
        if self.device.type != "cuda" or is_on_cpu(self.module):
            return 0
        reshard(self.module)
        moved = self._host.out(parameters_of(self.module))
        torch.cuda.empty_cache()  # what is free inside PyTorch is not free for an engine
        return moved

    def onload(self) -> int:
        """Brings the model back; bytes moved."""
        return self._host.back()

    def make_room(self) -> int:
        """Moves to the host what a weight sync does not need: of the policy the optimizer, of others everything."""
        return self.offload()

    def memory(self) -> dict[str, dict[str, float]]:
        """Peaks of memory by phase, predicted and measured."""
        return self.memory_log.phases

    def shapes(self) -> Shapes:
        """For predictions of memory."""
        text = self.model.config.get_text_config()
        return Shapes.of(self.module, text, sharded=self.sharded, half=self.autocast_dtype is not None)

    def close(self) -> None:
        """Leaves the other workers."""
        self.ranks.close()


def collective_timeout(config: Config) -> float:
    """Seconds: ``trainer.collective_timeout``, or ``NCCL_TIMEOUT``, or ten minutes."""
    return config.trainer.collective_timeout or read_environment().nccl_timeout or 600.0


def _threads(config: Config, place: Place) -> int:
    """CPU threads of torch: this process's share of the cores, as workers of a CPU run side by side."""
    return config.trainer.num_threads or max(1, len(os.sched_getaffinity(0)) // place.size)


def _device(name: str, index: int) -> torch.device:
    """A GPU becomes this thread's current one, for libraries that ask for no device."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _make_repeatable(seed: int, threads: int, device: torch.device) -> None:
    """Same seed, same thread count: same numbers, in this process and in a Ray actor alike.

    On a CPU, gradients that several threads add to one place would otherwise be added in the order of their arrival;
    adding them in order costs no time here. CUDA's own deterministic mode does, so there it is left to the user.
    """
    torch.set_num_threads(threads)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        # Filling new memory serves to find bugs and costs some per cent.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
