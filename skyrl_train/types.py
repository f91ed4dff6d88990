"""The data that flows through the house. Who understands ``Trajectory`` and ``TrainBatch`` understands the system.

    Prompt ── generator ──> Trajectory ── collate ──> TrainBatch ── algorithms, learner ──> new weights

Shapes: B sequences, P prompt tokens, T response tokens, V vocabulary. Tensors live in ``batch.py``, so that this file,
the config and the environments load without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypedDict


class Message(TypedDict):
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of a data set: what is asked, and what the environment needs to judge the answer."""

    uid: str
    """Stable over runs and machines: ``<data source>/<row number>``."""
    messages: tuple[Message, ...]
    env_class: str
    data_source: str = "unknown"
    extras: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, ``reward_spec`` and ``extra_info`` among them."""


class Outcome(StrEnum):
    """The fate of a trajectory. Every one that was started ends in exactly one of these."""

    FINISHED = "finished"
    """The env ended the conversation, or the policy stopped by itself."""
    TRUNCATED = "truncated"
    """Cut by a budget: tokens, turns, or input length. Its reward counts."""
    FILTERED = "filtered"
    """Taken out of the batch on purpose (a rule of the algorithm); the rule is in ``cause``."""
    STALE = "stale"
    """Older than the staleness bound."""
    FAILED = "failed"
    """The env, the reward or the engine raised or hung; ``cause`` says which. Never a silent reward of 0."""


StopReason = Literal["stop", "length", "abort"]


@dataclass(slots=True, kw_only=True)
class Turn:
    """One completion and the env's reply to it. ``start:end`` are the completion's tokens in ``response_ids``."""

    start: int
    end: int
    stop_reason: StopReason
    reward: float = 0.0
    weight_version: int = 0


@dataclass(slots=True, kw_only=True)
class Trajectory:
    """One conversation to its end, token by token, with its reward.

    A game in two turns. The policy wrote ``7<end>``, the env replied ``higher``, the policy wrote ``9<end>``::

        prompt_ids        <user> guess 1..10 <end> <assistant>
        response_ids      7   <end>  | <user> higher <end> <assistant> |  9   <end>
        loss_mask         1   1      |   0      0      0        0      |  1   1
        rollout_logprobs -.9 -.01    |   0      0      0        0      | -.4 -.02
        rewards           0   0.0    |   0      0      0        0      |  0   1.0
        turns             [0:2]                                          [6:8]

    The sampled ids are what the engine returned: they are never decoded and tokenized again. Tokens that the policy did
    not write have mask 0 and log-prob 0. A turn's reward sits on that turn's last token.
    """

    prompt: Prompt
    sample: int
    """Which of the prompt's ``n_samples_per_prompt`` this is."""
    prompt_ids: list[int] = field(default_factory=list)
    response_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    rollout_logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    """The conversation as text, for people and for the run folder; training uses the ids only."""
    outcome: Outcome = Outcome.FINISHED
    cause: str | None = None
    stop_reason: StopReason = "stop"
    metrics: dict[str, float] = field(default_factory=dict)
    """What the env reported, averaged over the batch under ``env/<env_class>/``."""
    baseline: float | None = None
    """The reward of the prompt's greedy trajectory, where the advantage estimator wants one."""

    @property
    def reward(self) -> float:
        """The trajectory's whole reward: the sum over its turns."""
        return sum(self.rewards)

    @property
    def sampled(self) -> int:
        """How many tokens the policy wrote, whether they are trained on or not."""
        return sum(turn.end - turn.start for turn in self.turns)

    @property
    def usable(self) -> bool:
        """Whether the trajectory may enter a batch."""
        return self.outcome in (Outcome.FINISHED, Outcome.TRUNCATED)

    def append_sampled(self, ids: list[int], logprobs: list[float], stop_reason: StopReason, version: int) -> None:
        """Adds one completion. Raises ValueError unless every sampled token has its log-prob."""
        if len(ids) != len(logprobs):
            raise ValueError(f"{len(ids)} sampled tokens with {len(logprobs)} log-probs")
        start = len(self.response_ids)
        self._append(ids, 1, logprobs)
        self.stop_reason = stop_reason
        self.turns.append(
            Turn(start=start, end=len(self.response_ids), stop_reason=stop_reason, weight_version=version)
        )

    def append_observed(self, ids: list[int]) -> None:
        """Adds tokens that the policy did not write: never trained on."""
        self._append(ids, 0, [0.0] * len(ids))

    def reward_turn(self, reward: float) -> None:
        """Puts ``reward`` on the last token of the last turn."""
        turn = self.turns[-1]
        turn.reward += reward
        if turn.end > turn.start:
            self.rewards[turn.end - 1] += reward

    def _append(self, ids: list[int], mask: int, logprobs: list[float]) -> None:
        self.response_ids += ids
        self.loss_mask += [mask] * len(ids)
        self.rollout_logprobs += logprobs
        self.rewards += [0.0] * len(ids)
