"""The sampler against distributions computed in plain Python, and rows that must not feel each other."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from skyrl_train.engines.base import SamplingParams
from skyrl_train.engines.embedded.sampling import Noise, Sampler

V = 12
LOGITS = [2.0, 1.5, 1.5, 0.7, 0.1, 0.0, -0.3, -1.0, -1.0, -2.0, -4.0, -30.0]
DRAWS = 6000
CPU = torch.device("cpu")


@dataclass
class Row:
    params: SamplingParams
    noise: Noise = field(default_factory=lambda: Noise(0, 0))
    ids: list[int] = field(default_factory=list)
    prompt_ids: tuple[int, ...] = ()
    stop_ids: frozenset[int] = frozenset()


def params(**changes) -> SamplingParams:
    return SamplingParams(max_new_tokens=100, **changes)


def sample(rows, logits):
    """Tokens and log-probs of one step."""
    _, tokens, logprobs = Sampler(rows, V, CPU)(torch.as_tensor(logits, dtype=torch.float32))
    return tokens, logprobs


def softmax(values):
    weights = [math.exp(v - max(values)) for v in values]
    return [w / sum(weights) for w in weights]


def exact(p: SamplingParams) -> list[float]:
    """The distribution by the book: temperature, top-k, top-p on what is left, min-p; one token at a time."""
    probs = softmax([v / p.temperature for v in LOGITS])
    likely = sorted(range(V), key=lambda i: (-probs[i], i))
    if p.top_k > 0:
        likely = likely[: p.top_k]
    mass, chosen, total = 0.0, [], sum(probs[i] for i in likely)
    for i in likely:
        if mass < p.top_p * total or p.top_p >= 1:
            chosen.append(i)
        mass += probs[i]
    chosen = [i for i in chosen if probs[i] >= p.min_p * max(probs)]
    left = sum(probs[i] for i in chosen)
    return [probs[i] / left if i in chosen else 0.0 for i in range(V)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 4},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.25, "temperature": 1.3},
    ],
)
def test_tokens_follow_the_exact_distribution(changes):
    """Chi-square: with k outcomes its mean is k-1, its deviation sqrt(2(k-1)); five of those are no chance."""
    p = params(**changes)
    expected = exact(p)
    tokens, logprobs = sample([Row(p, Noise(seed, 0)) for seed in range(DRAWS)], [LOGITS] * DRAWS)
    counts = [tokens.count(i) for i in range(V)]
    assert all(counts[i] == 0 for i in range(V) if expected[i] == 0)
    bins = [(c, e * DRAWS) for c, e in zip(counts, expected, strict=True) if e * DRAWS >= 5]
    free = len(bins) - 1
    assert sum((c - e) ** 2 / e for c, e in bins) <= free + 5 * math.sqrt(2 * max(free, 1))
    plain = torch.tensor(softmax([v / p.temperature for v in LOGITS])).log()
    assert torch.allclose(torch.tensor(logprobs), plain[tokens], atol=1e-5)


def test_greedy_takes_the_first_of_the_likeliest_and_tells_its_raw_logprob():
    tokens, logprobs = sample([Row(params(temperature=0.0))], [LOGITS])
    assert tokens == [0]
    assert logprobs[0] == pytest.approx(math.log(softmax(LOGITS)[0]), abs=1e-6)


KINDS = [
    params(),
    params(temperature=0.0),
    params(temperature=0.5),
    params(top_p=0.7),
    params(top_k=3),
    params(min_p=0.3),
    params(repetition_penalty=1.5),
    params(frequency_penalty=0.5, presence_penalty=0.5, top_p=0.9),
    params(logit_bias={3: 2.0}),
    params(min_new_tokens=5),
]


def test_a_row_gets_the_same_token_in_any_company():
    def row(kind, seed):
        return Row(kind, Noise(seed, 0), ids=[1, 1, 4], prompt_ids=(0, 2), stop_ids=frozenset({0}))

    logits = torch.randn(len(KINDS), V, generator=torch.Generator().manual_seed(0)) * 2
    for seed in range(40):
        together, logprobs = sample([row(kind, seed) for kind in KINDS], logits)
        for place, kind in enumerate(KINDS):
            token, logprob = sample([row(kind, seed)], logits[place : place + 1])
            assert (token[0], logprob[0]) == (together[place], pytest.approx(logprobs[place], abs=1e-6))


def test_penalties_bias_and_min_new_tokens_shape_what_is_sampled_but_not_the_logprob():
    """Worked out: with greedy choice the token that wins tells which logits were compared."""
    raw = [2.0, 1.9, 1.8, -1.0] + [-9.0] * (V - 4)

    def winner(prompt=(), ids=(), stops=(), **changes):
        tokens, logprobs = sample(
            [Row(params(temperature=0.0, **changes), ids=list(ids), prompt_ids=prompt, stop_ids=frozenset(stops))],
            [raw],
        )
        assert logprobs[0] == pytest.approx(math.log(softmax(raw)[tokens[0]]), abs=1e-5)
        return tokens[0]

    assert winner() == 0
    assert winner(repetition_penalty=1.06, prompt=(0,)) == 1  # 2.0 / 1.06 = 1.887 < 1.9
    assert winner(repetition_penalty=1.06, ids=(0, 1)) == 0  # 1.887 > 1.792, and 1.8 < 1.887
    assert winner(repetition_penalty=1.12, ids=(0, 1)) == 2  # 1.786, 1.696, 1.8
    assert winner(repetition_penalty=0.5, ids=(3,)) == 0  # -1 becomes -0.5
    assert winner(frequency_penalty=0.06, ids=(0, 0)) == 1  # 2.0 - 0.12
    assert winner(frequency_penalty=0.06, prompt=(0, 0)) == 0  # the prompt does not count
    assert winner(presence_penalty=0.15, ids=(0, 0, 0)) == 1  # 1.85 against 1.9
    assert winner(logit_bias={2: 0.3}) == 2
    assert winner(min_new_tokens=1, stops=(0, 1)) == 2
    assert winner(min_new_tokens=1, stops=(0, 1), ids=(5,)) == 0


def test_counts_go_on_from_step_to_step():
    row = Row(params(temperature=0.0, frequency_penalty=0.3))
    sampler = Sampler([row], V, torch.device("cpu"))
    raw = torch.tensor([[1.0, 0.8] + [-9.0] * (V - 2)])
    seen = []
    for _ in range(4):
        _, tokens, _ = sampler(raw)
        row.ids += tokens
        seen += tokens
    assert seen == [0, 1, 0, 1]  # 1.0 | 0.7 .8 | .7 .5 | .4 .5


def test_a_token_without_probability_is_never_drawn():
    """The noise is at its largest and its smallest; the ends of the row are impossible tokens."""
    logits = [[float("-inf"), 0.0, 1.0, float("-inf")] + [float("-inf")] * (V - 4)] * 2
    high, low = Row(params()), Row(params())
    high.noise, low.noise = (lambda: 1.0 - 2.0**-22), (lambda: 0.0)  # type: ignore[assignment]
    assert sample([high, low], logits)[0] == [2, 1]


def test_noise_depends_on_seed_and_sample_only():
    def draws(seed, sample):
        noise = Noise(seed, sample)
        return [noise() for _ in range(5)]

    assert draws(7, 0) == draws(7, 0)
    assert len({tuple(draws(seed, place)) for seed in (0, 1, 2**62, 2**63) for place in (0, 1, 2)}) == 12


def test_logits_that_are_not_finite_show_in_the_logprob_of_their_row_only():
    logits = torch.tensor([LOGITS, LOGITS])
    logits[0, 3] = float("nan")
    for kind in KINDS:
        _, logprobs = sample([Row(kind), Row(kind)], logits)
        assert not math.isfinite(logprobs[0]) and math.isfinite(logprobs[1])
