"""Log-probs of what was really sampled from: against the definition, autograd, and the engine's own draws."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from skyrl_train.config.door import load_config
from skyrl_train.engines.base import SamplingParams
from skyrl_train.engines.embedded.sampling import Noise, Sampler
from skyrl_train.models import projection, sampled
from skyrl_train.models.sampled import SampledDistribution, SeenTokens
from skyrl_train.models.scoring import score, score_both
from skyrl_train.models.truncation import kept

from .helpers import gradients, largest_gap, make_batch, make_model, ragged

CHANGES = {
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.15},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "logit_bias": {"logit_bias": ((2, 1.5), (7, -4.0), (9, 0.5))},
    "all": {"top_p": 0.8, "top_k": 6, "min_p": 0.1, "repetition_penalty": 0.8, "logit_bias": ((3, 2.0),)},
}


def by_the_book(logits: list[float], change: SampledDistribution, temperature: float, seen: set[int], y: int):
    """The probabilities, one token at a time; the drawn token is always among those left."""
    bias = dict(change.logit_bias)
    x = [value + bias.get(i, 0.0) for i, value in enumerate(logits)]
    r = change.repetition_penalty
    x = [(v / r if v > 0 else v * r) if i in seen else v for i, v in enumerate(x)]
    weights = [math.exp(v / temperature) for v in x]
    probs = [w / sum(weights) for w in weights]
    likely = sorted(range(len(x)), key=lambda i: (-probs[i], i))
    likely = likely[: change.top_k] if change.top_k > 0 else likely
    mass, left, total = 0.0, set(), sum(probs[i] for i in likely)
    for i in likely:
        if mass < change.top_p * total:
            left.add(i)
        mass += probs[i]
    left = {i for i in left if probs[i] >= change.min_p * max(probs)} | {y}
    total = sum(probs[i] for i in left)
    return [probs[i] / total if i in left else 0.0 for i in range(len(x))]


def case(rows: int = 24, vocabulary: int = 17):
    draw = torch.Generator().manual_seed(5)
    logits = 1.5 * torch.randn(rows, vocabulary, generator=draw)
    return logits, torch.randint(0, vocabulary, (rows,), generator=draw), torch.rand(logits.shape, generator=draw) < 0.3


@pytest.mark.parametrize("chunk", [1, 1 << 21])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", CHANGES)
def test_the_definition(monkeypatch, name, temperature, chunk):
    monkeypatch.setattr(sampled, "CHUNK", chunk)
    change = SampledDistribution(**CHANGES[name])
    logits, targets, seen = case()
    logprobs, entropy, plain = change.logprobs(logits, targets, temperature, True, seen)  # pyright: ignore
    assert entropy is not None
    for row, y in enumerate(targets.tolist()):
        met = set(seen[row].nonzero().flatten().tolist())
        probs = by_the_book(logits[row].tolist(), change, temperature, met, y)
        assert logprobs[row].item() == pytest.approx(math.log(probs[y]), abs=1e-5)
        assert entropy[row].item() == pytest.approx(-sum(p * math.log(p) for p in probs if p), abs=1e-5)
    assert torch.equal(plain, (logits / temperature).log_softmax(-1)[range(len(targets)), targets])


@pytest.mark.parametrize("terms", ["logprob", "entropy", "both"])
@pytest.mark.parametrize("name", CHANGES)
def test_gradients_are_autograds_with_the_choice_of_tokens_given(name, terms):
    change = SampledDistribution(**CHANGES[name])
    logits, targets, seen = case()
    pull = torch.linspace(-1, 1, len(targets))

    def total(logprobs: Tensor, entropy: Tensor) -> Tensor:
        parts = {"logprob": (pull * logprobs).sum(), "entropy": (entropy * pull.flip(0)).sum()}
        return sum(parts.values()) if terms == "both" else parts[terms]  # pyright: ignore[reportReturnType]

    ours = logits.clone().requires_grad_()
    logprobs, entropy, plain = change.logprobs(ours, targets, 0.7, True, seen)  # pyright: ignore
    assert entropy is not None and not plain.requires_grad
    total(logprobs, entropy).backward()

    theirs = logits.clone().requires_grad_()
    x = theirs.double()
    for token, value in change.logit_bias:
        x = x + value * torch.nn.functional.one_hot(torch.tensor(token), x.shape[1])
    x = torch.where(seen, torch.where(x > 0, x / change.repetition_penalty, x * change.repetition_penalty), x) / 0.7
    left = change.change(logits, targets, 0.7, seen)[0] > -torch.inf
    lp = torch.where(left, x, -torch.inf).log_softmax(-1)
    h = -torch.where(left, lp.exp() * lp.masked_fill(~left, 0.0), 0.0).sum(-1)
    total(lp.gather(1, targets[:, None])[:, 0], h).backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_top_p_before_or_after_top_k():
    # The likeliest two hold 0.8, and 0.6 of that is 0.48: the first alone. Of the whole, 0.6 takes the second too
    probs, two, most = torch.tensor([[0.5, 0.3, 0.15, 0.05]]), torch.tensor([[2]]), torch.tensor([[0.6]])
    assert kept(probs, two, most, None).tolist() == [[True, False, False, False]]
    assert kept(probs, two, most, None, joint=True).tolist() == [[True, True, False, False]]


def test_a_token_that_fell_out_of_reach_is_still_counted():
    logits = torch.tensor([[3.0, 2.0, -5.0]])
    change = SampledDistribution(top_k=1)
    logprobs, _, _ = change.logprobs(logits, torch.tensor([2]), 1.0, False, None)
    # left are token 0 and the drawn one: e^-5 / (e^3 + e^-5)
    assert logprobs.item() == pytest.approx(-8 - math.log1p(math.exp(-8)))


def test_an_engine_that_reports_after_the_bias_is_met_there():
    # logits 0, 0, log 2 and a bias of log 3 on the last: 1 : 1 : 2 before it, 1 : 1 : 6 after it
    logits, target = torch.tensor([[0.0, 0.0, math.log(2)]]), torch.tensor([2])
    for reported, before in ((False, 2 / 4), (True, 6 / 8)):
        change = SampledDistribution(logit_bias=((2, math.log(3)),), top_k=1, bias_reported=reported)
        sampled, _, plain = change.logprobs(logits, target, 1.0, False, None)
        assert plain.exp().item() == pytest.approx(before) and sampled.item() == 0.0


def test_seen_tokens_are_those_of_the_prompt_and_of_the_response_so_far():
    batch = make_batch([[5, 6, 5], [7]], [[8, 9, 8], [0, 7]])
    rows, columns = (index.flatten() for index in torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"))
    seen = SeenTokens(batch, 12).before(rows, columns)[slice(0, 6)]
    met = [set(row.nonzero().flatten().tolist()) for row in seen]
    # the padding, token 0, was never there; where it was written it was
    assert met[:3] == [{5, 6}, {5, 6, 8}, {5, 6, 8, 9}]
    assert met[3:5] == [{7}, {7, 0}]


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("rows", [0, 3])
def test_packed_is_padded(name, rows, monkeypatch):
    """By logits that are held, or projected and forgotten a few rows at a time."""
    model, batch = make_model(), ragged()
    change = SampledDistribution(**CHANGES[name])
    whole = int(batch.response_mask.sum()) * model.config.vocab_size
    if rows:
        monkeypatch.setattr(projection, "SMALL", 0)
        monkeypatch.setitem(projection.CHUNK, "cpu", rows * model.config.vocab_size)
    found = []
    for packed in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            logprobs, entropy = score(
                model, batch, temperature=0.7, packed=packed, with_entropy=True, sampled=change
            )  # fmt: skip
        both = score_both(model, batch, temperature=0.7, packed=packed, sampled=change)
        plain, _ = score(model, batch, temperature=0.7, packed=packed, with_entropy=False)
        assert entropy is not None
        assert torch.equal(both[0], logprobs)
        torch.testing.assert_close(both[1], plain, rtol=0, atol=1e-5)
        assert not packed or (whole in sizes) == (not rows), "logits are held for the backward pass"
        assert not logprobs[~batch.response_mask].any() and not entropy[~batch.response_mask].any()
        pull = torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
        found.append((logprobs.detach(), entropy.detach(), gradients(model, (logprobs * pull + 0.3 * entropy).sum())))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=2e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=2e-5)
    assert largest_gap(found[0][2], found[1][2]) < 1e-5


@dataclass
class Row:
    params: SamplingParams
    noise: Noise
    prompt_ids: tuple[int, ...] = (1, 4)
    ids: list[int] = field(default_factory=lambda: [4, 2])
    stop_ids: frozenset[int] = frozenset()


@pytest.mark.parametrize("name", CHANGES)
def test_the_engine_draws_from_what_the_learner_scores(name):
    """Chi-square of 6,000 draws; five deviations are no chance."""
    draws, vocabulary = 6000, 12
    logits = 1.2 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(1))
    settings = dict(CHANGES[name])
    bias = {str(k): v for k, v in settings.pop("logit_bias", ())}
    params = SamplingParams(
        max_new_tokens=9, temperature=0.8, logit_bias={int(k): v for k, v in bias.items()}, **settings
    )  # fmt: skip
    rows = [Row(params, Noise(seed, 0)) for seed in range(draws)]
    _, tokens, reported = Sampler(rows, vocabulary, torch.device("cpu"))(logits.expand(draws, -1))
    seen = torch.zeros(1, vocabulary, dtype=torch.bool)
    seen[0, [1, 2, 4]] = True
    change = SampledDistribution(**CHANGES[name])
    every = torch.arange(vocabulary)
    scored, _, plain = change.logprobs(
        logits.expand(vocabulary, -1), every, 0.8, False, seen.expand(vocabulary, -1)  # pyright: ignore
    )  # fmt: skip
    drawn = sorted(set(tokens))
    assert scored[drawn].exp().sum().item() == pytest.approx(1, abs=1e-5)  # what was never drawn is not left
    counts = torch.tensor([tokens.count(token) for token in drawn], dtype=torch.float32)
    expected = scored[drawn].exp() * draws
    free = len(drawn) - 1
    assert ((counts - expected).square() / expected).sum() < free + 5 * math.sqrt(2 * free) + 1
    torch.testing.assert_close(torch.tensor(reported), plain[tokens], rtol=0, atol=1e-5)  # engines report the plain one


def test_what_a_config_asks_for():
    def of(*overrides: str) -> SampledDistribution | None:
        return SampledDistribution.of(load_config(["trainer.policy.model.path=x", *overrides]))

    section = "generator.sampling_params"
    assert of() is None and of(f"{section}.temperature=0.5") is None
    assert of(f"{section}.top_p=0.9") == SampledDistribution(top_p=0.9)
    assert of(f"{section}.top_p=0.9", f"{section}.temperature=0", "generator.n_samples_per_prompt=1") is None  # greedy
    assert of(f"{section}.logit_bias={{7:1.0,3:-2.0}}") == SampledDistribution(logit_bias=((3, -2.0), (7, 1.0)))
    biased = of(f"{section}.logit_bias={{7:1.0}}", "generator.backend=sglang")
    assert biased == SampledDistribution(logit_bias=((7, 1.0),), joint=True, bias_reported=True)
    served = of(f"{section}.top_k=9", "generator.backend=sglang")
    assert served == SampledDistribution(top_k=9, joint=True)
    assert of(f"{section}.top_k=9", f"{section}.min_p=0.1", "generator.backend=sglang") == SampledDistribution(
        top_k=9, min_p=0.1
    )
