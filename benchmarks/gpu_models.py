"""Models of real shapes with random weights, made where the benchmark runs, and the FLOPs that they take."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int = 151936
    tied: bool = True

    @property
    def per_layer(self) -> int:
        """Weights of a layer that multiply every token."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.inner

    def flops(self, lengths: list[int], scored: int, *, frozen: bool = False) -> dict[str, float]:
        """FLOPs of one forward and backward pass; what is recomputed does not count.

        A product with a weight W takes 2 |W| a token forward, and as much for each of its two gradients. Attention
        takes 2 products of 2 S heads head_dim a token forward, S the tokens that it sees, and twice that backward.

        Args:
            lengths: tokens of each sequence.
            scored: tokens whose logits are computed.
            frozen: of a frozen weight there is no gradient: 4 |W| in place of 6.
        """
        tokens, width = sum(lengths), self.heads * self.head_dim
        weights = self.layers * self.per_layer * tokens + self.hidden * self.vocabulary * scored
        seen = sum(n * (n + 1) / 2 for n in lengths)
        return {
            "causal": 6 * weights + 12 * self.layers * width * seen,  # a token sees what is before it
            "full_attention": 6 * weights + 12 * self.layers * width * sum(n * n for n in lengths),  # PaLM's habit
            "needed": (4 if frozen else 6) * weights + 12 * self.layers * width * seen,
        }


SHAPES: dict[str, Shape] = {
    "0.6B": Shape(1024, 28, 16, 8, 128, 3072),
    "1.7B": Shape(2048, 28, 16, 8, 128, 6144),
    "4B": Shape(2560, 36, 32, 8, 128, 9728),
    "8B": Shape(4096, 36, 32, 8, 128, 12288, tied=False),
    "deep": Shape(64, 28, 4, 2, 16, 128, vocabulary=512),
    "tiny": Shape(64, 4, 4, 2, 16, 128, vocabulary=512),
}
"""The sizes of Qwen3; its layers with next to nothing in them; and one that any machine runs."""


def make(size: str, folder: Path, *, device: str = "cuda", **changes: Any) -> Path:
    """A Qwen3 of ``size`` with random bfloat16 weights and a small tokenizer, as an ordinary Hugging Face folder.

    Args:
        size: one of ``SHAPES``.
        changes: fields of the config that differ.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from skyrl_train.models.tokenizers import make_tokenizer

    if (folder / "config.json").exists():
        return folder
    shape = SHAPES[size]
    fields: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    tokenizer = make_tokenizer("char")
    config = Qwen3Config(
        **(fields | changes),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
