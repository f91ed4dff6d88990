"""One trajectory, from its prompt to its end, as one asyncio task."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from skyrl_train.engines.base import Completion, Engine, Request, SamplingParams
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.errors import EngineError, EngineTimeoutError, EnvError, ModelError
from skyrl_train.generator.chat import ChatFormat
from skyrl_train.generator.seeds import derive_seed
from skyrl_train.types import Message, Outcome, Prompt, Trajectory

if TYPE_CHECKING:
    from skyrl_train.config.generator import GeneratorConfig

log = logging.getLogger("skyrl.generator")

ABORT_TIMEOUT = 10.0
"""Seconds that an engine has to acknowledge an abort."""


class Runner(Protocol):
    """Runs env calls with a deadline (``envs/runner.py``)."""

    async def make(self, factory: Callable[[Prompt], Env], prompt: Prompt) -> Env: ...
    async def init(self, env: Env) -> list[Message]: ...
    async def step(self, env: Env, response: str) -> StepResult: ...
    async def close(self, env: Env) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Which trajectory to make."""

    prompt: Prompt
    sample: int
    order: tuple[int, ...]
    """(prompt's place in the step, sample): requests that wait together are admitted in this order."""
    seed: tuple[int | str, ...]
    """(seed, purpose, step, prompt, sample); the turn is added for each request."""
    params: SamplingParams

    @property
    def session(self) -> str:
        return "/".join(map(str, self.seed[1:]))


class Rollout:
    """Makes trajectories with one engine, one chat format and one env runner; holds no state of its own."""

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        runner: Runner,
        make_env: Callable[[Prompt], Env],
        config: GeneratorConfig,
    ) -> None:
        self.engine, self.chat, self.runner, self.make_env, self.config = engine, chat, runner, make_env, config

    async def run(self, job: Job) -> Trajectory:
        """Plays one conversation. An env or engine that fails costs this trajectory only: it comes back FAILED."""
        trajectory = Trajectory(prompt=job.prompt, sample=job.sample)
        env: Env | None = None
        try:
            env = await self.runner.make(self.make_env, job.prompt)
            await self._play(job, trajectory, env)
        except (EnvError, EngineError, ModelError) as error:
            trajectory.outcome = Outcome.FAILED
            trajectory.cause = f"{type(error).__name__}: {error}"
            log.warning("trajectory %s failed: %s", job.session, trajectory.cause)
        finally:
            try:
                await self.engine.close_sessions([job.session])
            finally:
                if env is not None:
                    await self._close(env, trajectory)
        return trajectory

    async def _play(self, job: Job, trajectory: Trajectory, env: Env) -> None:
        trajectory.messages = await self.runner.init(env)  # a copy: the env keeps its own
        trajectory.prompt_ids = self.chat.prompt_ids(trajectory.messages)
        for turn in range(self.config.max_turns):
            used = len(trajectory.prompt_ids) + len(trajectory.response_ids)
            if turn and used > self.config.max_input_length:
                trajectory.stop_reason = "length"
                return _cut(
                    trajectory, f"{used} tokens, over generator.max_input_length={self.config.max_input_length}"
                )
            completion = await self._complete(job, trajectory, turn)
            trajectory.append_sampled(
                completion.token_ids, completion.logprobs, completion.stop_reason, completion.weight_version
            )
            text = self.chat.text(completion.token_ids)
            trajectory.messages.append({"role": "assistant", "content": text})
            result = await self.runner.step(env, text)
            _record(trajectory, result)
            if completion.stop_reason == "length":
                return _cut(trajectory, f"completion of {len(completion.token_ids)} tokens cut by max_generate_length")
            if result.truncated:
                return _cut(trajectory, "cut short by the env")
            if result.terminated:
                return None
            if turn + 1 < self.config.max_turns:
                self._observe(trajectory, completion, result.observations)
        return _cut(trajectory, f"generator.max_turns={self.config.max_turns} reached")

    async def _complete(self, job: Job, trajectory: Trajectory, turn: int) -> Completion:
        request = Request(
            id=f"{job.session}/{turn}",
            prompt_ids=trajectory.prompt_ids + trajectory.response_ids,
            params=replace(job.params, seed=derive_seed(*job.seed, turn)),
            session=job.session,
            order=(*job.order, turn),
        )
        deadline = self.config.request_timeout
        try:
            async with asyncio.timeout(deadline):
                (completion,) = await self.engine.generate(request)
        except EngineError:  # one kind of it is a TimeoutError too: the engine's own deadline
            raise
        except TimeoutError as error:
            await self._abandon(request)
            raise EngineTimeoutError(
                f"no completion for {request.id} within generator.request_timeout={deadline:g} s"
            ) from error
        if completion.stop_reason == "abort":
            raise EngineError(f"the completion of {request.id} was aborted after {len(completion.token_ids)} tokens")
        if not completion.token_ids:  # the turn's reward would have no token to sit on
            raise EngineError(f"the completion of {request.id} has no token")
        return completion

    async def _abandon(self, request: Request) -> None:
        """Tells the engine that nobody waits for this any more; it may be in another process, and it may be dead."""
        try:
            async with asyncio.timeout(ABORT_TIMEOUT):
                await self.engine.abort([request.id])
        except (EngineError, TimeoutError) as error:
            log.warning("aborting %s failed: %s", request.id, error)

    def _observe(self, trajectory: Trajectory, completion: Completion, messages: list[Message]) -> None:
        last = completion.token_ids[-1]
        if self.config.use_conversation_multi_turn:
            append = self.config.append_eos_token_after_stop_str_in_multi_turn
            ids = self.chat.observation_ids(messages, last_id=last, append_eos=append)
        else:
            # The message goes on, so a closing token was not its end. One that is all the turn wrote stays: it carries
            # the turn's reward.
            if last in self.chat.special_ids and len(completion.token_ids) > 1:
                _drop_last_token(trajectory)
            ids = self.chat.plain_ids(messages)
        trajectory.append_observed(ids)
        trajectory.messages.extend(messages)

    async def _close(self, env: Env, trajectory: Trajectory) -> None:
        try:
            await self.runner.close(env)
        except (EnvError, TimeoutError) as error:  # the conversation is over and its reward stands
            log.warning("closing the env of %s failed: %s", trajectory.prompt.uid, error)


def _record(trajectory: Trajectory, result: StepResult) -> None:
    trajectory.reward_turn(result.reward)
    for name, value in result.metadata.items():
        if isinstance(value, (bool, int, float)):
            trajectory.metrics[name] = float(value)


def _cut(trajectory: Trajectory, cause: str) -> None:
    trajectory.outcome, trajectory.cause = Outcome.TRUNCATED, cause


def _drop_last_token(trajectory: Trajectory) -> None:
    """Takes the last of a turn's several tokens out again, moving the turn's reward to the token before it."""
    for row in (trajectory.response_ids, trajectory.loss_mask, trajectory.rollout_logprobs):
        row.pop()
    reward = trajectory.rewards.pop()
    trajectory.turns[-1].end -= 1
    trajectory.rewards[-1] += reward
