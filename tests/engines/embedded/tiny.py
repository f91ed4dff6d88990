"""Tiny models of several families, a byte tokenizer, and the plain forward that everything is compared with."""

import asyncio
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from skyrl_train.engines.base import Completion, Request, SamplingParams
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.models.attention import NAME

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,  # wide enough that attention decides the next token
    "eos_token_id": 0,
    "bos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
WINDOWS = ["full_attention", "sliding_attention"]
FAMILIES = {
    "qwen3": {"head_dim": 16},
    "qwen3-tied": {"head_dim": 16, "tie_word_embeddings": True},
    "llama": {},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "llama-mha": {"num_key_value_heads": 4},
    "llama-rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "layer_types": WINDOWS, "query_pre_attn_scalar": 16},
    "phi3": {},
    "olmo2": {},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def make_model(family: str = "qwen3", *, attention: str = NAME, seed: int = 0, **changes) -> torch.nn.Module:
    """A model of the family with random weights, float32, on the CPU. Equal arguments make equal weights."""
    name = family.split("-")[0]
    sizes = SIZES | FAMILIES.get(family, {}) | changes
    if name == "gpt2":
        sizes = {k: v for k, v in sizes.items() if k not in ("num_key_value_heads", "hidden_size", "intermediate_size")}
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[name](**sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token (ids 4 .. 259), so one letter of many alphabets is several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", "<bos>", "<pad>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    )


def make_prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    """Prompts of mixed lengths, 1 .. longest."""
    chance = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=chance).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=chance).tolist() for n in lengths]


def make_request(name: str, prompt: Sequence[int], *, session=None, order=(), **params) -> Request:
    """A request with ``SamplingParams(**params)``."""
    return Request(
        id=name,
        prompt_ids=prompt,
        params=SamplingParams(**({"max_new_tokens": 12} | params)),
        session=session,
        order=order,
    )


def serve(engine: EmbeddedEngine, requests: Sequence[Request]) -> list[list[Completion]]:
    """Sends the requests at once and waits for all."""

    async def together():
        return await asyncio.gather(*(engine.generate(r) for r in requests))

    return asyncio.run(together())


def plain_logprobs(model, prompt: Sequence[int], answer: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """The log-prob of each answer token by one ordinary forward over prompt and answer."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
    places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return logprobs[places, torch.tensor(list(answer))]


def gap(model, prompt: Sequence[int], completion: Completion, temperature: float = 1.0) -> float:
    """Largest difference between a completion's log-probs and the plain forward's."""
    found = torch.tensor(completion.logprobs)
    return float((found - plain_logprobs(model, prompt, completion.token_ids, temperature)).abs().max())
