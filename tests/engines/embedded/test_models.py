"""Every supported family: the engine samples from exactly the learner's distribution."""

import pytest
import torch

from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.errors import ModelError

from .tiny import FAMILIES, gap, make_model, make_prompts, make_request, serve

FUSED = {"qwen3", "qwen3-tied", "llama", "llama-bias", "llama-mha", "llama-rope", "qwen2", "qwen2-window", "mistral"}


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_plain_forward(family):
    model = make_model(family)
    engine = EmbeddedEngine(model, deterministic=False)
    assert (engine.core.runner.fused is not None) == (family in FUSED)
    prompts = make_prompts(9)
    answers = serve(engine, [make_request(str(i), p, seed=i, temperature=0.8) for i, p in enumerate(prompts)])
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        assert answer.token_ids
        assert gap(model, prompt, answer, 0.8) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_generate(family):
    model = make_model(family)
    prompts = make_prompts(6, seed=1)
    requests = [make_request(str(i), p, temperature=0.0, max_new_tokens=20) for i, p in enumerate(prompts)]
    answers = serve(EmbeddedEngine(model, deterministic=False), requests)
    reference = make_model(family, attention="eager")
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            expected = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        assert answer.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", sorted(FUSED))
def test_the_models_own_forward_gives_the_same_as_the_fused_step(family):
    model = make_model(family)
    prompts = make_prompts(7, seed=2)
    requests = [make_request(str(i), p, seed=i) for i, p in enumerate(prompts)]
    fused, plain = EmbeddedEngine(model, deterministic=False), EmbeddedEngine(model, deterministic=False)
    plain.core.runner.fused = None
    for (a,), (b,) in zip(serve(fused, requests), serve(plain, requests), strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_unjoined_matrices_give_the_same(monkeypatch):
    model, request = make_model("qwen2"), make_request("a", [5, 6, 7], seed=3)
    ((joined,),) = serve(EmbeddedEngine(model, deterministic=False), [request])
    monkeypatch.setattr("skyrl_train.engines.embedded.fused.PACK_LIMIT", 0)
    ((apart,),) = serve(EmbeddedEngine(model, deterministic=False), [request])
    assert joined.token_ids == apart.token_ids
    assert joined.logprobs == pytest.approx(apart.logprobs, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_bfloat16_stays_near_the_plain_forward(dtype):
    """Either as parameters (None) or by autocast over float32 parameters."""
    model = make_model("qwen3", initializer_range=0.05)
    if dtype is None:
        model = model.to(torch.bfloat16)
    prompts = make_prompts(6)
    engine = EmbeddedEngine(model, autocast_dtype=dtype, deterministic=False)
    assert engine.core.runner.fused is not None
    answers = serve(engine, [make_request(str(i), p, seed=i) for i, p in enumerate(prompts)])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        assert max(gap(model, p, a) for p, (a,) in zip(prompts, answers, strict=True)) < 0.05


@pytest.mark.parametrize("family", ["gemma2", "mamba2", "qwen3_next", "bloom"])
def test_a_model_that_needs_more_than_a_cache_is_refused(family):
    changes = {
        "mamba2": {"num_heads": 8, "head_dim": 12, "n_groups": 2, "state_size": 8, "expand": 2},
        "qwen3_next": {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "bloom": {"n_head": 4, "n_layer": 2},
    }.get(family, {"head_dim": 16})
    with pytest.raises(ModelError, match=r"generator\.backend=sglang"):
        EmbeddedEngine(make_model(family, **changes))


def test_a_model_loaded_without_our_attention_is_refused():
    with pytest.raises(ModelError, match="attn_implementation='skyrl'"):
        EmbeddedEngine(make_model(attention="sdpa"))


def test_a_model_whose_weights_are_nan_is_refused_for_that():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        EmbeddedEngine(model)


def test_a_fused_step_that_is_wrong_is_turned_off(caplog):
    """The head norms are made to differ from what the configuration says; only the model's own forward knows."""
    model = make_model("qwen3")
    model.model.layers[0].self_attn.q_norm.variance_epsilon = 0.5
    engine = EmbeddedEngine(model, deterministic=False)
    assert engine.core.runner.fused is None
    assert "short decoding step" in caplog.text
    ((answer,),) = serve(engine, [make_request("a", [5, 6, 7], seed=0)])
    assert gap(model, [5, 6, 7], answer) < 1e-4
