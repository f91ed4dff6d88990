"""Log-probs and entropy of response tokens: packed, and the plain padded way that says what packed must equal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skyrl_train.batch import TrainBatch
from skyrl_train.models.attention import no_mask
from skyrl_train.models.packing import Packed, pack
from skyrl_train.models.projection import answering, numbers_of, projected_logprobs, worth_it
from skyrl_train.models.sampled import SampledDistribution, SeenTokens
from skyrl_train.models.sequence_parallel import SequenceSplit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 1 << 22
"""Logits worked on at a time: their float32 copies take 16 MiB each, whatever the vocabulary."""
PROJECTS = "_skyrl_projects"
"""Set to False on a model whose logits are not just what its output layer gives (scaled, or capped)."""


def score(
    model: PreTrainedModel,
    batch: TrainBatch,
    *,
    temperature: float,
    packed: bool,
    with_entropy: bool,
    sampled: SampledDistribution | None = None,
    compiled: bool = False,
    split: SequenceSplit | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the response tokens under the distribution that was sampled from, with gradient.

    Args:
        model: on the device where the batch is.
        temperature: of the sampling; 0 (greedy) is taken as 1, as the engines report it.
        packed: no padding, shared prompts once. False runs the padded specification.
        with_entropy: also the entropy of each token's distribution, in nats.
        sampled: how the engine changed ``softmax(logits / temperature)``; None: not at all.
        compiled: the work on logits by kernels of ``torch.compile``, where they are many.
        split: the workers that have the packed row together; each gets all numbers, and its own tokens' gradient.

    Returns:
        ``[B, T]`` float32 log-probs and entropy (or None), 0 where ``response_mask`` is 0.
    """
    head = _head(model, batch, temperature or 1.0, with_entropy, sampled, compiled)
    logprobs, entropy = _numbers(model, batch, head, packed, split)[:2]
    assert logprobs is not None
    return logprobs, entropy


