"""Before the first request: does this model, run over the cache, give what its plain forward gives?

transformers knows hundreds of architectures, and not all keep all their memory in attention. A dozen tokens tell.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from skyrl_train.engines.embedded.kv_cache import KVCache
from skyrl_train.engines.embedded.plans import DecodePlan
from skyrl_train.engines.embedded.runner import Runner
from skyrl_train.errors import ModelError
from skyrl_train.models.attention import NAME

log = logging.getLogger(__name__)

LENGTHS = (5, 9, 2)
STEPS = 3
FOREIGN = (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError, LookupError)
"""What a model may raise that knows nothing of plans."""


def check_model(runner: Runner) -> None:
    """Compares the runner with the plain forward; a fused step that differs is turned off.

    Raises:
        ModelError: the model cannot be run over a cache of keys and values.
    """
    config: Any = runner.model.config
    if config._attn_implementation != NAME:
        raise ModelError(
            f"The embedded engine needs a model loaded with attn_implementation={NAME!r}; this one has "
            f"{config._attn_implementation!r}."
        )
    lengths = [max(1, min(n, runner.cache.max_length - STEPS)) for n in LENGTHS]
    rows = [[(7 * row + 3 * i + 1) % runner.vocabulary for i in range(n + STEPS)] for row, n in enumerate(lengths)]
    with runner.computing():
        try:
            plain = [runner.model(input_ids=torch.tensor([r], device=runner.device), use_cache=False) for r in rows]
            expected = [out.logits[0].float() for out in plain]
            fused, runner.fused = runner.fused, None
            gap = _gap(runner, rows, lengths, expected)
        except ModelError:
            raise
        except FOREIGN as error:
            raise ModelError(_refusal(runner, f"{type(error).__name__}: {error}")) from error
        if not all(e.isfinite().all() for e in expected):
            raise ModelError(
                f"{type(runner.model).__name__}: the model's own logits are not finite. Its weights hold NaN or "
                "overflow; load another checkpoint."
            )
        allowed = _allowed(runner, expected)
        if not gap <= allowed:
            raise ModelError(_refusal(runner, f"its logits differ from the plain forward by {gap:.2g}"))
        if fused is not None:
            runner.fused = fused
            try:
                gap = _gap(runner, rows, lengths, expected)
            except FOREIGN:
                gap = math.inf
            if not gap <= allowed:
                runner.fused = None
                log.warning("embedded engine: the short decoding step does not fit this model (%.2g); it is off", gap)


def _gap(runner: Runner, rows: list[list[int]], lengths: list[int], expected: list[Tensor]) -> float:
    """Largest difference of a logit, over prompts of several lengths, some steps, and a row that moves."""
    with runner.scratch_cache(len(rows)) as cache:
        cache.reserve(len(rows), max(map(len, rows)))
        return _gap_over(runner, cache, rows, lengths, expected)


def _gap_over(
    runner: Runner, cache: KVCache, rows: list[list[int]], lengths: list[int], expected: list[Tensor]
) -> float:
    live = list(range(len(rows)))
    logits = runner.prefill(0, [r[:n] for r, n in zip(rows, lengths, strict=True)], live)
    _check_layers(runner)
    gaps = [_difference(logits, [expected[r][lengths[r] - 1] for r in live])]
    for step in range(STEPS):
        if step == 1:  # the first row ends, the last moves into its place
            cache.move([2], [0], lengths[2] + step)
            live = [2, 1]
        places = [lengths[r] + step for r in live]
        plan = DecodePlan(cache, places, runner.device)
        tokens = torch.tensor([rows[r][at] for r, at in zip(live, places, strict=True)], device=runner.device)
        logits = runner.decode(tokens, plan)
        gaps.append(_difference(logits, [expected[r][at] for r, at in zip(live, places, strict=True)]))
    return float(torch.stack(gaps).max())


def _check_layers(runner: Runner) -> None:
    config: Any = runner.model.config.get_text_config()
    seen, layers = runner.cache.layers, list(range(config.num_hidden_layers))
    if seen != layers:
        missing = sorted(set(layers) - set(seen))
        raise ModelError(_refusal(runner, f"layers {missing} keep their memory elsewhere than in attention"))


def _difference(found: Tensor, expected: list[Tensor]) -> Tensor:
    return (found - torch.stack(expected)).abs().max()


def _allowed(runner: Runner, expected: list[Tensor]) -> float:
    largest = max(1.0, max(float(e.abs().max()) for e in expected))
    exact = runner.autocast_dtype is None and all(p.dtype == torch.float32 for p in runner.model.parameters())
    on_gpu = runner.device.type == "cuda"  # whose float32 matrix products may be TF32
    return (1e-2 if exact and on_gpu else 1e-4 if exact else 0.1) * largest


def _refusal(runner: Runner, reason: str) -> str:
    return (
        f"The embedded engine cannot run {type(runner.model).__name__}: {reason}. "
        "Set generator.backend=sglang or generator.backend=vllm."
    )
