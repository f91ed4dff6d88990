"""From logits to tokens: many rows at once, each with parameters and noise of its own.

R rows, V vocabulary. A row's token is a function of its own logits, its own parameters and one number of its own noise:
who else is in the batch changes nothing.

Order of operations: logit bias, ``min_new_tokens``, penalties; temperature; top-k, then top-p on what is left, then
min-p (as transformers and vLLM do it). The log-prob that is returned knows of the temperature and of nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from skyrl_train.engines.base import SamplingParams
from skyrl_train.models.truncation import kept

_BELOW_ONE = 1.0 - 2.0**-22
"""Largest noise: times a row's total it stays below that total in float32, so the inverse CDF never runs out."""


class Noise:
    """The uniform numbers of one sample, one for each token, from its own seed."""

    def __init__(self, seed: int, sample: int) -> None:
        self._random = Random((seed % 2**64) << 20 | sample).random

    def __call__(self) -> float:
        """The next number in [0, 1)."""
        return self._random() * _BELOW_ONE


class Sampled(Protocol):
    """What the sampler reads of a row."""

    params: SamplingParams
    ids: list[int]
    noise: Noise

    @property
    def prompt_ids(self) -> Sequence[int]: ...

    @property
    def stop_ids(self) -> Collection[int]: ...


class Sampler:
    """Samples for one set of rows; made anew when the set changes."""

    def __init__(self, rows: Sequence[Sampled], vocabulary: int, device: torch.device) -> None:
        self.rows, self.device = rows, device
        params = [row.params for row in rows]
        temperatures = [p.temperature for p in params]
        self._all_greedy = not any(temperatures)
        self._greedy = torch.tensor([t == 0 for t in temperatures], device=device) if 0 in temperatures else None
        divisors = [t or 1.0 for t in temperatures]
        self._temperature = _column(divisors, 1.0, device)
        self._top_k = _column([p.top_k if p.top_k > 0 else vocabulary for p in params], vocabulary, device)
        self._top_p = _column([p.top_p for p in params], 1.0, device)
        self._min_p = _column([p.min_p for p in params], 0.0, device)
        self._filtered = not (self._top_k is None and self._top_p is None and self._min_p is None)
        self._shaper = LogitShaper(rows, vocabulary, device) if any(_shapes(p) for p in params) else None

    def __call__(self, logits: Tensor) -> tuple[Tensor, list[int], list[float]]:
        """One token for each row.

        Args:
            logits: ``[R, V]`` float32.

        Returns:
            The tokens as ``[R]`` int64 and as a list, and their log-probs. A log-prob that is not finite says that the
            row's logits were not.
        """
        shaped = logits if self._shaper is None else self._shaper(logits)
        if self._all_greedy:
            tokens, probs = shaped.argmax(-1, keepdim=True), None
        else:
            probs = self._tempered(shaped).softmax(-1)
            tokens = self._draw(probs)
            if self._greedy is not None:
                tokens = torch.where(self._greedy[:, None], shaped.argmax(-1, keepdim=True), tokens)
        if probs is None or self._shaper is not None:
            logprobs = self._tempered(logits).log_softmax(-1).gather(1, tokens)
        else:
            logprobs = probs.gather(1, tokens).log_()
        if self._shaper is not None:
            self._shaper.saw(tokens)
        return tokens[:, 0], tokens[:, 0].tolist(), logprobs[:, 0].tolist()

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits if self._temperature is None else logits / self._temperature

    def _draw(self, probs: Tensor) -> Tensor:
        """``[R, 1]``: the first token at which the running total of ``probs`` exceeds the row's noise."""
        if self._filtered:
            probs = probs * kept(probs, self._top_k, self._top_p, self._min_p)
        total = probs.cumsum(-1)
        noise = torch.tensor([row.noise() for row in self.rows], dtype=probs.dtype).to(self.device)[:, None]
        tokens = torch.searchsorted(total, noise.mul_(total[:, -1:]), right=True)
        return tokens.clamp_(max=probs.shape[1] - 1)  # runs off the end only where the logits were not finite


class LogitShaper:
    """Logit bias, ``min_new_tokens`` and the penalties, for rows of which at least one asks for them."""

    def __init__(self, rows: Sequence[Sampled], vocabulary: int, device: torch.device) -> None:
        self.rows = rows
        params = [row.params for row in rows]
        self._repetition = _column([p.repetition_penalty for p in params], 1.0, device)
        self._frequency = _column([p.frequency_penalty for p in params], 0.0, device)
        self._presence = _column([p.presence_penalty for p in params], 0.0, device)
        self._counts = _counts([row.ids for row in rows], vocabulary).to(device)
        prompts = _counts([row.prompt_ids for row in rows], vocabulary).to(device)
        self._in_prompt = prompts > 0
        self._bias = self._biases(params, vocabulary).to(device) if any(p.logit_bias for p in params) else None
        self._hold = any(p.min_new_tokens for p in params)

    def __call__(self, logits: Tensor) -> Tensor:
        """The logits to sample from; ``logits`` stays as it was."""
        logits = logits.clone() if self._bias is None else logits + self._bias
        if self._hold:
            early = [(r, row) for r, row in enumerate(self.rows) if len(row.ids) < row.params.min_new_tokens]
            held = [(r, token) for r, row in early for token in row.stop_ids]
            if held:
                where = torch.tensor(held, device=logits.device)
                logits[where[:, 0], where[:, 1]] = float("-inf")
        written = self._counts > 0
        if self._repetition is not None:
            weaker = torch.where(logits > 0, logits / self._repetition, logits * self._repetition)
            logits = torch.where(self._in_prompt | written, weaker, logits)
        if self._frequency is not None:
            logits = logits - self._frequency * self._counts
        if self._presence is not None:
            logits = logits - self._presence * written
        return logits

    def saw(self, tokens: Tensor) -> None:
        """Counts the tokens just sampled, ``[R, 1]``."""
        self._counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=self._counts.dtype))

    @staticmethod
    def _biases(params: Sequence[SamplingParams], vocabulary: int) -> Tensor:
        bias = torch.zeros(len(params), vocabulary)
        for row, p in enumerate(params):
            for token, value in (p.logit_bias or {}).items():
                bias[row, token] = value
        return bias


def _shapes(p: SamplingParams) -> bool:
    return bool(
        p.min_new_tokens
        or p.logit_bias
        or p.repetition_penalty != 1.0
        or p.frequency_penalty != 0.0
        or p.presence_penalty != 0.0
    )


def _column(values: Sequence[float], off: float, device: torch.device) -> Tensor | None:
    """``[R, 1]``, or ``[1, 1]`` where all rows agree, or None where all are off."""
    distinct = set(values)
    if distinct == {off}:
        return None
    shown = values if len(distinct) > 1 else values[:1]
    return torch.tensor(shown, device=device)[:, None]


def _counts(rows: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """``[R, V]`` float32: how often each token occurs in each row."""
    counts = torch.zeros(len(rows), vocabulary)
    for row, ids in zip(counts, rows, strict=True):
        if ids:
            row += torch.bincount(torch.tensor(ids), minlength=vocabulary)
    return counts
