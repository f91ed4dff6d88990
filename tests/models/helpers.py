"""Tiny models of several families, batches of ragged sequences, and gradients to compare."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from skyrl_train.batch import TrainBatch
from skyrl_train.models.attention import NAME

VOCABULARY = 37
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide enough that attention decides the next token
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "qwen3": {"head_dim": 8},
    "qwen3-tied": {"head_dim": 8, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "llama": {},
    "mistral": {"sliding_window": 5},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
    "olmo2": {},
    "gpt2": GPT2 | {"embd_pdrop": 0.0},
}


def make_model(family: str = "qwen3", *, attention: str = NAME, **changes) -> PreTrainedModel:
    """A model of the family with random weights; equal arguments make equal weights."""
    name = family.split("-")[0]
    sizes = SIZES | FAMILIES.get(family, {}) | changes
    if name == "gpt2":
        sizes = {k: v for k, v in sizes.items() if k not in ("num_key_value_heads", "hidden_size", "intermediate_size")}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def make_batch(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], width: int = 0) -> TrainBatch:
    """The sequences as a batch, responses padded to the longest or to ``width``."""
    left, right = max(map(len, prompts)), max(1, width, *map(len, responses))
    lengths = torch.tensor([len(r) for r in responses])
    mask = torch.arange(right) < lengths[:, None]
    zeros = torch.zeros(len(prompts), right)
    return TrainBatch(
        prompt_ids=torch.tensor([[0] * (left - len(p)) + list(p) for p in prompts]),
        prompt_lengths=torch.tensor([len(p) for p in prompts]),
        response_ids=torch.tensor([list(r) + [0] * (right - len(r)) for r in responses]),
        response_mask=mask,
        loss_mask=mask,
        rollout_logprobs=zeros,
        rewards=zeros,
        group=torch.zeros(len(prompts), dtype=torch.long),
    )


def ragged(seed: int = 0) -> TrainBatch:
    """Seven sequences of three prompts, 1 to 40 response tokens."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (length,), generator=draw).tolist()

    three = [tokens(n) for n in (4, 11, 1)]
    lengths = (9, 40, 3, 1, 17, 8, 25)
    return make_batch([three[i] for i in (0, 0, 0, 1, 1, 2, 2)], [tokens(n) for n in lengths])


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two gradients, relative to the norm of the first."""
    assert a.keys() == b.keys()
    norm = torch.stack([g.norm() for g in a.values()]).norm()
    return max((a[name] - b[name]).abs().max() for name in a).item() / norm.item()
