"""The loop. It reads top to bottom: generate, score, credit, update, sync."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from skyrl_train.algorithms.credit import assign_credit
from skyrl_train.algorithms.kl_control import KLController
from skyrl_train.algorithms.table import resolve
from skyrl_train.batch import TrainBatch, collate
from skyrl_train.checkpoints import Checkpoints
from skyrl_train.doors import Doors
from skyrl_train.evaluator import Evaluator
from skyrl_train.generator.generator import fate_metrics, rollout_metrics
from skyrl_train.invariants import Invariants, mismatch_metrics
from skyrl_train.learner.policy import Critic, Policy, Scorer
from skyrl_train.prompts import PromptSource
from skyrl_train.rounds import Generated, Rounds
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.tracker import Tracker
from skyrl_train.types import Prompt

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config


@dataclass(slots=True, kw_only=True)
class Trainer:
    """Everything one run needs, put together by ``build.py``."""

    config: Config
    prompts: PromptSource
    rounds: Rounds
    policy: Policy
    reference: Scorer | None
    critic: Critic | None
    kl_controller: KLController
    doors: Doors
    evaluator: Evaluator
    checkpoints: Checkpoints
    invariants: Invariants
    tracker: Tracker
    folder: RunFolder
    pad_token_id: int
    engine_logprobs_are_old: bool
    """``old_logprobs`` are the engine's, for they are known to be the learner's too."""
    changed_distribution: bool
    """Engines draw from another distribution than the one whose log-probs they report."""
    reference_is_start: bool
    """The reference was loaded from the folder that the policy started from."""
    checked: bool = False
    """Whether this process has compared the engine's log-probs with the learner's."""

    async def train(self) -> None:
        """Runs every step that is left."""
        await self.begin()
        for step, prompts in self.prompts.steps():
            with self.tracker.step(step) as log:
                sampled = await self.generate(step, prompts)
                log(fate_metrics(sampled.started) | rollout_metrics(sampled.learned) | sampled.metrics)

                await self.doors.enter_training()
                batch = collate(sampled.learned, self.pad_token_id)
                log(await self.score(batch, step))
                log(self.credit(batch, step))
                log(await self.update(batch, step))
                with self.tracker.phase("checkpoint"):
                    await self.checkpoints.save_if_due(step, self.tracker.metrics)

                log(await self.doors.enter_generation())
                log(await self.evaluator.run_if_due(step))
                self.folder.write_memory(await self.memory())
        await self.checkpoints.finish()

    async def memory(self) -> dict[str, list[dict[str, dict[str, float]]]]:
        """Peaks of memory of each model's workers, by phase: predicted and measured."""
        models = {"policy": self.policy, "ref": self.reference, "critic": self.critic}
        return {name: await model.workers.all("memory") for name, model in models.items() if model}

    async def begin(self) -> None:
        """Evaluates before the first step; on resume, ends a step that was killed after its checkpoint."""
        step, synced = self.prompts.step, await self.doors.enter_generation()
        if step == 0 and self.config.trainer.eval_before_train and self.evaluator.due(0):
            with self.tracker.step(0) as log:
                log(await self.evaluator.run(0))
        elif step and self.folder.was_cut(step):
            with self.tracker.step(step) as log:
                log(self.checkpoints.metrics | synced)
                log(await self.evaluator.run_if_due(step))

    async def generate(self, step: int, prompts: list[Prompt]) -> Generated:
        """One step's trajectories, written to the run folder whatever their fate."""
        with self.tracker.phase("generate") as phase:
            sampled = await self.rounds.generate(step, prompts)
            phase.tokens = sum(t.sampled for t in sampled.started)
        if self.config.trainer.dump_trajectories:
            self.folder.write_trajectories(step, sampled.started)
        return sampled

    async def score(self, batch: TrainBatch, step: int) -> dict[str, float]:
        """Sets what the models say of the batch, and checks that engine, learner and reference agree."""
        metrics = await self.score_policy(batch, step)
        if self.critic:
            with self.tracker.phase("values"):
                batch.values = await self.critic.values(batch)
        if self.reference:
            with self.tracker.phase("ref_logprobs"):
                batch.ref_logprobs = await self.reference.logprobs(batch)
            self.invariants.reference_is_finite(batch, step)
            if self.reference_is_start and self.doors.version == 0:
                self.invariants.reference_is_policy(batch, step)
        return metrics

    async def score_policy(self, batch: TrainBatch, step: int) -> dict[str, float]:
        """Sets ``old_logprobs``, and compares the engine's log-probs with the learner's.

        Engines report log-probs before top-p and the like. Where they draw from a changed distribution, what they
        report is compared with the learner's of the same, and both move to the distribution that was drawn from.
        """
        first, self.checked = not self.checked, True
        batch.old_logprobs = batch.rollout_logprobs
        if not first and self.engine_logprobs_are_old:
            return {}
        with self.tracker.phase("old_logprobs"):
            if self.changed_distribution:
                learner, plain = await self.policy.both_logprobs(batch)
            else:
                learner = plain = await self.policy.logprobs(batch)
        if self.doors.staleness == 0:  # else the engine sampled from an older policy, and differs as it should
            self.invariants.engine_agrees(batch, plain, step)
        metrics = mismatch_metrics(plain, batch)
        if not self.engine_logprobs_are_old:
            batch.rollout_logprobs = batch.rollout_logprobs + (learner - plain)
            batch.old_logprobs = learner
        return metrics

    def credit(self, batch: TrainBatch, step: int) -> dict[str, float]:
        """Sets advantages, returns and the off-policy correction, and keeps the finished batch if asked to."""
        algorithm = self.config.trainer.algorithm
        metrics = assign_credit(batch, algorithm, self.kl_controller.value)
        if algorithm.off_policy_correction.active:
            correct = resolve("off_policy_correction", algorithm.off_policy_correction.function)
            result = correct(batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask, algorithm)
            batch.correction = result.weights
            metrics |= {f"correction/{name}": value.item() for name, value in result.metrics.items()}
        if self.config.trainer.dump_data_batch:
            batch.write(self.folder.path / "batches" / f"step_{step:06d}.safetensors")
        return metrics

    async def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
        """The policy and the critic learn from the batch."""
        coef = self.kl_controller.value
        with self.tracker.phase("update") as phase:
            metrics = await self.policy.update(batch, coef)
            phase.tokens = int(batch.response_mask.sum())
        if self.doors.staleness == 0:
            self.invariants.ratio_is_one(metrics, step)
        if self.critic:
            with self.tracker.phase("update_critic"):
                metrics |= await self.critic.update(batch)
        kl = metrics.get("policy/kl_loss", self.tracker.metrics.get("kl/reward_mean"))
        if kl is not None:
            self.kl_controller.update(kl, len(batch))
            metrics["kl/coef"] = coef
        self.doors.learned()
        return metrics
