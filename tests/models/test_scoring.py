import pytest
import torch
from torch.nn.functional import log_softmax

from skyrl_train.models import packing, scoring
from skyrl_train.models.attention import NAME
from skyrl_train.models.compiled import compile_layers
from skyrl_train.models.recompute import recompute_activations
from skyrl_train.models.scoring import score, token_logprobs

from .helpers import FAMILIES, VOCABULARY, gradients, largest_gap, make_batch, make_model, ragged

PACKING = list(FAMILIES)


def alone(model, batch, row: int) -> torch.Tensor:
    """Log-probs of one response from a forward pass of its sequence and nothing else."""
    prompt, response = batch.prompt(row), batch.response(row)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return log_softmax(logits.float(), -1)[torch.arange(len(response)), response]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", PACKING)
def test_each_token_has_its_log_prob_as_alone(family, packed):
    model, batch = make_model(family), ragged()
    with torch.no_grad():
        logprobs, _ = score(model, batch, temperature=1.0, packed=packed, with_entropy=False)
    for row in range(len(batch)):
        expected = alone(model, batch, row)
        torch.testing.assert_close(logprobs[row, : len(expected)], expected, rtol=0, atol=1e-5)
        assert not logprobs[row, len(expected) :].any()


@pytest.mark.parametrize("family", PACKING)
def test_gradients_of_packed_and_padded_agree(family):
    model, batch = make_model(family), ragged()
    found = []
    for packed in (False, True):
        logprobs, entropy = score(model, batch, temperature=0.7, packed=packed, with_entropy=True)
        assert entropy is not None
        pull = torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
        found.append(gradients(model, (logprobs * pull + 0.3 * entropy).sum()))
    assert largest_gap(*found) < 1e-6


def test_our_attention_without_a_plan_is_that_of_transformers():
    batch = ragged()
    ours, theirs = (
        score(make_model("qwen3", attention=a), batch, temperature=1.0, packed=False, with_entropy=False)[0]
        for a in (NAME, "sdpa")
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("packed", [True, False])
def test_temperature_scales_the_logits_and_0_means_1(packed):
    model, batch = make_model(), ragged()

    def at(temperature):
        return score(model, batch, temperature=temperature, packed=packed, with_entropy=False)[0]

    assert torch.equal(at(0.0), at(1.0))
    logits = model(input_ids=torch.tensor([batch.prompt(0) + batch.response(0)])).logits[0]
    first = len(batch.prompt(0)) - 1
    expected = log_softmax(logits[first] / 0.5, -1)[batch.response(0)[0]]
    torch.testing.assert_close(at(0.5)[0, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_shape_is_the_batchs_however_short_the_responses_are(packed):
    batch = make_batch([[3, 4], [5]], [[6, 7], []], width=9)
    logprobs, entropy = score(make_model(), batch, temperature=1.0, packed=packed, with_entropy=True)
    assert entropy is not None
    assert logprobs.shape == entropy.shape == (2, 9)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs[batch.response_mask].lt(0).all() and entropy[batch.response_mask].gt(0).all()
    assert not logprobs[~batch.response_mask].any() and not entropy[~batch.response_mask].any()


def test_a_batch_of_empty_responses_scores_nothing_and_pulls_nothing():
    model = make_model()
    logprobs, _ = score(model, make_batch([[3, 4]], [[]]), temperature=1.0, packed=True, with_entropy=True)
    assert logprobs.tolist() == [[0.0]]
    assert not any(g.any() for g in gradients(model, logprobs.sum()).values())


def test_no_entropy_unless_asked_for():
    assert score(make_model(), ragged(), temperature=1.0, packed=True, with_entropy=False)[1] is None


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointed_layers_give_the_same_gradients(monkeypatch, mode):
    calls = []
    attend = packing.scaled_dot_product_attention

    def counted(*args, **more):
        calls.append(1)
        return attend(*args, **more)

    monkeypatch.setattr(packing, "scaled_dot_product_attention", counted)
    model, batch = make_model(), ragged()
    found, runs = [], []
    for recompute in (False, True):
        if recompute:
            recompute_activations(model, mode=mode, use_reentrant=False)
        model.train()
        for _ in range(2):  # nothing is left over from the first time
            calls.clear()
            logprobs, _ = score(model, batch, temperature=1.0, packed=True, with_entropy=False)
            found.append(gradients(model, logprobs.sum()))
            runs.append(len(calls))
    assert all(largest_gap(found[0], other) < 1e-6 for other in found)
    once = runs[0]
    assert once > 0 and runs == [once, once, *([2 * once] * 2 if mode == "full" else [once] * 2)]


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler's own
@pytest.mark.parametrize("recompute", [False, True])
def test_each_layer_is_compiled_in_two_pieces_around_attention(recompute):
    """Whether its activations are computed again or not."""
    from torch._dynamo.backends.debugging import aot_eager

    pieces: list[int] = []

    def counted(graph, inputs):
        pieces.append(len(graph.graph.nodes))
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    model, batch = make_model().train(), ragged()
    found = []
    for compiled in (False, True):
        if compiled:
            assert compile_layers(model, counted) == 2
            if recompute:
                recompute_activations(model, mode="selective", use_reentrant=False)
        logprobs, _ = score(model, batch, temperature=1.0, packed=True, with_entropy=False)
        found.append((logprobs.detach(), gradients(model, logprobs.sum())))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5) and largest_gap(found[0][1], found[1][1]) < 1e-6
    assert len(pieces) == 2, "both layers share them"


def test_bfloat16_autocast_stays_near_and_returns_float32():
    model, batch = make_model(initializer_range=0.05), ragged()
    exact, _ = score(model, batch, temperature=1.0, packed=True, with_entropy=False)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = score(model, batch, temperature=1.0, packed=True, with_entropy=False)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05
    assert all(g.isfinite().all() for g in gradients(model, rough.sum()).values())


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 1 << 22])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("terms", ["logprob", "entropy", "both"])
def test_token_logprobs_and_their_gradient_are_autograds(monkeypatch, chunk, temperature, terms):
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    draw = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(2, 5, VOCABULARY, generator=draw)).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (2, 5), generator=draw)
    pull = torch.randn(2, 5, generator=draw)

    def loss(logprobs, entropy):
        return ((terms != "entropy") * logprobs * pull + (terms != "logprob") * entropy * pull.flip(0)).sum()

    every = log_softmax(logits / temperature, -1)
    plain = every.gather(-1, targets[..., None])[..., 0], -(every.exp() * every).sum(-1)
    (expected,) = torch.autograd.grad(loss(*plain), logits)
    ours = token_logprobs(logits, targets, temperature, with_entropy=True)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad(loss(*ours), logits)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_uniform_logits_by_hand():
    logprobs, entropy = token_logprobs(torch.zeros(1, 4), torch.tensor([2]), 1.0, with_entropy=True)
    assert entropy is not None
    assert logprobs.item() == pytest.approx(-1.3862944)  # log(1/4)
    assert entropy.item() == pytest.approx(1.3862944)


def test_the_backward_of_log_probs_alone_needs_one_tensor_of_the_size_of_the_logits():
    logits = torch.zeros(10, 50, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.zeros(10, dtype=torch.long), 1.0, with_entropy=True)
    saved = logprobs.grad_fn.saved_tensors
    assert [t.data_ptr() for t in saved if t.numel() == logits.numel()] == [logits.data_ptr()]
    assert entropy is not None and entropy.requires_grad
