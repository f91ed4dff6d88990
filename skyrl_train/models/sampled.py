"""Log-probs under the distribution that was really sampled from, where that is not ``softmax(logits / temperature)``.

With top-p, top-k, min-p, a repetition penalty or a logit bias, an engine draws from a changed distribution, and reports
the log-prob under the unchanged one (SGLang: one that the bias alone has changed). A ratio of those is not the
importance ratio of the tokens drawn. So the learner makes the same change, in the same order, before it scores::

    logits ── bias, repetition penalty ── / temperature ── top-k, top-p, min-p ── renormalise ──> log-prob

Which tokens are left is decided at the weights of the moment, and counts as given: no gradient flows through the
choice. The token that was drawn is always counted among them. So one that the policy has since put out of reach has a
finite ratio, and is pushed or pulled like any other.

R rows of logits (response tokens), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skyrl_train.batch import TrainBatch
from skyrl_train.config.backend import resolve_backend
from skyrl_train.models.truncation import kept

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config

CHUNK = 1 << 21
"""Logits worked on at a time: sorting them takes several tensors of their size."""
NEVER = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledDistribution:
    """What the engine does to the policy's distribution before it draws."""

    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    joint: bool = False
    """See ``truncation.kept``."""
    bias_reported: bool = False
    """The log-probs that the engine reports are those after ``logit_bias``, as SGLang's; else those before it."""

    @classmethod
    def of(cls, config: Config) -> SampledDistribution | None:
        """That of training, or None where nothing is changed."""
        params = config.generator.sampling_params
        if params.temperature == 0:
            return None  # greedy: nothing is drawn
        served = resolve_backend(config) == "sglang"
        made = cls(
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            # A server counts the tokens of its own completion only, one late, and forgets them when interrupted.
            repetition_penalty=1.0 if served else params.repetition_penalty,
            logit_bias=tuple(sorted((int(k), v) for k, v in (params.logit_bias or {}).items())),
            # SGLang's kernels renormalise after top-k only where there is a min-p too.
            joint=served and params.min_p == 0,
            bias_reported=served and bool(params.logit_bias),
        )
        return None if made == cls(joint=made.joint) else made

    def logprobs(
        self, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool, seen: Seen | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probs of ``targets``, the entropy, and the log-probs as engines report them (no gradient), in float32.

        Args:
            logits: ``[R, V]``.
            targets: ``[R]``.
            seen: needed with a repetition penalty; of these rows.
        """
        sampled, entropy, plain = _SampledLogprobs.apply(logits, targets, temperature, with_entropy, self, seen)  # pyright: ignore
        return sampled, entropy if with_entropy else None, plain

    def change(
        self, logits: Tensor, targets: Tensor, temperature: float, seen: Tensor | None
    ) -> tuple[Tensor, Tensor | float]:
        """The changed logits, -inf where a token is not left, and their derivative by the logits given.

        Args:
            logits: ``[R, V]`` float32.
            seen: ``[R, V]`` bool: tokens that the repetition penalty makes less likely.
        """
        slope: Tensor | float = 1.0 / temperature
        logits = self._biased(logits)
        if seen is not None:
            factor = torch.where(logits > 0, 1 / self.repetition_penalty, self.repetition_penalty)
            factor = torch.where(seen, factor, 1.0)
            logits, slope = logits * factor, factor * slope
        x = logits / temperature
        left = self._left(x).scatter_(1, targets[:, None], True)
        return x.masked_fill(~left, -torch.inf), slope

    def reported(self, logits: Tensor, temperature: float) -> Tensor:
        """The distribution whose log-probs engines report, ``[R, V]`` log-probs."""
        return ((self._biased(logits) if self.bias_reported else logits) / temperature).log_softmax(-1)

    def _biased(self, logits: Tensor) -> Tensor:
        if not self.logit_bias:
            return logits
        ids, values = zip(*self.logit_bias, strict=True)
        places = torch.tensor(ids, device=logits.device)
        return logits.index_add(1, places, logits.new_tensor(values).expand(len(logits), -1))

    def _left(self, x: Tensor) -> Tensor:
        def column(value: float, off: float) -> Tensor | None:
            return None if value == off else x.new_tensor([[value]])

        top_k = None if self.top_k < 1 else torch.tensor([[self.top_k]], device=x.device)
        top_p, min_p = column(self.top_p, 1.0), column(self.min_p, 0.0)
        return kept(x.softmax(-1), top_k, top_p, min_p, joint=self.joint)


class SeenTokens:
    """Which tokens stand before each response token, in the prompt or in the response.

    Args:
        batch: on the device of the logits.
        vocabulary: V.
    """

    def __init__(self, batch: TrainBatch, vocabulary: int) -> None:
        width = batch.prompt_ids.shape[1]
        place = torch.arange(width, device=batch.prompt_ids.device)
        last = batch.prompt_ids[:, -1:]  # stands in for the padding, which was never there
        prompts = torch.where(place >= width - batch.prompt_lengths[:, None], batch.prompt_ids, last)
        first = torch.full((len(batch), vocabulary), NEVER, dtype=torch.int32, device=prompts.device)
        number = torch.arange(batch.response_ids.shape[1], dtype=torch.int32, device=prompts.device)
        first.scatter_reduce_(1, batch.response_ids, number.expand(batch.response_ids.shape), "amin")
        self.first = first.scatter_(1, prompts, -1)
        """``[B, V]``: where in the response a token is first met; -1 in the prompt."""

    def before(self, rows: Tensor, columns: Tensor) -> Seen:
        """
        Args:
            rows, columns: ``[R]``: which response token a row of logits predicts.
        """
        return Seen(self.first, rows, columns)


@dataclass(frozen=True, slots=True)
class Seen:
    """Tokens seen before some response tokens."""

    first: Tensor
    rows: Tensor
    columns: Tensor

    def __getitem__(self, chunk: slice) -> Tensor:
        """``[R, V]`` bool for a slice of rows."""
        return self.first[self.rows[chunk]] < self.columns[chunk, None]


class _SampledLogprobs(torch.autograd.Function):
    """Keeps the logits alone for the backward pass, as ``scoring._TokenLogprobs``, whose formulas these are.

    With x the changed logits, s their derivative, p = softmax(x), lp = log p, H = -sum p lp over the tokens left:
    d lp_y / d logit_j = s_j (1[j = y] - p_j) and d H / d logit_j = -s_j p_j (lp_j + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        change: SampledDistribution,
        seen: Seen | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        normalizer = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        sampled, plain = torch.empty_like(normalizer), torch.empty_like(normalizer)
        entropy = torch.empty_like(normalizer if with_entropy else normalizer[:0])
        for rows in _chunks(logits):
            y, raw = targets[rows], logits[rows].float()
            plain[rows] = change.reported(raw, temperature).gather(-1, y[:, None])[:, 0]
            x, _ = change.change(raw, y, temperature, None if seen is None else seen[rows])
            normalizer[rows] = z = x.logsumexp(-1)
            sampled[rows] = x.gather(-1, y[:, None])[:, 0] - z
            if with_entropy:
                lp = x - z[:, None]
                entropy[rows] = -torch.where(lp > -torch.inf, lp.exp() * lp, 0.0).sum(-1)
        ctx.save_for_backward(logits, targets, normalizer, entropy)
        ctx.settings = temperature, change, seen
        ctx.mark_non_differentiable(plain)
        return sampled, entropy, plain

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch writes ctx as positional only
        ctx: Any, *gradients: Tensor | None
    ) -> tuple[Tensor, None, None, None, None, None]:
        logits, targets, normalizer, entropy = ctx.saved_tensors
        temperature, change, seen = ctx.settings
        grad, grad_entropy = (None if g is None else g[:, None] for g in gradients[:2])
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            y = targets[rows]
            x, slope = change.change(logits[rows].float(), y, temperature, None if seen is None else seen[rows])
            lp = x - normalizer[rows, None]
            p = lp.exp()
            total = torch.zeros_like(p)
            if grad_entropy is not None:
                weighed = p * (lp + entropy[rows, None])
                total = torch.where(p > 0, weighed, 0.0) * -grad_entropy[rows]
            if grad is not None:
                total.addcmul_(p, grad[rows], value=-1).scatter_add_(-1, y[:, None], grad[rows])
            result[rows] = total * slope
        return result, None, None, None, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows of which each has about ``CHUNK`` elements."""
    size = max(1, CHUNK // logits.shape[-1])
    return (slice(start, start + size) for start in range(0, len(logits), size))
