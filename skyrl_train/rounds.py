"""The trajectories of a step, in as many rounds of sampling as it takes (``trainer.algorithm.dynamic_sampling``).

A group of equal rewards is dead: whatever is compared within it, it has nothing to teach.

    none      one round, whatever comes
    filter    dead groups are left out, and further prompts sampled, until the train batch is full of live groups
              (DAPO, https://arxiv.org/abs/2503.14476, section 3.2)
    replace   dead groups give their place to copies of live ones; a round of too few live groups is thrown away and
              another one sampled (POLARIS, https://hkunlp.github.io/blog/2025/Polaris)

Every trajectory keeps a fate: what is left out is filtered, with the reason. The prompts that a step takes, and so its
samples, follow from the seed and the steps before alone.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from skyrl_train.errors import GenerationError
from skyrl_train.generator.generator import Generator
from skyrl_train.prompts import PromptSource
from skyrl_train.types import Outcome, Prompt, Trajectory

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config

log = logging.getLogger("skyrl.rounds")

Group = list[Trajectory]


@dataclass(slots=True, kw_only=True)
class Generated:
    """What one step has sampled."""

    started: list[Trajectory] = field(default_factory=list)
    """Every trajectory, each with its fate."""
    learned: list[Trajectory] = field(default_factory=list)
    """What the step learns from: the usable ones of ``started``, and with ``replace`` copies of them."""
    metrics: dict[str, float] = field(default_factory=dict)


class Rounds:
    """Plays the prompts of a step, and further ones where groups teach nothing.

    Args:
        generator: plays one round.
        prompts: where further prompts come from.
        config: the run's config.
    """

    def __init__(self, generator: Generator, prompts: PromptSource, config: Config) -> None:
        self.generator, self.prompts = generator, prompts
        self.settings = config.trainer.algorithm.dynamic_sampling
        self.tolerance = config.trainer.algorithm.zero_variance_filter_tol
        self.size, self.seed = config.trainer.train_batch_size, config.trainer.seed

    async def generate(self, step: int, prompts: list[Prompt]) -> Generated:
        """One step's trajectories.

        Raises:
            GenerationError: no usable trajectory in a round, or no group of unequal rewards in any.
        """
        if self.settings.type is None:
            started = await self.generator.generate(prompts, step)
            return Generated(started=started, learned=[t for t in started if t.usable])
        sampled = Generated()
        kept: list[Group] = []
        rounds = dead = 0
        while prompts:
            rounds += 1
            made = await self.generator.generate(prompts, step)
            sampled.started += made
            live, equal = self._sorted(made)
            dead += len(equal)
            last = rounds == self.settings.max_sample_batches
            if self.settings.type == "filter":
                kept += live
                _filter(equal, "all rewards of its group are equal")
                enough = len(kept) >= self.size
            else:
                enough = len(live) > self.settings.min_replace_ratio * (len(live) + len(equal)) or (last and live)
                kept = self._replaced(live, equal, step, sampled) if enough else []
                if not enough:
                    _filter(equal + live, f"only {len(live)} of {len(live) + len(equal)} groups had unequal rewards")
            if enough or last:
                break
            prompts = self.prompts.more({t.prompt.uid for t in sampled.started})
        return self._finished(sampled, kept, rounds=rounds, dead=dead, step=step)

    def _sorted(self, trajectories: Sequence[Trajectory]) -> tuple[list[Group], list[Group]]:
        """The groups of usable trajectories: live ones and dead ones. A group of one is live."""
        groups: dict[str, Group] = {}
        for trajectory in trajectories:
            if trajectory.usable:
                groups.setdefault(trajectory.prompt.uid, []).append(trajectory)
        live: list[Group] = []
        dead: list[Group] = []
        for group in groups.values():
            rewards = [t.reward for t in group]
            equal = len(group) > 1 and max(rewards) - min(rewards) <= self.tolerance
            (dead if equal else live).append(group)
        return live, dead

    def _replaced(self, live: list[Group], dead: list[Group], step: int, sampled: Generated) -> list[Group]:
        """The live groups, and a copy of one of them for each dead one; no group twice while there are others."""
        draw = random.Random(f"replace/{self.seed}/{step}")
        stand_ins = draw.sample(live, len(dead)) if len(dead) <= len(live) else draw.choices(live, k=len(dead))
        copies: list[Group] = []
        for number, (group, stand_in) in enumerate(zip(dead, stand_ins, strict=True)):
            uid = stand_in[0].prompt.uid
            _filter([group], f"all rewards of its group are equal; {uid} takes its place")
            twin = replace(stand_in[0].prompt, uid=f"{uid}#{number}")  # a group of its own
            copies.append([replace(t, prompt=twin) for t in stand_in])
        sampled.metrics["sampling/copied_prompts"] = float(len(copies))
        return live + copies

    def _finished(self, sampled: Generated, kept: list[Group], *, rounds: int, dead: int, step: int) -> Generated:
        if not kept:
            raise GenerationError(
                f"step {step}: not one of the groups in {rounds} rounds of sampling had unequal rewards, so there is "
                "nothing to learn. The task is too easy or too hard for this policy: give it other data, or set "
                "trainer.algorithm.dynamic_sampling.type=null."
            )
        _filter(kept[self.size :], f"the step had its {self.size} prompts already")
        surplus, kept = max(0, len(kept) - self.size), kept[: self.size]
        if len(kept) < self.size:
            log.warning(
                "step %d learns from %d prompts instead of %d: after %d rounds of sampling no more groups had unequal "
                "rewards", step, len(kept), self.size, rounds,
            )  # fmt: skip
        sampled.learned = [t for group in kept for t in group]
        rewards = [t.reward for t in sampled.started if t.outcome is not Outcome.FAILED]
        sampled.metrics |= {
            "sampling/rounds": float(rounds),
            "sampling/dead_prompts": float(dead),
            "sampling/surplus_prompts": float(surplus),
            "sampling/missing_prompts": float(self.size - len(kept)),
            "sampling/reward_mean": sum(rewards) / len(rewards),
        }
        return sampled


def _filter(groups: Sequence[Group], cause: str) -> None:
    """Takes groups out of the batch, with the reason."""
    for group in groups:
        for trajectory in group:
            trajectory.outcome, trajectory.cause = Outcome.FILTERED, cause
