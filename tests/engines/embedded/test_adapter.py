"""The engine samples from the policy with its adapter, and from what the adapter becomes."""

import pytest
import torch

from skyrl_train.config.models import LoraConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.models.lora import adapted_layers, adapter_off, add_adapter

from .tiny import gap, make_model, make_prompts, make_request, serve

FAMILIES = ["qwen3", "qwen3-tied", "llama-bias", "qwen2", "gemma3_text", "gpt2", "qwen3_moe"]
FUSED = FAMILIES[:4]


def learn(model, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B["default"].weight.normal_(std=0.2)


def largest(model, answers, prompts) -> float:
    return max(gap(model, prompt, answer, 0.8) for prompt, (answer,) in zip(prompts, answers, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_samples_with_the_adapter_as_it_is_now(family):
    model = make_model(family)
    add_adapter(model, LoraConfig(rank=4), "lora")
    engine = EmbeddedEngine(model, deterministic=False)
    assert (engine.core.runner.fused is not None) == (family in FUSED)
    prompts = make_prompts(5)
    for seed in range(2):
        learn(model, seed)
        answers = serve(
            engine, [make_request(f"{seed}/{i}", p, seed=i, temperature=0.8) for i, p in enumerate(prompts)]
        )
        assert largest(model, answers, prompts) < 1e-4
        with adapter_off(model):
            assert largest(model, answers, prompts) > 0.1  # it was not the base that sampled


@pytest.mark.parametrize(("limit", "dtype"), [(0, None), (2**20, torch.bfloat16)])
def test_where_merging_costs_memory_or_precision_the_models_own_forward_runs(monkeypatch, limit, dtype):
    monkeypatch.setattr("skyrl_train.engines.embedded.fused.PACK_LIMIT", limit)
    model = make_model()
    add_adapter(model, LoraConfig(rank=4), "lora")
    learn(model, 0)
    engine = EmbeddedEngine(model, deterministic=False, autocast_dtype=dtype)
    assert engine.core.runner.fused is None
    ((answer,),) = serve(engine, [make_request("a", [5, 6, 7], seed=1)])
    assert gap(model, [5, 6, 7], answer) < (1e-4 if dtype is None else 0.3)
