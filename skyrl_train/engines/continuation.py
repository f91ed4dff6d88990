"""Requests in pieces: several samples as single ones, and a broken-off one that goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skyrl_train.engines.base import Completion, Request

GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")


def split(request: Request) -> list[Request]:
    """One request for each of the ``n`` samples, with ids and seeds of their own.

    A server that is given ``n`` and a seed makes ``n`` equal samples, and an abort by id reaches none of them.
    """
    params = request.params
    if params.n == 1:
        return [request]
    return [
        replace(
            request,
            id=f"{request.id}#{i}",
            params=replace(params, n=1, seed=None if params.seed is None else params.seed + i),
            order=(*request.order, i),
        )
        for i in range(params.n)
    ]


def can_continue(request: Request) -> bool:
    """Whether it can be carried on in the middle. An engine follows a grammar from its start only."""
    return not any(request.params.extra.get(name) for name in GRAMMARS)


def rest_of(request: Request, done: Completion) -> Request | None:
    """What is left to sample after ``done``: its tokens join the prompt and leave the budget. None: nothing is left.

    Penalties by frequency and presence, and stop strings, look at the rest only.
    """
    params, sampled = request.params, len(done.token_ids)
    if sampled == 0:
        return request
    if sampled >= params.max_new_tokens:
        return None
    return replace(
        request,
        prompt_ids=[*request.prompt_ids, *done.token_ids],
        params=replace(
            params,
            max_new_tokens=params.max_new_tokens - sampled,
            min_new_tokens=max(0, params.min_new_tokens - sampled),
            seed=None if params.seed is None else params.seed + sampled,
        ),
    )


def join(parts: Sequence[Completion]) -> Completion:
    """The pieces as one completion, ended as the last one was. Its version is that of its oldest token."""
    sampled = [part for part in parts if part.token_ids] or [parts[-1]]
    return Completion(
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=[logprob for part in parts for logprob in part.logprobs],
        stop_reason=parts[-1].stop_reason,
        matched=parts[-1].matched,
        weight_version=min(part.weight_version for part in sampled),
    )
