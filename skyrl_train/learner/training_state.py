"""What a trained model's next update depends on, written to a folder and taken back, by one worker or by many.

<folder>/.metadata, __<rank>_0.distcp    weights that are trained, the optimizer's moments, random states
<folder>/state.json                      where the schedule is, the guard's counts, the adapter; written last
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from skyrl_train.errors import CheckpointError
from skyrl_train.learner import shard_files
from skyrl_train.learner.optim import go_to
from skyrl_train.learner.ranks import Ranks
from skyrl_train.learner.updater import Updater
from skyrl_train.models.sharding import on_the_host
from skyrl_train.runtime.background import in_background
from skyrl_train.storage.paths import read_text, write_text

FACTS = "state.json"


class TrainingState:
    """Saves and restores one model.

    Args:
        updater: of the model: its module, optimizer, schedule and guard.
        source: which model this is, for messages.
        facts: what must be equal for a checkpoint to fit, such as the adapter; by name.
        advice: what to do where they are not.
    """

    def __init__(self, updater: Updater, source: str, facts: Mapping[str, Any] | None = None, advice: str = "") -> None:
        self.updater, self.source, self.facts, self.advice = updater, source, dict(facts or {}), advice
        self.ranks: Ranks = updater.ranks
        self._writing: Future[None] | None = None

    def save(self, folder: str, *, background: bool = False) -> None:
        """Writes everything into ``folder``. Every worker calls it.

        Args:
            folder: a path, or an address that fsspec knows.
            background: returns when a copy is made; ``wait`` then says whether it was written.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        self.wait()
        away = self.updater.moments.away
        self.updater.moments.back()
        tensors = self._model() | self._moments() | self._random()
        guard = self.updater.guard
        facts = {
            "scheduled": self.updater.scheduler.last_epoch, "guard": [guard.in_a_row, guard.total],
            "facts": self.facts,
        }  # fmt: skip
        if not background:
            self._write(folder, tensors, facts)
        else:
            copies = {name: on_the_host(tensor) for name, tensor in tensors.items()}
            self._writing = in_background("checkpoint", self._write, folder, copies, facts)
        if away:
            self.updater.make_room()

    def wait(self) -> None:
        """Returns when what was written in the background is on the disk. Raises what went wrong there."""
        writing = self.take_writing()
        if writing is not None:
            writing.result()

    def take_writing(self) -> Future[None] | None:
        """The save that runs in the background: whoever takes it waits for it."""
        writing, self._writing = self._writing, None
        return writing

    def restore(self, folder: str) -> None:
        """Takes back what ``save`` wrote, on as many workers as there are now. Every worker calls it.

        Learning rate, betas and decay are the config's: they may have changed.

        Raises:
            CheckpointError: files are absent, unreadable, or of another model.
        """
        self.wait()
        try:
            facts = json.loads(read_text(folder, FACTS))
            guard, scheduled, held = facts["guard"], int(facts["scheduled"]), facts["facts"]
            sizes = shard_files.sizes(folder)
        except FileNotFoundError as error:
            raise CheckpointError(f"{error.filename or folder} is missing: the checkpoint is not whole.") from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, UnpicklingError) as error:
            raise CheckpointError(f"{folder} cannot be read: the checkpoint is not whole ({_brief(error)}).") from error
        self._require_fit(folder, held, sizes)
        moments = self._empty_moments(sizes)
        random = self._random(self.ranks.rank if f"rng.{self.ranks.rank}.cpu" in sizes else 0)
        random = {name: state for name, state in random.items() if name in sizes or name == "rng.0.cpu"}
        tensors, alone = self._model() | _flat(moments) | random, self.ranks.size == 1
        try:
            shard_files.read(folder, tensors, group=self.ranks.saving_group, alone=alone)
        except (OSError, ValueError, LookupError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{folder} cannot be read: the checkpoint is not whole ({_brief(error)}).") from error
        self._take(moments, guard, scheduled)
        for name, state in random.items():
            torch.set_rng_state(state) if name.endswith("cpu") else torch.cuda.set_rng_state(state, self.ranks.device)

    def _take(self, moments: dict[str, dict[str, Tensor]], guard: list[int], scheduled: int) -> None:
        updater = self.updater
        updater.optimizer.state.clear()
        for name, parameter in self._trained().items():
            if name in moments:
                updater.optimizer.state[parameter] = moments[name]
        updater.guard.in_a_row, updater.guard.total = guard
        go_to(updater.scheduler, scheduled)

    def _write(self, folder: str, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        group = self.ranks.saving_group
        shard_files.write(folder, tensors, group=group, alone=self.ranks.size == 1)
        if self.ranks.rank == 0:
            write_text(folder, FACTS, json.dumps(facts, indent=1, sort_keys=True) + "\n")
        self.ranks.barrier(group)

    def _random(self, rank: int | None = None) -> dict[str, Tensor]:
        """The random states of this worker, under the name of a rank. Workers that were not there take rank 0's."""
        rank = self.ranks.rank if rank is None else rank
        states = {f"rng.{rank}.cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            states[f"rng.{rank}.cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        return states

    def _trained(self) -> dict[str, nn.Parameter]:
        """Each once, by its first name."""
        return {name: p for name, p in self.updater.model.named_parameters() if p.requires_grad}

    def _model(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model, sharing its memory: all, or where some is frozen what is trained."""
        module = self.updater.model
        found: dict[str, Tensor] = {name: p.detach() for name, p in self._trained().items()}
        if all(p.requires_grad for p in module.parameters()):
            names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
            found |= {name: value for name, value in module.state_dict().items() if name not in names}  # buffers
        return {f"model.{name}": value for name, value in found.items()}

    def _moments(self) -> dict[str, Tensor]:
        state = self.updater.optimizer.state
        return _flat({name: state[p] for name, p in self._trained().items() if p in state})

    def _empty_moments(self, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, Tensor]]:
        """Tensors for the optimizer's state in the checkpoint, laid out as the parameters are here."""
        made: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._trained().items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                size = sizes.get(f"optimizer.{name}.{key}")
                if size is not None:
                    scalar = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    made.setdefault(name, {})[key] = scalar if size == () else torch.zeros_like(parameter.detach())
        return made

    def _require_fit(self, folder: str, held: Mapping[str, Any], sizes: Mapping[str, tuple[int, ...]]) -> None:
        if held != self.facts:
            raise CheckpointError(
                f"{folder} was written with {_shown(held)}, and this run has {_shown(self.facts)}. {self.advice}"
            )
        here = {name: tuple(tensor.shape) for name, tensor in self._model().items()}
        there = {name: size for name, size in sizes.items() if name.startswith("model.")}
        unlike = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        if unlike:
            first = unlike[0]
            shapes = f"{there.get(first, 'absent')} there, {here.get(first, 'absent')} here"
            raise CheckpointError(
                f"{folder} does not fit the model {self.source}: {len(unlike)} tensors differ, such as "
                f"{first.removeprefix('model.')} ({shapes})."
            )


def _flat(moments: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"optimizer.{name}.{key}": value for name, held in moments.items() for key, value in held.items()}


def _shown(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items()) or "nothing of the kind"


def _brief(error: BaseException) -> str:
    """The first lines of what torch says, which can be pages."""
    return "; ".join(line.strip() for line in str(error).strip().splitlines()[:3])[:300] or type(error).__name__
