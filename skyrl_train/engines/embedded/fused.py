"""A decoding step of Llama, Mistral, Qwen2 and Qwen3 in about half the operator calls of the model's own forward.

On a small model a step costs what its calls cost, not what its arithmetic costs. This one reads the learner's
parameters, uses the same attention plan, and is compared with the model's forward when the engine is made
(``selfcheck.py``); every other model takes its own forward. R rows, H hidden size, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skyrl_train.engines.embedded.plans import DecodePlan
from skyrl_train.models.lora import has_adapter, merged_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KNOWN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
FIXED_ROPES = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose angles do not depend on how long the sequence is."""
PACK_LIMIT = 32 * 2**20
"""Bytes of parameters up to which those that read the same input are joined in one matrix. Larger models gain nothing
from it, and their parameters are not copied."""

Linear = tuple[Tensor, Tensor | None]


@dataclass(slots=True)
class _Layer:
    """One decoder layer's parameters. ``qkv`` and ``gate_up`` hold one joined matrix, or the separate ones."""

    norm_in: Tensor
    qkv: list[Linear]
    norm_heads: Tensor | None
    """``[heads + kv_heads, D]``: the q and k norms (Qwen3)."""
    out: Linear
    norm_mlp: Tensor
    gate_up: list[Linear]
    down: Linear
    window: int | None
    scale: float


