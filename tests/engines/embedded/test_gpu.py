"""The same engine on a GPU: float32, bfloat16 parameters, bfloat16 autocast."""

import pytest
import torch

from skyrl_train.engines.embedded.engine import EmbeddedEngine

from .tiny import FAMILIES, gap, make_model, make_prompts, make_request, serve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def exact_products():
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3_moe"])
def test_float32_on_the_gpu_equals_the_plain_forward(family):
    model = make_model(family).cuda()
    prompts = make_prompts(9)
    kinds = [{}, {"top_p": 0.9}, {"temperature": 0.0}, {"repetition_penalty": 1.2, "min_new_tokens": 3}]
    requests = [make_request(str(i), p, seed=i, **kinds[i % 4]) for i, p in enumerate(prompts)]
    answers = serve(EmbeddedEngine(model, deterministic=False), requests)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        assert gap(model, prompt, answer) < 1e-3


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text"])
def test_bfloat16_on_the_gpu_is_near_the_plain_forward(family, autocast):
    model = make_model(family, initializer_range=0.05).cuda()
    if not autocast:
        model = model.to(torch.bfloat16)
    engine = EmbeddedEngine(model, autocast_dtype=torch.bfloat16 if autocast else None, deterministic=False)
    prompts = make_prompts(12)
    answers = serve(engine, [make_request(str(i), p, seed=i) for i, p in enumerate(prompts)])
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        assert max(gap(model, p, a) for p, (a,) in zip(prompts, answers, strict=True)) < 0.1


def test_the_cache_goes_back_to_the_learner_when_weights_are_committed():
    engine = EmbeddedEngine(make_model().cuda(), deterministic=False)
    serve(engine, [make_request("a", [5, 6], seed=0)])
    assert engine.core.cache.nbytes
    engine.core.commit(1)
    assert engine.core.cache.nbytes == 0
    assert serve(engine, [make_request("a", [5, 6], seed=0)])[0][0].weight_version == 1
