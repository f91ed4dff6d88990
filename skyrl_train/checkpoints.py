"""Checkpoints: everything that the steps to come depend on, saved whole, and taken back.

    <ckpt_path>/global_step_12/policy/...        what the workers wrote; beside it critic/..., where there is one
    <ckpt_path>/global_step_12/trainer.json      step, sampler, KL coefficient, metrics of the step, what run this is
    <ckpt_path>/latest_ckpt_global_step.txt      12

How a killed save never counts, on a disk and elsewhere: ``storage/step_folders.py``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from skyrl_train.errors import CheckpointError, SkyRLError
from skyrl_train.runtime.background import beside
from skyrl_train.storage.paths import is_remote, read_text
from skyrl_train.storage.step_folders import FACTS, step_folders

if TYPE_CHECKING:
    from skyrl_train.data.sampler import PromptSampler
    from skyrl_train.learner.policy import Critic, Policy

log = logging.getLogger("skyrl.checkpoints")


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """When to save. Not positive: never."""

    checkpoint: int
    export: int
    total_steps: int

    def due(self, step: int, interval: int) -> bool:
        """Every ``interval`` steps, and after the last step."""
        return interval > 0 and (step % interval == 0 or step == self.total_steps)


class Stateful(Protocol):
    """What the driver remembers from step to step: a few numbers that JSON can hold."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """Saves and restores the run.

    Args:
        folder: ``trainer.ckpt_path``.
        exports: ``trainer.export_path``: Hugging Face folders go to ``global_step_N/policy`` below it.
        keep: how many to keep (``trainer.max_ckpts_to_keep``); negative keeps all.
        identity: what must be equal for a checkpoint to belong to this run (model, batch sizes, seed, data).
        critic: saved beside the policy, where there is one.
        memory: by name. What a checkpoint does not hold stays as it is.
        background: workers write while they go on.
        timeout: seconds that writing one may take (``trainer.ckpt_timeout``).
    """

    def __init__(
        self,
        *,
        folder: Path | str,
        exports: Path | str,
        keep: int,
        intervals: Intervals,
        identity: dict[str, Any],
        policy: Policy,
        sampler: PromptSampler,
        critic: Critic | None = None,
        memory: Mapping[str, Stateful] | None = None,
        background: bool = False,
        timeout: float = 3600.0,
    ) -> None:
        self.folders, self.exports = step_folders(str(folder)), str(exports)
        self.keep, self.intervals, self.timeout = keep, intervals, timeout
        self.identity, self.policy, self.sampler = identity, policy, sampler
        self.critic, self.memory, self.background = critic, dict(memory or {}), background
        self._completing: tuple[int, asyncio.Task[None]] | None = None
        self.metrics: dict[str, float] = {}
        """Those of the restored step, as far as they were known when it was saved."""

    async def save_if_due(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Writes an export, a checkpoint, or both, if this step calls for them.

        The checkpoint comes last: whoever resumes from it will not do this step's export.

        Raises:
            CheckpointError: as ``save``; also of an earlier save that went wrong in the background since.
        """
        if self._completing is not None and self._completing[1].done():
            await self.finish()
        if self.intervals.due(step, self.intervals.export):
            await self.policy.export(f"{self.exports}/global_step_{step}/policy")
        if self.intervals.due(step, self.intervals.checkpoint):
            await self.save(step, metrics)

    async def save(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Writes the checkpoint of ``step``, then forgets the oldest ones.

        In the background it returns when the workers have made their copies; ``finish`` waits for the rest.

        Args:
            metrics: of the step so far. If the run is killed before it has logged them, the resumed one does.

        Raises:
            CheckpointError: the disk is full, the folder cannot be written, or writing took longer than ``timeout``;
                this one or the one before it. Earlier checkpoints are untouched.
        """
        await self.finish()
        state = {"step": step, "prompts": self.sampler.state_dict(), "identity": self.identity}
        state["memory"] = {name: part.state_dict() for name, part in self.memory.items()}
        state["metrics"] = dict(metrics or {})
        async with self._told(step):
            partial = await self._beside(self.folders.begin, step)
            for name, model in self._models.items():
                await model.save(f"{partial}/{name}")
        completing = asyncio.create_task(self._complete(step, json.dumps(state, indent=1)))
        self._completing = step, completing
        if not self.background:
            await self.finish()

    async def finish(self) -> None:
        """Returns when no checkpoint is being written any more. Raises as ``save``."""
        if self._completing is not None:
            (step, completing), self._completing = self._completing, None
            async with self._told(step):
                await completing

    async def close(self) -> None:
        """As ``finish``, when the run has ended with another error, which says more than one of this."""
        try:
            await self.finish()
        except SkyRLError as error:
            log.warning("%s", error)

    @property
    def _models(self) -> dict[str, Policy | Critic]:
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic else {})

    async def _complete(self, step: int, facts: str) -> None:
        """When the workers have written what they have to, the checkpoint takes its place."""
        began = time.monotonic()
        for model in self._models.values():
            await model.saved()
        await self._beside(self.folders.commit, step, facts, self._models)
        await self._beside(self._forget, step)
        log.info("checkpoint of step %d: %s, %.1f s", step, self.folders.path(step), time.monotonic() - began)

    async def _beside(self, function: Any, *args: Any) -> Any:
        """Calls what waits for the disk, while the event loop goes on."""
        return await beside("checkpoint", function, *args)

    @asynccontextmanager
    async def _told(self, step: int) -> AsyncIterator[None]:
        """Within the deadline, and with an error that says what was being done."""
        what = f"the checkpoint of step {step} cannot be written to {self.folders.path(step)}"
        within = asyncio.timeout(self.timeout)
        try:
            async with within:
                yield
        except (OSError, RuntimeError) as error:  # the latter of a worker that waited for another's disk
            if within.expired():
                raise CheckpointError(
                    f"{what}: it was not there after {self.timeout:g} s (trainer.ckpt_timeout). Look at the disk or "
                    "the network behind trainer.ckpt_path, or allow more."
                ) from error
            raise CheckpointError(f"{what}: {error}.") from error

    async def restore(self, mode: str, path: str | None) -> int:
        """Goes back to a checkpoint, as ``trainer.resume_mode`` says; returns its step, 0 when starting anew.

        Raises:
            CheckpointError: it is not whole, not there (``from_path``), or of another run.
        """
        if mode == "none":
            return 0
        if mode == "latest":
            await self._beside(self.folders.repair)
            folder = await self._beside(self._latest)
        else:
            folder = path or ""
            folder = folder if is_remote(folder) else str(Path(folder).expanduser())
        if folder is None:
            return 0
        state = await self._beside(self._read, folder)
        self._check_identity(folder, state["identity"])
        self.sampler.load_state_dict(state["prompts"])  # before the weights: it is the quicker one to refuse
        for name, model in self._models.items():
            await model.restore(f"{folder}/{name}")
        for name, part in self.memory.items():
            if name in state.get("memory", {}):
                part.load_state_dict(state["memory"][name])
        self.metrics = state.get("metrics", {})
        log.info("resumed from %s, step %d", folder, state["step"])
        return state["step"]

    def _latest(self) -> str | None:
        """Where the pointer points: a run that went back to an older step has left newer ones behind.

        A pointer to nothing, or none (a kill, a hand-made copy), gives way to the highest step there.
        """
        steps, pointed = self.folders.steps(), self.folders.pointed()
        return self.folders.path(pointed if pointed in steps else steps[-1]) if steps else None

    def _read(self, folder: str) -> dict[str, Any]:
        state: dict[str, Any] = {}
        try:
            state = json.loads(read_text(folder, FACTS))
            whole = [type(state[name]) for name in ("step", "prompts", "identity")] == [int, dict, dict]
            reason = "trainer.json is not what a save writes"
        except (OSError, ValueError, KeyError, TypeError) as error:
            whole, reason = False, f"trainer.json: {error}"
        if not whole:
            others = ", ".join(p for p in map(self.folders.path, self.folders.steps()) if p != folder)
            raise CheckpointError(
                f"{folder} is no whole checkpoint ({reason}). Set trainer.resume_mode=from_path and "
                f"trainer.resume_path to a folder global_step_N{f' ({others})' if others else ''}, or "
                "trainer.resume_mode=none to start anew."
            )
        return state

    def _check_identity(self, folder: str, saved: dict[str, Any]) -> None:
        differ = [
            f"{key}: {saved.get(key)!r} there, {now!r} here"
            for key, now in self.identity.items()
            if saved.get(key) != now
        ]
        if differ:
            raise CheckpointError(
                f"{folder} was written by another run ({'; '.join(differ)}). Give this run its own trainer.ckpt_path, "
                "or set trainer.resume_mode=none to start anew."
            )

    def _forget(self, newest: int) -> None:
        """Keeps the last ``keep``. Steps beyond the newest go first: this run went back from there."""
        if self.keep < 0:
            return
        for step in sorted(self.folders.steps(), key=lambda step: (step <= newest, step))[: -self.keep or None]:
            self.folders.remove(step)