class FusedDecoder:
    """``decoder(tokens, plan)`` equals ``model(tokens, plan=plan).logits`` up to rounding."""

    def __init__(self, model: PreTrainedModel, autocast_dtype: torch.dtype | None) -> None:
        self._model: Any = model
        self._autocast = autocast_dtype
        config: Any = model.config
        self._kv_heads = config.num_key_value_heads
        self._heads = config.num_attention_heads
        self._pack = sum(p.nbytes for p in model.parameters()) <= PACK_LIMIT
        self._versions: tuple[tuple[int, int], ...] = ()
        self._rope = torch.empty(0)

    @classmethod
    def of(cls, model: PreTrainedModel, autocast_dtype: torch.dtype | None) -> FusedDecoder | None:
        """A decoder for the model, or None where its own forward must be used."""
        config: Any = model.config
        if type(model).__name__ not in KNOWN or not type(model).__module__.startswith("transformers.models."):
            return None
        if config.hidden_act != "silu" or getattr(model.model.rotary_emb, "rope_type", None) not in FIXED_ROPES:  # pyright: ignore
            return None
        plain = all(type(m) is nn.Linear or not isinstance(m, nn.Linear) for m in model.modules()) and not any(
            m._forward_hooks or m._forward_pre_hooks for m in model.modules()
        )
        odd = any(p.is_inference() for p in model.parameters())
        made = cls(model, autocast_dtype) if plain and not odd else None
        # An adapter is merged into copies of the weights: affordable for a small model, and exact in float32 alone.
        return made if not has_adapter(model) or (made is not None and made._pack and autocast_dtype is None) else None

    def forget(self) -> None:
        """The parameters may have changed, or been exchanged for others: the next ``refresh`` rereads them."""
        self._versions = ()

    def refresh(self) -> None:
        """Rereads the parameters if any changed since the last time. Called before every burst of steps."""
        versions = tuple((p.data_ptr(), p._version) for p in self._model.parameters())
        if versions != self._versions:
            self._versions = versions
            self._read()

    def __call__(self, tokens: Tensor, plan: DecodePlan) -> Tensor:
        """``tokens`` is ``[R]``. Returns ``[R, V]`` float32."""
        x = F.embedding(tokens, self._embedding)
        rope = self._angles(plan).index_select(0, plan.positions)
        cos, sin = rope[:, None, : self._width], rope[:, None, self._width :]
        for index, layer in enumerate(self._layers):
            x = self._attention(index, layer, x, cos, sin, plan)
            gate_up = _apply(layer.gate_up, self._norm(x, layer.norm_mlp))
            gate, up = gate_up.chunk(2, -1)
            x = self._add(x, F.silu(gate).mul_(up), layer.down)
        return F.linear(self._norm(x, self._norm_out), *self._head).float()

    def _attention(self, index: int, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, plan: DecodePlan) -> Tensor:
        rows, width = x.shape[0], self._width
        both = self._heads + self._kv_heads
        qkv = _apply(layer.qkv, self._norm(x, layer.norm_in))
        qk = qkv[:, : both * width].unflatten(1, (both, width))
        v = qkv[:, both * width :].unflatten(1, (self._kv_heads, 1, width))
        if layer.norm_heads is not None:
            qk = self._norm(qk, layer.norm_heads)
        qk = torch.addcmul(qk * cos, qk.roll(width // 2, -1), sin)[:, :, None]
        seen = plan.attend(index, qk[:, : self._heads], qk[:, self._heads :], v, scale=layer.scale, window=layer.window)
        return self._add(x, seen.view(rows, -1), layer.out)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm. ``weight`` carries the factor sqrt(n), so ``x / sqrt(|x|^2 + n eps) * weight`` is all of it."""
        if x.dtype != torch.float32:
            wide = x.float()
            length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            return (wide.div(torch.hypot(length, self._epsilon[x.shape[-1]])) * weight).to(x.dtype)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x.div(torch.hypot(length, self._epsilon[x.shape[-1]])).mul_(weight)

    def _add(self, x: Tensor, y: Tensor, linear: Linear) -> Tensor:
        weight, bias = linear
        if bias is None and self._autocast is None:
            return torch.addmm(x, y, weight.t())
        return x + F.linear(y, weight, bias)

    def _angles(self, plan: DecodePlan) -> Tensor:
        """``[P, 2 D]``: the cosines of each position and its sines, these with the sign of ``rotate_half``."""
        if plan.span > self._rope.shape[0]:
            length = 1 << (plan.span + 63).bit_length()
            positions = torch.arange(length, device=self._embedding.device)[None]
            cos, sin = self._model.model.rotary_emb(self._embedding[:1, None], positions)
            half = sin.shape[-1] // 2
            self._rope = torch.cat((cos[0], -sin[0, :, :half], sin[0, :, half:]), -1)
        return self._rope

    def _read(self) -> None:
        body, config = self._model.model, self._model.config
        self._embedding = body.embed_tokens.weight
        device = self._embedding.device
        first = body.layers[0].self_attn
        self._width = int(first.head_dim)
        sizes = {self._width, self._embedding.shape[1]}
        self._epsilon = {n: torch.tensor(math.sqrt(n * config.rms_norm_eps), device=device) for n in sizes}
        self._layers = [self._read_layer(layer) for layer in body.layers]
        self._norm_out = _norm_weight(body.norm)
        self._head = self._cast(self._model.lm_head)
        self._rope = torch.empty(0)

    def _read_layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norm_heads = None
        if hasattr(attention, "q_norm"):
            q, k = _norm_weight(attention.q_norm), _norm_weight(attention.k_norm)
            norm_heads = torch.cat((q.expand(self._heads, -1), k.expand(self._kv_heads, -1)))
        window = getattr(attention, "sliding_window", None)
        if type(self._model).__name__ == "MistralForCausalLM":
            window = self._model.config.sliding_window
        return _Layer(
            norm_in=_norm_weight(layer.input_layernorm),
            qkv=self._joined(attention.q_proj, attention.k_proj, attention.v_proj),
            norm_heads=norm_heads,
            out=self._cast(attention.o_proj),
            norm_mlp=_norm_weight(layer.post_attention_layernorm),
            gate_up=self._joined(mlp.gate_proj, mlp.up_proj),
            down=self._cast(mlp.down_proj),
            window=window,
            scale=attention.scaling,
        )

    def _joined(self, *modules: nn.Linear) -> list[Linear]:
        if not self._pack:
            return [self._cast(module) for module in modules]
        weight = torch.cat(tuple(_weight(module) for module in modules))
        biases = tuple(module.bias for module in modules if module.bias is not None)
        bias = torch.cat(biases) if biases else None
        if self._autocast is None:
            return [(weight, bias)]
        return [(weight.to(self._autocast), None if bias is None else bias.to(self._autocast))]

    def _cast(self, module: nn.Linear) -> Linear:
        return _weight(module), module.bias  # autocast casts a parameter once a burst and remembers it


def _apply(linears: list[Linear], x: Tensor) -> Tensor:
    if len(linears) == 1:
        return F.linear(x, *linears[0])
    return torch.cat([F.linear(x, weight, bias) for weight, bias in linears], -1)


def _weight(module: Any) -> Tensor:
    return merged_weight(module) if hasattr(module, "lora_A") else module.weight


def _norm_weight(norm: Any) -> Tensor:
    weight = norm.weight
    return weight.float() * math.sqrt(weight.shape[0])
