import pytest
import torch

from skyrl_train.models.loading import supports_packing
from skyrl_train.models.scoring import score

from .helpers import FAMILIES, gradients, largest_gap, make_model, ragged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_padded_on_a_gpu(family):
    model, batch = make_model(family).cuda(), ragged().to(torch.device("cuda"))
    assert supports_packing(model)
    found, grads = [], []
    for packed in (False, True):
        logprobs, entropy = score(model, batch, temperature=0.7, packed=packed, with_entropy=True)
        assert entropy is not None and logprobs.is_cuda
        pull = torch.linspace(-1, 1, logprobs.numel(), device="cuda").view_as(logprobs)
        found.append(logprobs.detach())
        grads.append(gradients(model, (logprobs * pull + 0.3 * entropy).sum()))
    torch.testing.assert_close(*found, rtol=0, atol=5e-5)
    assert largest_gap(*grads) < 5e-6


def test_a_gpu_gives_the_log_probs_of_the_cpu():
    batch = ragged()
    with torch.no_grad():
        cpu, _ = score(make_model(), batch, temperature=1.0, packed=True, with_entropy=False)
        there = batch.to(torch.device("cuda"))
        gpu, _ = score(make_model().cuda(), there, temperature=1.0, packed=True, with_entropy=False)
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=0, atol=1e-4)


def test_bfloat16_with_checkpointed_layers_on_a_gpu():
    model, batch = make_model(initializer_range=0.05).cuda().train(), ragged().to(torch.device("cuda"))
    exact, _ = score(model, batch, temperature=1.0, packed=True, with_entropy=False)
    name = "activation_checkpointing_enable"
    (getattr(model, name, None) or model.gradient_checkpointing_enable)({"use_reentrant": False})
    with torch.autocast("cuda", torch.bfloat16):
        rough, _ = score(model, batch, temperature=1.0, packed=True, with_entropy=False)
    assert (rough - exact).abs().max() < 0.05
    assert all(g.isfinite().all() for g in gradients(model, rough.sum()).values())