def score_both(
    model: PreTrainedModel,
    batch: TrainBatch,
    *,
    temperature: float,
    packed: bool,
    sampled: SampledDistribution,
    split: SequenceSplit | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs under the distribution that was sampled from, and those that engines report, ``[B, T]`` each."""
    logprobs, _, plain = _numbers(model, batch, _head(model, batch, temperature, False, sampled), packed, split)
    assert logprobs is not None and plain is not None
    return logprobs, plain


@dataclass(frozen=True, slots=True)
class Plain:
    """The head of a distribution that no engine has changed."""

    temperature: float
    with_entropy: bool
    compiled: bool = False

    def __call__(self, logits: Tensor, targets: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor | None, ...]:
        return token_logprobs(logits, targets, self.temperature, self.with_entropy)

    def projected(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, packed: Packed
    ) -> tuple[Tensor | None, ...]:
        """The same of ``[M, H]`` hidden states, without holding the logits."""
        logprobs, entropy = projected_logprobs(
            hidden, weight, bias, packed.targets, self.temperature, compiled=self.compiled
        )
        return logprobs, entropy if self.with_entropy else None


@dataclass(frozen=True, slots=True)
class Changed:
    """The head of a distribution that the engine has changed."""

    change: SampledDistribution
    temperature: float
    with_entropy: bool
    seen: SeenTokens | None

    def __call__(self, logits: Tensor, targets: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor | None, ...]:
        seen = None if self.seen is None else self.seen.before(rows, columns)
        return self.change.logprobs(logits, targets, self.temperature, self.with_entropy, seen)

    def projected(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, packed: Packed
    ) -> tuple[Tensor | None, ...]:
        """See ``Plain``."""

        def numbers(logits: Tensor, part: slice) -> tuple[Tensor | None, ...]:
            return self(logits, packed.targets[part], packed.rows[part], packed.columns[part])

        return numbers_of(hidden, weight, bias, numbers)


Head = Plain | Changed
"""``(logits [N, V], targets [N], rows [N], columns [N])`` to numbers for each target; rows and columns say which token
of the batch a target is."""


def _head(
    model: PreTrainedModel, batch: TrainBatch, temperature: float, with_entropy: bool,
    sampled: SampledDistribution | None, compiled: bool = False,
) -> Head:  # fmt: skip
    if sampled is None:
        return Plain(temperature, with_entropy, compiled)
    vocabulary = model.config.get_text_config().vocab_size
    seen = SeenTokens(batch, vocabulary) if sampled.repetition_penalty != 1.0 else None
    return Changed(sampled, temperature, with_entropy, seen)


def _projects(model: PreTrainedModel, tokens: int) -> bool:
    """Whether hidden states are projected in chunks: the logits are many, and the model leaves them as they are."""
    layer: Any = model.get_output_embeddings()
    plain = isinstance(layer, torch.nn.Linear) and not hasattr(layer, "lora_A")
    return plain and getattr(model, PROJECTS, True) and worth_it(tokens, layer.out_features)


def _numbers(
    model: PreTrainedModel, batch: TrainBatch, head: Head, packed: bool, split: SequenceSplit | None
) -> tuple[Tensor | None, ...]:
    """What ``head`` makes of the logits, ``[B, T]`` each, 0 where ``response_mask`` is 0."""
    assert packed or split is None, "padded rows are not split"
    found = _packed(model, batch, head, split) if packed else _padded(model, batch, head)
    return tuple(None if values is None else torch.where(batch.response_mask, values, 0.0) for values in found)


def _packed(
    model: PreTrainedModel, batch: TrainBatch, head: Head, split: SequenceSplit | None
) -> tuple[Tensor | None, ...]:
    packed = pack(*sequences(batch), device=batch.response_ids.device, split=split)
    inputs = {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "attention_mask": no_mask(packed.input_ids),
        "plan": packed.plan,
        "logits_to_keep": packed.score_index,
        "use_cache": False,
    }
    if _projects(model, len(packed.targets)):
        found = _projected(model, inputs, packed, head)
    else:
        found = head(model(**inputs).logits[0], packed.targets, packed.rows, packed.columns)
    width = batch.response_ids.shape[1] - packed.shape[1]

    def spread(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(packed.unpack(values), (0, width))

    return tuple(None if values is None else spread(values) for values in found)


def _projected(model: PreTrainedModel, inputs: dict[str, Any], packed: Packed, head: Head) -> tuple[Tensor | None, ...]:
    """What ``head`` makes of the logits, without holding them."""

    def answer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        numbers = head.projected(hidden[0], weight, bias, packed)
        return torch.stack([values for values in numbers if values is not None], -1)[None]

    layer: Any = model.get_output_embeddings()
    with answering(layer, answer):
        logprobs, *others = model(**inputs).logits[0].unbind(-1)
    return (logprobs, *others) if head.with_entropy else (logprobs, None, *others)


def sequences(batch: TrainBatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts and responses without padding, as they are on the CPU: to copy them from a GPU is to wait for it."""
    batch = batch.host or batch
    prompt_ids, response_ids = batch.prompt_ids.cpu().numpy(), batch.response_ids.cpu().numpy()
    starts = (batch.prompt_ids.shape[1] - batch.prompt_lengths).tolist()
    ends = batch.response_mask.sum(1).tolist()
    prompts = [row[start:] for row, start in zip(prompt_ids, starts, strict=True)]
    responses = [row[:end] for row, end in zip(response_ids, ends, strict=True)]
    return prompts, responses


def _padded(model: PreTrainedModel, batch: TrainBatch, head: Head) -> tuple[Tensor | None, ...]:
    logits = model(**padded_inputs(batch), use_cache=False).logits[:, batch.prompt_ids.shape[1] - 1 : -1]
    shape = batch.response_ids.shape
    rows, columns = (index.flatten() for index in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    device = logits.device
    found = head(logits.flatten(0, 1), batch.response_ids.flatten(), rows.to(device), columns.to(device))
    return tuple(None if values is None else values.view(shape) for values in found)


def padded_inputs(batch: TrainBatch) -> dict[str, Tensor]:
    """Prompts and responses side by side, for a forward pass of any transformers model."""
    width = batch.prompt_ids.shape[1]
    place = torch.arange(width, device=batch.prompt_ids.device)
    prompt_mask = place >= width - batch.prompt_lengths[:, None]
    mask = torch.cat([prompt_mask, batch.response_mask], dim=1)
    return {
        "input_ids": torch.cat([batch.prompt_ids, batch.response_ids], dim=1),
        "attention_mask": mask.long(),
        "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0),
    }


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """``log softmax(logits / temperature)`` at ``targets``, and the entropy, in float32.

    Args:
        logits: ``[..., V]``.
        targets: ``[...]``.
    """
    logprobs, entropy = _TokenLogprobs.apply(logits, targets, temperature, with_entropy)  # pyright: ignore
    return logprobs, entropy if with_entropy else None


class _TokenLogprobs(torch.autograd.Function):
    """Keeps the logits alone for the backward pass, where autograd would keep several tensors of their size.

    With x = logits / T, p = softmax(x), lp = log p, H = -sum p lp:
    d lp_y / d logit_j = (1[j = y] - p_j) / T and d H / d logit_j = -p_j (lp_j + H) / T.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        shape, flat, index = targets.shape, logits.flatten(0, -2), targets.flatten()
        normalizer = torch.empty(len(flat), dtype=torch.float32, device=logits.device)
        entropy = torch.empty_like(normalizer if with_entropy else normalizer[:0])
        chosen = torch.empty_like(normalizer)
        for rows in _row_chunks(flat):
            x = flat[rows].float() / temperature
            normalizer[rows] = z = x.logsumexp(-1)
            chosen[rows] = x.gather(-1, index[rows, None]).squeeze(-1) - z
            if with_entropy:
                lp = x.sub_(z[:, None])
                entropy[rows] = -(lp.exp() * lp).sum(-1)
        ctx.save_for_backward(flat, index, normalizer, entropy)
        ctx.temperature, ctx.shape = temperature, logits.shape
        return chosen.view(shape), entropy.view(shape) if with_entropy else entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch writes ctx as positional only
        ctx: Any, *gradients: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        flat, index, normalizer, entropy = ctx.saved_tensors
        grad, grad_entropy = (None if g is None else g.flatten()[:, None] for g in gradients)
        result = torch.empty_like(flat)
        for rows in _row_chunks(flat):
            lp = (flat[rows].float() / ctx.temperature).sub_(normalizer[rows, None])
            p = lp.exp()
            total = (
                torch.zeros_like(p) if grad_entropy is None else p * lp.add_(entropy[rows, None]) * -grad_entropy[rows]
            )
            if grad is not None:
                total.addcmul_(p, grad[rows], value=-1).scatter_add_(-1, index[rows, None], grad[rows])
            result[rows] = total.div_(ctx.temperature)
        return result.view(ctx.shape), None, None, None


def _row_chunks(flat: Tensor) -> Iterator[slice]:
    """Slices of rows of which each has about ``CHUNK`` elements: what is computed in float32 at a time."""
    size = max(1, CHUNK // flat.shape[-1])
    return (slice(start, start + size) for start in range(0, len(flat), size))
