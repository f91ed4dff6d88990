"""The seam between the generator and whatever samples tokens. A backend is one file beside this one.

One prompt a call: token ids in; token ids, the log-prob of every sampled token, and the weight version out. Concurrency
is asyncio's. What a backend can do is stated in ``Capabilities``, so no backend carries methods that only raise and no
other file asks which backend it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skyrl_train.types import StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do. Preflight compares it with the config before anything heavy starts."""

    name: str
    sampling: frozenset[str] = frozenset()
    """Names of the sampling parameters it honours (fields of ``SamplingParams``)."""
    shares_parameters: bool = False
    """Samples from the learner's own parameters, so a weight sync copies nothing."""
    sleep: bool = False
    lora: bool = False
    tensor_parallel: bool = False
    pipeline_parallel: bool = False
    data_parallel: bool = False
    profile: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one completion. A value that equals its default is off."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    stop: tuple[str, ...] = ()
    """Matched on the decoded text. The matched text stays in the completion: ids and log-probs are as sampled."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    """None: drawn from the engine's own stream, so the run cannot be repeated."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of one backend only, under its own names (SGLang: stop_regex, json_schema, regex, ebnf, ...)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt for an engine."""

    id: str
    """Unique while in flight; ``abort`` takes it."""
    prompt_ids: Sequence[int]
    params: SamplingParams
    session: str | None = None
    """The trajectory this belongs to. A session stays on one engine, whose cache holds its prefix."""
    order: tuple[int, ...] = ()
    """Requests that wait together are admitted in this order, so that timing decides nothing."""


@dataclass(slots=True, kw_only=True)
class Completion:
    """What an engine returns for one sample of one call.

    ``token_ids`` is as sampled, the stop token included. ``logprobs[i]`` is the log-prob of ``token_ids[i]`` under the
    sampling temperature (temperature 1 when greedy), before penalties and before top-p, top-k and min-p
    (SGLang: after a logit bias and penalties).
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: StopReason = "stop"
    matched: int | str | None = None
    """The stop token id or stop string that ended it."""
    weight_version: int = 0


class Engine(ABC):
    """One inference engine."""

    capabilities: Capabilities
    paused: str | None = None
    """How generation is held up, where the backend can do that; None: it runs."""

    @abstractmethod
    async def generate(self, request: Request) -> list[Completion]:
        """Samples ``request.params.n`` completions.

        Raises:
            EngineError: the request cannot be served (too long, unknown parameter) or the engine failed.
        """

    @abstractmethod
    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """Ends the requests (all, if None); their ``generate`` returns what was sampled so far, reason ``abort``."""

    @abstractmethod
    async def commit_weights(self, version: int) -> None:
        """New weights are in place: drop whatever was computed with the old ones and report ``version`` from now on."""

    async def open_sessions(self, sessions: Sequence[str]) -> None:  # noqa: B027 - optional
        """Announces trajectories before their first request."""

    async def close_sessions(self, sessions: Sequence[str]) -> None:  # noqa: B027 - optional
        """The trajectories will send no further request."""

    async def close(self) -> None:  # noqa: B027 - optional
        """Ends the engine and frees what it holds."""
