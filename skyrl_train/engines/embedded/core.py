"""Continuous batching without asyncio: requests go in, ``step`` runs the model once, ended requests come out."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from random import Random

from torch import Tensor

from skyrl_train.engines.base import Request
from skyrl_train.engines.embedded.checks import check_request
from skyrl_train.engines.embedded.plans import DecodePlan
from skyrl_train.engines.embedded.runner import Runner
from skyrl_train.engines.embedded.sample import Decode, Ended, Sample, Ticket
from skyrl_train.engines.embedded.sampling import Sampler
from skyrl_train.engines.embedded.sessions import Sessions
from skyrl_train.errors import EngineError

REFILL = 16
"""With more requests than rows, prompts wait until 1/16 of the rows is free: each alone would cost a forward."""


class Core:
    """Waiting requests are admitted in ``Request.order``; the running ones advance by one token a step.

    Not thread-safe: one caller at a time.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        eos: frozenset[int],
        decode: Decode | None,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        deterministic: bool,
    ) -> None:
        self.runner, self.cache = runner, runner.cache
        self.eos, self._decode_text = eos, decode
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.deterministic = deterministic
        self.weight_version = 0
        self.sessions = Sessions()
        self.steps = 0
        self.tokens_sampled = 0
        self.tokens_prefilled = 0
        self._tickets: dict[str, Ticket] = {}
        self._waiting: list[tuple[tuple[int, ...], int, int, Sample]] = []
        self._rows: list[Sample] = []
        self._ended: list[Ended] = []
        self._arrivals = 0
        self._seeds = Random()
        # What a step can reuse from the one before, as long as the rows stay the same.
        self._plan: DecodePlan | None = None
        self._sampler: Sampler | None = None
        self._tokens: Tensor | None = None

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._tickets)

    @property
    def ready(self) -> bool:
        """Whether ``step`` has something to do now."""
        return bool(self._tickets) and not (self.deterministic and self.sessions.absent)

    def submit(self, request: Request) -> None:
        """Takes a request in.

        Raises:
            EngineError: it cannot be served.
        """
        if request.id in self._tickets:
            raise EngineError(f"embedded engine: a request with the id {request.id!r} is already in flight.")
        check_request(
            request,
            vocabulary=self.runner.vocabulary,
            max_length=self.cache.max_length,
            can_decode=self._decode_text is not None,
        )
        seed = request.params.seed
        seed = self._seeds.getrandbits(63) if seed is None else seed
        ticket = Ticket.of(request, self._arrivals, seed, self.eos, self._decode_text)
        self._arrivals += 1
        self._tickets[request.id] = ticket
        self.sessions.came(request.session)
        for place, sample in enumerate(ticket.samples):
            heapq.heappush(self._waiting, (request.order, ticket.arrival, place, sample))

    def refuse(self, request: Request, error: EngineError) -> None:
        """Ends a request that was not taken in."""
        self._ended.append(Ended(request, error=error))

    def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """Ends these requests (all, if None) with what they have; ids that are not in flight are passed over."""
        chosen = list(self._tickets) if request_ids is None else [i for i in request_ids if i in self._tickets]
        self._remove({id(self._tickets[i]): self._tickets[i] for i in chosen})
        for request_id in chosen:
            ticket = self._tickets[request_id]
            for sample in ticket.samples:
                ticket.finish(sample, self.weight_version, aborted=True)
            self._end(ticket, Ended(ticket.request, ticket.completions()))

    def fail_all(self, error: Exception) -> None:
        """Ends everything with ``error`` and starts from an empty cache."""
        self._waiting.clear()
        self._rows.clear()
        self._changed()
        self.cache.release()
        for ticket in list(self._tickets.values()):
            failure = EngineError(f"embedded engine: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._end(ticket, Ended(ticket.request, error=failure))

    def commit(self, version: int) -> None:
        """New weights are in place.

        Raises:
            EngineError: requests are in flight, whose cache the old weights made.
        """
        if self._tickets:
            raise EngineError(
                f"embedded engine: weight version {version} cannot be committed while {len(self._tickets)} requests "
                "are in flight. Wait for them or call abort() first."
            )
        self.runner.forget()
        self.weight_version = version

    def take_ended(self) -> list[Ended]:
        """The requests that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def step(self) -> None:
        """Admits what there is room for, then advances every row by one token. Inside ``runner.computing()``."""
        if self.ready:
            self._admit()
            if self._rows:
                self._advance()

    def _admit(self) -> None:
        free = self.max_num_seqs - len(self._rows)
        if not self._waiting or (self._rows and free < min(len(self._waiting), max(1, self.max_num_seqs // REFILL))):
            return
        chosen = [heapq.heappop(self._waiting)[-1] for _ in range(min(free, len(self._waiting)))]
        chosen.sort(key=lambda s: len(s.prompt_ids))  # stable: padded prompts of a batch are of similar length
        self.cache.reserve(len(self._rows) + len(chosen), max(len(s.prompt_ids) for s in chosen) + 1)
        while chosen:
            chosen = self._prefill(chosen)

    def _prefill(self, chosen: list[Sample]) -> list[Sample]:
        """Runs the prompts of the first of ``chosen``, as many as fit in one pass. Returns the others."""
        distinct: dict[tuple[int, ...], int] = {}
        which: list[int] = []
        for sample in chosen:
            prompt = tuple(sample.prompt_ids)
            grown = len(distinct) + (prompt not in distinct)
            if which and grown * len(prompt) > max(self.max_num_batched_tokens, len(distinct) * len(prompt)):
                break
            which.append(distinct.setdefault(prompt, len(distinct)))
        now, later = chosen[: len(which)], chosen[len(which) :]
        start = len(self._rows)
        logits = self.runner.prefill(start, list(distinct), which)
        self.tokens_prefilled += sum(map(len, distinct))
        self._rows += now
        self._changed()
        sampler = Sampler(now, self.runner.vocabulary, self.runner.device)
        _, tokens, logprobs = sampler(logits)
        self._take(start, tokens, logprobs)
        return [s for s in later if s.ticket.request.id in self._tickets]

    def _advance(self) -> None:
        plan = self._plan
        if plan is None:
            positions = [sample.cached for sample in self._rows]
            self.cache.reserve(len(positions), max(positions) + 1)
            plan = self._plan = DecodePlan(self.cache, positions, self.runner.device)
            self._sampler = Sampler(self._rows, self.runner.vocabulary, self.runner.device)
            self._tokens = plan.positions.new_tensor([sample.ids[-1] for sample in self._rows])
        elif plan.span > self.cache.length:
            self.cache.reserve(plan.rows, plan.span)
            plan.relocate()
        assert self._sampler is not None and self._tokens is not None
        logits = self.runner.decode(self._tokens, plan)
        self._tokens, tokens, logprobs = self._sampler(logits)
        self.steps += 1
        plan.advance()
        self._take(0, tokens, logprobs)

    def _take(self, start: int, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Gives the rows from ``start`` on their new tokens, and lets go of those that are done."""
        self.tokens_sampled += len(tokens)
        gone: set[int] = set()
        sick: list[Sample] = []
        rows = self._rows
        for row, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True), start):
            if not math.isfinite(logprob):
                sick.append(rows[row])
            elif rows[row].take(token, logprob):
                gone.add(row)
        ended = [rows[row] for row in sorted(gone)]
        if gone:
            self._drop(gone)
        for sample in ended:
            if sample.ticket.finish(sample, self.weight_version):
                self._end(sample.ticket, Ended(sample.ticket.request, sample.ticket.completions()))
        if sick:
            self._fail_sick(sick)

    def _fail_sick(self, sick: Sequence[Sample]) -> None:
        """Logits that are not finite cost their own request only; its keys and values are wiped."""
        tickets = {id(s.ticket): s.ticket for s in sick if s.ticket.request.id in self._tickets}
        self._remove(tickets, wipe=True)
        for ticket in tickets.values():
            error = EngineError(
                f"embedded engine, request {ticket.request.id!r}: the model's logits are not finite, weight version "
                f"{self.weight_version}. The weights hold NaN or overflow: lower "
                "trainer.policy.optimizer_config.lr (1e-7) or max_grad_norm (0.5)."
            )
            self._end(ticket, Ended(ticket.request, error=error))

    def _remove(self, tickets: dict[int, Ticket], *, wipe: bool = False) -> None:
        """Takes the samples of these tickets out of the rows and of the queue."""
        gone = {row for row, sample in enumerate(self._rows) if id(sample.ticket) in tickets}
        if wipe:
            self.cache.wipe(sorted(gone))
        if gone:
            self._drop(gone)
        if any(id(entry[-1].ticket) in tickets for entry in self._waiting):
            self._waiting = [entry for entry in self._waiting if id(entry[-1].ticket) not in tickets]
            heapq.heapify(self._waiting)

    def _drop(self, gone: set[int]) -> None:
        """Closes the holes: the last rows move into them, so that the live ones stay ``0 .. n-1``."""
        left = len(self._rows) - len(gone)
        holes = [row for row in sorted(gone) if row < left]
        tail = [row for row in range(left, len(self._rows)) if row not in gone]
        if tail:
            self.cache.move(tail, holes, max(self._rows[row].cached for row in tail))
        for source, target in zip(tail, holes, strict=True):
            self._rows[target] = self._rows[source]
        del self._rows[left:]
        self._changed()

    def _changed(self) -> None:
        self._plan = self._sampler = self._tokens = None

    def _end(self, ticket: Ticket, ended: Ended) -> None:
        del self._tickets[ticket.request.id]
        self.sessions.went(ticket.request.session)
        self._ended.append(ended)
