"""Log-probs from hidden states in chunks are those from logits, with their gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import log_softmax

from skyrl_train.models import projection
from skyrl_train.models.loading import supports_packing
from skyrl_train.models.projection import projected_logprobs
from skyrl_train.models.scoring import PROJECTS, score

from .helpers import FAMILIES, gradients, largest_gap, make_model, ragged

V, H, M = 37, 8, 11


def case():
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=draw).requires_grad_() for s in ((M, H), (V, H), (V,)))
    return hidden, weight, bias, torch.randint(0, V, (M,), generator=draw), torch.randn(2, M, generator=draw)


@pytest.mark.parametrize("terms", ["logprob", "entropy", "both"])
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_numbers_and_gradients_are_the_definitions(monkeypatch, terms, rows, with_bias):
    monkeypatch.setitem(projection.CHUNK, "cpu", rows * V)
    hidden, weight, bias, targets, pull = case()
    leaves = [hidden, weight] + [bias] * with_bias

    def loss(logprobs, entropy):
        return ((terms != "entropy") * logprobs * pull[0] + (terms != "logprob") * entropy * pull[1]).sum()

    every = log_softmax(torch.nn.functional.linear(hidden, weight, bias if with_bias else None) / 0.7, -1)
    plain = every.gather(-1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)
    ours = projected_logprobs(hidden, weight, bias if with_bias else None, targets, 0.7, compiled=False)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(loss(*ours), leaves), torch.autograd.grad(loss(*plain), leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_size_of_the_logits_is_kept():
    hidden, weight, bias, targets, _ = case()
    logprobs, _ = projected_logprobs(hidden, weight, bias, targets, 1.0, compiled=False)
    assert max(t.numel() for t in logprobs.grad_fn.saved_tensors) == V * H


def test_a_frozen_output_layer_gets_no_gradient():
    hidden, weight, bias, targets, _ = case()
    weight.requires_grad_(False), bias.requires_grad_(False)
    projected_logprobs(hidden, weight, bias, targets, 1.0, compiled=False)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None and bias.grad is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_scores_the_same_in_chunks(monkeypatch, family):
    model, batch = make_model(family), ragged()
    found, grads = [], []
    for small in (1 << 40, 0):
        monkeypatch.setattr(projection, "SMALL", small)
        logprobs, entropy = score(model, batch, temperature=0.7, packed=True, with_entropy=True)
        pull = torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
        found.append((logprobs.detach(), entropy.detach()))
        grads.append(gradients(model, (logprobs * pull + 0.3 * entropy).sum()))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    assert largest_gap(*grads) < 1e-6
    assert "forward" not in vars(model.get_output_embeddings())


def test_under_autocast_the_products_are_in_half_precision(monkeypatch):
    model, batch = make_model(initializer_range=0.05), ragged()
    exact, _ = score(model, batch, temperature=1.0, packed=True, with_entropy=False)
    monkeypatch.setattr(projection, "SMALL", 0)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = score(model, batch, temperature=1.0, packed=True, with_entropy=False)
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.05
    assert all(g.isfinite().all() for g in gradients(model, rough.sum()).values())


def test_a_model_that_caps_its_logits_keeps_them_in_one_piece(monkeypatch):
    model = make_model("gemma3_text", final_logit_softcapping=1.5)
    assert supports_packing(model) and getattr(model, PROJECTS) is False
    whole, _ = score(model, ragged(), temperature=1.0, packed=True, with_entropy=False)
    monkeypatch.setattr(projection, "SMALL", 0)
    again, _ = score(model, ragged(), temperature=1.0, packed=True, with_entropy=False)
    assert torch.equal(whole, again)
    assert supports_packing(make_model()) and getattr(make_model(), PROJECTS, True)
