"""The sums are right, and the held-out pairs are."""

from __future__ import annotations

import pytest

from skyrl_train.data.prepare.addition import held_out, work
from skyrl_train.errors import ConfigError


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (47, 85, "7+5+0=12;4+8+1=13;<answer>132</answer>"),
        (0, 0, "0+0+0=0;<answer>0</answer>"),
        (5, 99, "5+9+0=14;0+9+1=10;<answer>104</answer>"),
        (999, 1, "9+1+0=10;9+0+1=10;9+0+1=10;<answer>1000</answer>"),
    ],
)
def test_work(a, b, text):
    assert work(a, b) == text


def operands(prompt) -> tuple[int, int]:
    a, b = prompt.messages[0]["content"].split("+")
    return int(a), int(b)


def test_rows(prepared):
    splits = prepared("addition")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 8994, "validation": 500}
    for split, rows in splits.items():
        pairs = [operands(prompt) for prompt in rows]
        assert len(set(pairs)) == len(pairs)
        assert all(held_out(*pair) == (split == "validation") for pair in pairs)
        for (a, b), prompt in zip(pairs, rows, strict=True):
            assert prompt.env_class == "addition"
            assert prompt.extras["reward_spec"] == {"ground_truth": str(a + b)}
            assert prompt.extras["extra_info"]["worked"] == [{"role": "assistant", "content": work(a, b)}]


def test_lengths_are_those_of_the_recipe(prepared):
    """A tag is one token of the character tokenizer, and the end of the turn is one more."""
    rows = prepared("addition")["train"]
    answers = [prompt.extras["extra_info"]["worked"][0]["content"] for prompt in rows]
    lengths = [len(text) - len("<answer></answer>") + 2 + 1 for text in answers]
    assert 21.5 < sum(lengths) / len(lengths) < 23.5
    assert max(lengths) <= 36


def test_the_seed_orders_and_the_size_limits(prepared):
    def first(**options):
        return [operands(p) for p in prepared("addition", size=50, validation_size=5, **options)["train"]]

    assert first() == first()
    assert first() != first(seed=1)
    assert len(first()) == 50


def test_more_digits(prepared):
    splits = prepared("addition", digits=3, size=300, validation_size=30)
    assert len(splits["train"]) == 300
    assert len(splits["validation"]) == 30
    assert max(max(operands(p)) for p in splits["train"]) > 900


@pytest.mark.parametrize("option", [{"digits": 0}, {"digits": 10}, {"size": 0}, {"validation_size": -1}])
def test_options_that_cannot_be(prepared, option):
    with pytest.raises(ConfigError):
        prepared("addition", **option)
