"""What the core keeps of each request: a ticket, and one sample for each completion that it asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from skyrl_train.engines.base import Completion, Request, SamplingParams
from skyrl_train.engines.embedded.sampling import Noise
from skyrl_train.engines.embedded.stopping import StopText
from skyrl_train.errors import EngineError

Decode = Callable[[list[int]], str]


class Sample:
    """One completion being written."""

    __slots__ = ("ids", "logprobs", "matched", "noise", "params", "prompt_ids", "stop_ids", "text", "ticket")

    def __init__(self, ticket: Ticket, noise: Noise, stop_ids: frozenset[int], text: StopText | None) -> None:
        self.ticket, self.noise, self.stop_ids, self.text = ticket, noise, stop_ids, text
        self.params: SamplingParams = ticket.request.params
        self.prompt_ids: Sequence[int] = ticket.prompt_ids
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.matched: int | str | None = None

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are stored: all but the newest, which the next step feeds."""
        return len(self.prompt_ids) + len(self.ids) - 1

    def take(self, token: int, logprob: float) -> bool:
        """Adds a sampled token. Returns whether it was the last."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self.stop_ids:
            self.matched = token
            return True
        if self.text is not None:
            matched = self.text.push(token)
            if matched is not None and len(self.ids) >= self.params.min_new_tokens:
                self.matched = matched
                return True
        return len(self.ids) >= self.params.max_new_tokens

    def completion(self, version: int, *, aborted: bool = False) -> Completion:
        """What was written, as the engine's answer."""
        reason = "abort" if aborted else "length" if self.matched is None else "stop"
        return Completion(
            token_ids=self.ids,
            logprobs=self.logprobs,
            stop_reason=reason,
            matched=self.matched,
            weight_version=version,
        )


@dataclass(slots=True, eq=False)
class Ticket:
    """A request in flight."""

    request: Request
    arrival: int
    prompt_ids: tuple[int, ...]
    samples: list[Sample] = field(default_factory=list)
    done: dict[int, Completion] = field(default_factory=dict)
    """By place in ``samples``."""

    @classmethod
    def of(cls, request: Request, arrival: int, seed: int, eos: frozenset[int], decode: Decode | None) -> Ticket:
        """Prepares the samples of a request that has been checked."""
        params = request.params
        ticket = cls(request, arrival, tuple(request.prompt_ids))
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos)
        for place in range(params.n):
            text = None
            if params.stop:
                assert decode is not None, "checked when the request came in"
                text = StopText(params.stop, decode, ticket.prompt_ids)
            ticket.samples.append(Sample(ticket, Noise(seed, place), stop_ids, text))
        return ticket

    def finish(self, sample: Sample, version: int, *, aborted: bool = False) -> bool:
        """Closes one sample. Returns whether the whole request is done."""
        self.done.setdefault(self.samples.index(sample), sample.completion(version, aborted=aborted))
        return len(self.done) == len(self.samples)

    def completions(self) -> list[Completion]:
        """The answers, in the order of the samples."""
        return [self.done[place] for place in range(len(self.samples))]


@dataclass(slots=True)
class Ended:
    """The end of a request: its completions, or what went wrong."""

    request: Request
    completions: list[Completion] = field(default_factory=list)
    error: EngineError | None = None
