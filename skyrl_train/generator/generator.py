"""The generator: prompts in, trajectories out, each with a fate."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from skyrl_train.engines.base import SamplingParams
from skyrl_train.errors import GenerationError
from skyrl_train.generator.rollout import Job, Rollout
from skyrl_train.types import Outcome, Prompt, Trajectory

if TYPE_CHECKING:
    from skyrl_train.config.generator import GeneratorConfig, SamplingConfig

Purpose = Literal["train", "eval"]
SGLANG_ONLY = {
    name: name for name in ("stop_regex", "json_schema", "regex", "ebnf", "custom_logit_processor", "custom_params")
} | {"lora_name": "lora_path"}
"""Sampling parameters that no other backend has, and what SGLang calls them; preflight refuses them elsewhere."""


class Generator:
    """Runs one asyncio task for each trajectory; the engine batches what waits together.

    Args:
        greedy_baseline: play one greedy trajectory more for each prompt of training. It is not learned from: its reward
            is the ``baseline`` of the others.
    """

    def __init__(self, rollout: Rollout, config: GeneratorConfig, seed: int, greedy_baseline: bool = False) -> None:
        self.rollout, self.config, self.seed, self.greedy_baseline = rollout, config, seed, greedy_baseline

    async def generate(self, prompts: Sequence[Prompt], step: int, purpose: Purpose = "train") -> list[Trajectory]:
        """Makes ``n_samples_per_prompt`` trajectories for each prompt, in the order of the prompts.

        Returns every trajectory that was started, whatever its fate.

        Raises:
            GenerationError: not one that was made for training is usable; the message counts the causes.
        """
        trajectories = await self._play(self._jobs(prompts, step, purpose))
        for trajectory in trajectories:
            self._apply_budget_rules(trajectory)
        if purpose == "train":
            if self.greedy_baseline:
                _take_baselines(trajectories, self.config.n_samples_per_prompt)
            _drop_lonely(trajectories, self.config.n_samples_per_prompt)
            require_usable(trajectories, step)
        return trajectories

    async def _play(self, jobs: Sequence[Job]) -> list[Trajectory]:
        """Runs the jobs side by side. Every session is closed at the end, whatever the end is."""
        engine, sessions = self.rollout.engine, [job.session for job in jobs]
        try:
            await engine.open_sessions(sessions)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.rollout.run(job)) for job in jobs]
        except BaseException as error:
            await engine.close_sessions(sessions)  # opening may have failed half way; closing twice does no harm
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from error  # a dead worker is one error, not one for each trajectory
            raise
        return [task.result() for task in tasks]

    def _jobs(self, prompts: Sequence[Prompt], step: int, purpose: Purpose) -> list[Job]:
        train = purpose == "train"
        section = self.config.sampling_params if train else self.config.eval_sampling_params
        samples = self.config.n_samples_per_prompt if train else self.config.eval_n_samples_per_prompt
        base = self.seed if section.seed is None else section.seed
        params = [sampling_params(section)] * samples
        if train and self.greedy_baseline:
            params.append(replace(params[0], temperature=0.0))
        return [
            Job(
                prompt=prompt,
                sample=sample,
                order=(place, sample),
                seed=(base, purpose, step, prompt.uid, sample),
                params=sampled,
            )
            for place, prompt in enumerate(prompts)
            for sample, sampled in enumerate(params)
        ]

    def _apply_budget_rules(self, trajectory: Trajectory) -> None:
        """``zero_reward_on_non_stop`` and ``apply_overlong_filtering``, for trajectories that a budget cut."""
        if not trajectory.usable or trajectory.stop_reason == "stop":
            return
        if self.config.zero_reward_on_non_stop:
            trajectory.rewards = [0.0] * len(trajectory.rewards)
            for turn in trajectory.turns:
                turn.reward = 0.0
        if self.config.apply_overlong_filtering:
            trajectory.loss_mask = [0] * len(trajectory.loss_mask)


def sampling_params(section: SamplingConfig) -> SamplingParams:
    """The engine's parameters from a config section."""
    stop = [section.stop] if isinstance(section.stop, str) else section.stop
    return SamplingParams(
        max_new_tokens=section.max_generate_length,
        min_new_tokens=section.min_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        min_p=section.min_p,
        repetition_penalty=section.repetition_penalty,
        frequency_penalty=section.frequency_penalty,
        presence_penalty=section.presence_penalty,
        logit_bias={int(k): v for k, v in section.logit_bias.items()} if section.logit_bias else None,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(section.stop_token_ids or ()),
        ignore_eos=section.ignore_eos,
        extra={theirs: value for name, theirs in SGLANG_ONLY.items() if (value := getattr(section, name)) is not None},
    )


