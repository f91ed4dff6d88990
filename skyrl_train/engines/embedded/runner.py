"""Runs the learner's model over the KV cache: prompts in, or one token a row; logits out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skyrl_train.engines.embedded.fused import FusedDecoder
from skyrl_train.engines.embedded.kv_cache import KVCache
from skyrl_train.engines.embedded.plans import DecodePlan, PrefillPlan
from skyrl_train.models.attention import no_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel
KEEP_LIMIT = 256 * 2**20
"""Bytes of cache that stay allocated between steps of training, on the CPU."""


class Runner:
    """The model's own forward with a plan; for the models that ``fused.py`` knows, a shorter decoding step."""

    def __init__(
        self, model: PreTrainedModel, cache: KVCache, *, autocast_dtype: torch.dtype | None, fused: bool = True
    ) -> None:
        self.model, self.cache, self.autocast_dtype = model, cache, autocast_dtype
        self.device = next(model.parameters()).device
        head: Any = model.get_output_embeddings()
        self.vocabulary = int(head.weight.shape[0])
        self.fused = FusedDecoder.of(model, autocast_dtype) if fused else None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Everything below runs inside: no gradients, eval mode, autocast kept open so that weights are cast once."""
        was_training = self.model.training
        if was_training:
            self.model.eval()
        cast = nullcontext() if self.autocast_dtype is None else torch.autocast(self.device.type, self.autocast_dtype)
        try:
            with torch.inference_mode(), cast:
                if self.fused is not None:
                    self.fused.refresh()
                yield
        finally:
            if was_training:
                self.model.train()

    @contextmanager
    def scratch_cache(self, rows: int) -> Iterator[KVCache]:
        """A small cache in the place of the real one, for a trial."""
        real, self.cache = self.cache, KVCache(rows, self.cache.max_length)
        try:
            yield self.cache
        finally:
            self.cache = real

    def forget(self) -> None:
        """The weights have changed: drops whatever was computed with the old ones.

        No key or value outlives its request, so the cache's memory may stay. On a GPU the learner wants it; on the CPU
        a modest one is kept, since fresh pages cost more time than decoding into them does.
        """
        if self.device.type != "cpu" or self.cache.nbytes > KEEP_LIMIT:
            self.cache.release()
        if self.fused is not None:
            self.fused.forget()

    def prefill(self, start: int, prompts: Sequence[Sequence[int]], which: Sequence[int]) -> Tensor:
        """Writes prompt ``which[i]`` to row ``start + i``. Returns the next tokens' logits, ``[rows, V]`` float32."""
        plan = PrefillPlan(self.cache, start, [len(p) for p in prompts], which, self.device)
        ids = torch.tensor([token for p in prompts for token in p], device=self.device)
        logits = self._forward(ids[None], plan.positions[None], plan, logits_to_keep=plan.last)[0]
        return logits[torch.tensor(which, device=self.device)]

    def decode(self, tokens: Tensor, plan: DecodePlan) -> Tensor:
        """Feeds one token to each row, ``[R]``. Returns the next token's logits, ``[R, V]`` float32."""
        if self.fused is not None:
            return self.fused(tokens, plan)
        return self._forward(tokens[:, None], plan.positions[:, None], plan)[:, -1]

    def _forward(self, ids: Tensor, positions: Tensor, plan: PrefillPlan | DecodePlan, **kwargs: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=no_mask(ids),
            position_ids=positions,
            use_cache=False,
            plan=plan,
            **kwargs,
        )
        return out.logits.float()