def _take_baselines(trajectories: Sequence[Trajectory], samples: int) -> None:
    """Gives each group the reward of its greedy trajectory, which then leaves; without one the group is filtered."""
    greedy = {t.prompt.uid: t for t in trajectories if t.sample == samples}
    for trajectory in trajectories:
        baseline = greedy[trajectory.prompt.uid]
        if trajectory is baseline or not trajectory.usable:
            continue
        trajectory.baseline = baseline.reward
        if not baseline.usable:
            trajectory.outcome = Outcome.FILTERED
            trajectory.cause = f"the greedy trajectory of its group failed: {baseline.cause}"
    for baseline in greedy.values():
        if baseline.usable:
            baseline.outcome, baseline.cause = Outcome.FILTERED, "the greedy baseline of its group"


def _drop_lonely(trajectories: Sequence[Trajectory], samples: int) -> None:
    """A group of which failures left one trajectory has no baseline: that one is filtered, with the reason."""
    left = Counter(t.prompt.uid for t in trajectories if t.usable)
    for trajectory in trajectories:
        if trajectory.usable and samples > 1 and left[trajectory.prompt.uid] == 1:
            trajectory.outcome = Outcome.FILTERED
            trajectory.cause = "the only one of its group that did not fail"


def require_usable(trajectories: Sequence[Trajectory], step: int) -> None:
    """Raises GenerationError, counting the causes, if there are trajectories and none is usable."""
    if trajectories and not any(t.usable for t in trajectories):
        raise GenerationError(
            f"step {step}: none of {len(trajectories)} trajectories is usable. {causes(trajectories)}"
        )


def causes(trajectories: Sequence[Trajectory]) -> str:
    """What went wrong by kind, most frequent first, each with its first instance:
    ``3 x EnvTimeoutError: guess/7 ... (the first of them); 1 x EngineError: ...``.
    """
    kinds: dict[str, list[str]] = {}
    for trajectory in trajectories:
        if not trajectory.usable:
            cause = trajectory.cause or "no cause given"
            kinds.setdefault(cause.split(":")[0], []).append(cause)
    common = sorted(kinds.values(), key=len, reverse=True)[:3]
    return "; ".join(f"{len(c)} x {c[0]}{' (the first of them)' if len(set(c)) > 1 else ''}" for c in common)


def fate_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """How many trajectories, and prompts, came to which end. The counts of each kind add up to what was started.

    A prompt without a usable trajectory was filtered, or, if something failed or was stale, lost.
    """
    fates = Counter(t.outcome for t in trajectories)
    metrics = {f"trajectories/{outcome.value}": float(fates[outcome]) for outcome in Outcome}
    metrics["trajectories/started"] = float(len(trajectories))
    usable = {t.prompt.uid for t in trajectories if t.usable}
    started = {t.prompt.uid for t in trajectories}
    broken = {t.prompt.uid for t in trajectories if t.outcome in (Outcome.FAILED, Outcome.STALE)}
    return metrics | {
        "prompts/started": float(len(started)),
        "prompts/used": float(len(usable)),
        "prompts/filtered": float(len(started - usable - broken)),
        "prompts/lost": float(len((started - usable) & broken)),
    }


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Lengths, turns and what the envs reported, over the usable trajectories."""
    usable = [t for t in trajectories if t.usable]
    if not usable:
        return {}
    lengths = [t.sampled for t in usable]
    metrics = {
        "response/length_mean": _mean(lengths),
        "response/length_max": float(max(lengths)),
        "response/turns_mean": _mean([len(t.turns) for t in usable]),
        "response/truncated": _mean([t.outcome is Outcome.TRUNCATED for t in usable]),
    }
    by_name: dict[str, list[float]] = {}
    for t in usable:
        for name, value in t.metrics.items():
            by_name.setdefault(f"env/{t.prompt.env_class}/{name}", []).append(value)
    return metrics | {name: _mean(values) for name, values in by_name.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
